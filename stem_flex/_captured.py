"""What a mask_mod or score_mod reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType, MethodType, ModuleType

from torch import Tensor

_DEEPEST = 8


def captured_values(f: Callable) -> tuple[Tensor | float, ...]:
    """Tensors and numbers that ``f`` and what it uses read.

    Looks through closures, defaults, globals of the function's module, partials, methods, containers and objects.
    """
    return tuple(x for x in _walk(f, 0, set()) if not isinstance(x, FunctionType))


def code_of(f: Callable | None) -> tuple:
    """The code of ``f`` and of the functions it uses: what a compiler compiles, whatever object carries it."""
    if f is None:
        return ()
    inner = tuple(x.__code__ for x in _walk(f, 0, set()) if isinstance(x, FunctionType))
    return inner if isinstance(f, FunctionType) else (f, *inner)


def state_of(values: tuple) -> tuple:
    """What tells whether any of these tensors and numbers changed; compare while the tensors are alive.

    Inference tensors don't tell when they change, and are never equal to themselves.
    """
    return tuple(_state(x) for x in values)


def _state(x: object) -> object:
    if not isinstance(x, Tensor):
        return x
    return object() if x.is_inference() else (id(x), x._version)


def _walk(x: object, depth: int, seen: set[int]) -> Iterator[Tensor | float | FunctionType]:
    if isinstance(x, Tensor | int | float):
        yield x
        return
    if x is None or isinstance(x, str | bytes | type | ModuleType) or depth > _DEEPEST or id(x) in seen:
        return
    seen.add(id(x))
    if isinstance(x, FunctionType):
        yield x
    for inner in _inside(x):
        yield from _walk(inner, depth + 1, seen)


def _inside(x: object) -> Iterator[object]:
    if isinstance(x, FunctionType):
        yield from _names(x)
    elif isinstance(x, partial):
        yield from (x.func, *x.args, *x.keywords.values())
    elif isinstance(x, MethodType):
        yield from (x.__func__, x.__self__)
    elif isinstance(x, dict):
        yield from x.values()
    elif isinstance(x, list | tuple | set | frozenset):
        yield from x
    elif hasattr(x, "__dict__"):
        yield from vars(x).values()
        yield type(x).__dict__.get("__call__")


def _names(f: FunctionType) -> Iterator[object]:
    for cell in f.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a cell that was never filled
            continue
    yield from f.__defaults__ or ()
    yield from (f.__kwdefaults__ or {}).values()
    for name in f.__code__.co_names:
        held = f.__globals__.get(name)
        # functions of other modules are libraries, not data
        if not callable(held) or (isinstance(held, FunctionType) and held.__globals__ is f.__globals__):
            yield held
