"""What a mask_mod or score_mod holds on to."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor


def captured_tensors(f: Callable) -> tuple[Tensor, ...]:
    """Tensors in the closure of ``f`` and of the functions it captured."""
    return tuple(x for x in _captured(f, 0) if isinstance(x, Tensor))


def code_of(f: Callable | None) -> tuple:
    """The code of ``f`` and of the functions it captured: what a compiler compiles, whatever object carries it."""
    if f is None:
        return ()
    inner = (getattr(x, "__code__", None) for x in _captured(f, 0) if not isinstance(x, Tensor))
    return (getattr(f, "__code__", f), *inner)


def _captured(f: Callable, depth: int) -> Iterator[object]:
    for cell in getattr(f, "__closure__", None) or ():
        try:
            held = cell.cell_contents
        except ValueError:  # a cell that was never filled
            continue
        if isinstance(held, Tensor):
            yield held
        elif callable(held) and hasattr(held, "__code__") and depth < 8:
            yield held
            yield from _captured(held, depth + 1)
