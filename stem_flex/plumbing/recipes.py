"""How the mask_mods of this package were made, for they are closures, which no pickle holds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any, ParamSpec
from weakref import WeakKeyDictionary

import torch

P = ParamSpec("P")


class Recipe:
    """A maker, decorated by :func:`with_recipe`, and what it was given."""

    def __init__(self, maker: Callable[..., Callable], args: tuple):
        self.maker, self.args = maker, args
        self._made: Callable | None = None

    def make(self) -> Callable:
        """The function; always the same one, so that what was one before pickling is one after it."""
        if self._made is None:
            self._made = self.maker(*(unpacked(x) for x in self.args))
        return self._made

    def __reduce__(self) -> tuple:
        return Recipe, (self.maker, tuple(packed(x) for x in self.args))


_recipes: WeakKeyDictionary[Callable, Recipe] = WeakKeyDictionary()


def with_recipe(maker: Callable[P, Callable]) -> Callable[P, Callable]:
    """``maker(*args)``, a function of a module that returns a closure of ``args``, which then can be pickled."""

    @functools.wraps(maker)
    def make(*args: P.args, **kwargs: P.kwargs) -> Callable:
        made = maker(*args, **kwargs)
        if not torch.compiler.is_compiling():
            assert not kwargs
            _recipes[made] = Recipe(make, args)
        return made

    return make


def packed(value: Any) -> Any:
    """``value``, or the :class:`Recipe` of a function that has one."""
    return _recipes.get(value, value) if isinstance(value, FunctionType) else value


def unpacked(value: Any) -> Any:
    """What :func:`packed` was given, or its copy."""
    return value.make() if isinstance(value, Recipe) else value


class Picklable:
    """Pickles and deep copies hold mask_mods by recipe, and nothing that is only remembered."""

    _remembered = ("_memo", "memo")  # these start anew

    def __copy__(self) -> Any:
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {name: packed(value) for name, value in self.__dict__.items() if name not in self._remembered}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({name: unpacked(value) for name, value in state.items()})
