"""What a mask_mod or score_mod reads."""

from __future__ import annotations

import dis
import functools
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import NamedTuple

from torch import Tensor

_DEEPEST = 8
_NOT_DATA = (str, bytes, type, ModuleType, BuiltinFunctionType, type(None))
_GLOBAL = ("LOAD_GLOBAL", "LOAD_NAME")
_ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD")


def captured_values(f: Callable) -> tuple[Tensor | float, ...]:
    """Tensors and numbers that ``f`` and what it uses read.

    Looks through closures, defaults, module globals, partials, methods, containers, and the attributes of objects and
    modules that the code names; not at modules imported inside ``f``, nor at what other modules' functions read there.
    """
    return tuple(x for x in _walk(f, frozenset(), 0, set()) if not isinstance(x, FunctionType))


class Code(NamedTuple):
    """What a compiler compiles, whatever object carries it.

    Attributes:
        code: of the function and of the functions it uses.
        numbers: that they read, in order, as text, for 1 == 1.0 == True: the value where it is compiled into the code,
            else the type.
        fixed: whether there is any such value.
    """

    code: tuple
    numbers: tuple[str, ...]
    fixed: bool


def code_of(f: Callable | None, constants: tuple[type, ...]) -> Code:
    """The :class:`Code` of ``f``, with numbers of the types ``constants`` compiled in."""
    if f is None:
        return Code((), (), False)
    found = tuple(_walk(f, frozenset(), 0, set()))
    code = tuple(x.__code__ for x in found if isinstance(x, FunctionType))
    numbers = [x for x in found if isinstance(x, int | float)]
    fixed = [isinstance(x, constants) for x in numbers]
    text = (repr(x) if known else type(x).__name__ for x, known in zip(numbers, fixed, strict=True))
    return Code(code or (f,), tuple(text), any(fixed))


def _walk(x: object, names: frozenset[str], depth: int, seen: set[int]) -> Iterator[Tensor | float | FunctionType]:
    """Through ``x``, of whose attributes the code that holds it reads ``names``."""
    if isinstance(x, Tensor | int | float):
        yield x
        return
    if isinstance(x, _NOT_DATA) or depth > _DEEPEST or id(x) in seen:
        return
    seen.add(id(x))
    if isinstance(x, FunctionType):
        yield x
        names = _named(x.__code__, _ATTRIBUTE)
    for inner in _inside(x, names):
        yield from _walk(inner, names, depth + 1, seen)


def _inside(x: object, names: frozenset[str]) -> Iterator[object]:
    if isinstance(x, FunctionType):
        for held in _held(x):
            yield from _of_module(held, x) if isinstance(held, ModuleType) else (held,)
        for name in _named(x.__code__, _GLOBAL):
            held = x.__globals__.get(name)
            if isinstance(held, ModuleType):
                yield from _of_module(held, x)
            elif isinstance(held, FunctionType) and held.__globals__ is not x.__globals__:
                yield from _held(held)  # of a library's function only what it was made with is data
            else:
                yield held
    elif isinstance(x, functools.partial):
        yield from (x.func, *x.args, *x.keywords.values())
    elif isinstance(x, MethodType):
        yield x.__func__
        yield from _attributes(x.__self__, _named(x.__func__.__code__, _ATTRIBUTE))
    elif isinstance(x, dict):
        yield from (value for _, value in sorted(x.items(), key=lambda item: repr(item[0])))
    elif isinstance(x, list | tuple | set | frozenset):
        yield from x
    else:
        yield from _attributes(x, names | {"__call__"} if callable(x) else names)


def _of_module(module: ModuleType, f: FunctionType) -> Iterator[object]:
    """The tensors and numbers of ``module`` that ``f`` names, and what its functions among them were made with."""
    for name in sorted(_named(f.__code__, _ATTRIBUTE)):
        held = module.__dict__.get(name)
        if isinstance(held, FunctionType):
            yield from _held(held)
        elif isinstance(held, Tensor | int | float):
            yield held


def _held(f: FunctionType) -> Iterator[object]:
    for cell in f.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a cell that was never filled
            continue
    yield from f.__defaults__ or ()
    yield from (f.__kwdefaults__ or {}).values()


def _attributes(x: object, names: frozenset[str]) -> Iterator[object]:
    """The named attributes of an object, and those that its methods among them name."""
    own, todo, done = getattr(x, "__dict__", {}), set(names), set[str]()
    while todo:
        name = todo.pop()
        done.add(name)
        held = own[name] if name in own else getattr(type(x), name, None)
        if held is None or isinstance(held, MemberDescriptorType):  # what __getattr__ finds, as a module's buffers, or
            held = getattr(x, name, None)  # what __slots__ hold
        if isinstance(held, property):
            held = held.fget
        if isinstance(held, FunctionType) and name not in own:
            todo |= _named(held.__code__, _ATTRIBUTE) - done
        yield held


@functools.lru_cache(maxsize=1024)
def _named(code: CodeType, operations: tuple[str, ...]) -> frozenset[str]:
    """Names that these operations of the code, and of functions written inside it, load."""
    found = {step.argval for step in dis.get_instructions(code) if step.opname in operations}
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            found |= _named(inner, operations)
    return frozenset(found)
