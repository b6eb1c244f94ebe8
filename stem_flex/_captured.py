"""What a mask_mod or score_mod holds on to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import FunctionType

from torch import Tensor


def captured_values(f: Callable) -> tuple[Tensor | float, ...]:
    """Tensors and numbers that ``f`` and the functions it uses read: in closures, defaults and module globals."""
    return tuple(x for x in _captured(f, 0) if not isinstance(x, FunctionType))


def code_of(f: Callable | None) -> tuple:
    """The code of ``f`` and of the functions it uses: what a compiler compiles, whatever object carries it."""
    if f is None:
        return ()
    inner = (x.__code__ for x in _captured(f, 0) if isinstance(x, FunctionType))
    return (getattr(f, "__code__", f), *inner)


def _captured(f: Callable, depth: int) -> Iterator[Tensor | float | FunctionType]:
    for held in _names(f):
        if isinstance(held, Tensor | int | float):
            yield held
        elif isinstance(held, FunctionType) and depth < 8:
            yield held
            yield from _captured(held, depth + 1)


def _names(f: Callable) -> Iterator[object]:
    for cell in getattr(f, "__closure__", None) or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a cell that was never filled
            continue
    yield from getattr(f, "__defaults__", None) or ()
    around = getattr(f, "__globals__", {})
    for name in getattr(getattr(f, "__code__", None), "co_names", ()):
        held = around.get(name)
        beside = isinstance(held, FunctionType) and held.__globals__ is around and held is not f
        if beside or isinstance(held, Tensor | int | float):
            yield held
