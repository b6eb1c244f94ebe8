"""What decides the result of a mask_mod, where all of it can be watched: else it counts as changed at every call.

Python code can read anything, so no list of what to look at is complete. The rule here is the other way round: a short
list of kinds whose every change shows. Whatever is not on it, an object with attributes for one, can't be watched.
"""

from __future__ import annotations

import builtins
import dis
import functools
import math
import operator
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

_TENSORS = (Tensor, Parameter)
_CONSTANTS = (int, bool, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, range)
_BUILTINS = frozenset(
    "abs all any bool complex divmod enumerate filter float int len list map max min pow range reversed round slice "
    "sorted sum tuple zip".split()
)
_MODULES = (math, operator)  # of pure functions
_REFUSED_OPERATIONS = ("IMPORT_NAME", "LOAD_NAME", "LOAD_BUILD_CLASS", "STORE_GLOBAL", "DELETE_GLOBAL")
_REFUSED_ATTRIBUTES = ("grad", "numpy", "data")  # of tensors, that change or let change without a new version
_HEAP_TYPE = 1 << 9  # of type.__flags__: a class whose attributes can be assigned


class _CannotWatchError(Exception):
    pass


def watched_values(f: Any) -> tuple | None:
    """Everything but its arguments that decides what ``f`` returns, in order; None where something can't be watched.

    Watched are tensors and numbers, strings and None in closures, defaults, globals and modules' attributes; in tuples,
    lists, dicts and partials; Python functions of such; pure builtins, and PyTorch's operators, with the default dtype.
    """
    found: list = [torch.get_default_dtype()]
    try:
        _watch(f, frozenset(), found, set())
    except _CannotWatchError:
        return None
    return tuple(found)


def tell_changes(tensors: list[Tensor]) -> bool:
    """Whether these tensors count what is written to them: not inference tensors, nor memory that others own.

    Nothing counts writes through ``.data`` or a NumPy view that was taken of a tensor.
    """
    return all(type(x) in _TENSORS and not x.is_inference() and x.untyped_storage().resizable() for x in tensors)


def state_of(values: tuple) -> tuple:
    """What tells whether any of these values changed; compare while the tensors are alive."""
    return tuple(_state(x) for x in values)


def _state(x: object) -> object:
    if isinstance(x, Tensor):
        return id(x), x._version, x.data_ptr()
    return type(x), repr(x) if isinstance(x, float | complex) else x  # 1 == 1.0 == True, 0.0 == -0.0, nan != nan


def _watch(x: Any, names: frozenset[str], found: list, seen: set[int]) -> None:
    """Add what ``x`` holds to ``found``; of modules and classes what the code that holds it calls ``names``."""
    kind = type(x)
    if kind in _CONSTANTS:
        found.append(x)
    elif kind in _TENSORS:
        if x.__dict__:
            raise _CannotWatchError
        found.append(x)
    elif id(x) in seen:
        return
    elif kind is FunctionType:
        seen.add(id(x))
        _watch_function(x, found, seen)
    elif kind in (tuple, list, dict, functools.partial):
        seen.add(id(x))
        found.append((kind, len(x)) if kind is not functools.partial else kind)
        for inner in _items(x):
            _watch(inner, names, found, seen)
    elif kind is ModuleType:
        for name in sorted(names & x.__dict__.keys()):
            _watch(x.__dict__[name], names, found, seen)
        if "__getattr__" in x.__dict__ and x is not torch and not names <= x.__dict__.keys():
            raise _CannotWatchError
    elif _is_pure(x):
        found.append(x)
    else:
        raise _CannotWatchError


def _items(x: Any) -> tuple:
    if isinstance(x, dict):
        return (*x.keys(), *x.values())
    if isinstance(x, functools.partial):
        if x.__dict__:
            raise _CannotWatchError
        return x.func, x.args, x.keywords
    return tuple(x)


def _watch_function(f: FunctionType, found: list, seen: set[int]) -> None:
    fine, loaded, names = _facts(f.__code__)
    if not fine or f.__dict__:
        raise _CannotWatchError
    found.append(f.__code__)
    for cell in f.__closure__ or ():
        try:
            held = cell.cell_contents
        except ValueError:  # a cell that was never filled
            raise _CannotWatchError from None
        _watch(held, names, found, seen)
    for held in (f.__defaults__, f.__kwdefaults__):
        if held is not None:
            _watch(held, names, found, seen)
    for name in loaded:
        if name in f.__globals__:
            _watch(f.__globals__[name], names, found, seen)
        elif name not in _BUILTINS:
            raise _CannotWatchError
        else:
            found.append(getattr(builtins, name))


def _is_pure(x: Any) -> bool:
    if isinstance(x, BuiltinFunctionType):
        return x.__self__ in _MODULES or getattr(torch._C._VariableFunctions, x.__name__, None) is x
    return isinstance(x, type) and not x.__flags__ & _HEAP_TYPE


@functools.lru_cache(maxsize=1024)
def _facts(code: CodeType) -> tuple[bool, tuple[str, ...], frozenset[str]]:
    """Of the code and of functions written inside it: whether it can be watched, its globals, its attributes."""
    steps = list(dis.get_instructions(code))
    loaded = {step.argval for step in steps if step.opname == "LOAD_GLOBAL"}
    names = {step.argval for step in steps if step.opname in ("LOAD_ATTR", "LOAD_METHOD")}
    fine = not any(step.opname in _REFUSED_OPERATIONS for step in steps)
    fine = fine and not any(name.startswith("_") or name in _REFUSED_ATTRIBUTES for name in names)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            inner_fine, inner_loaded, inner_names = _facts(inner)
            fine, loaded, names = fine and inner_fine, loaded | {*inner_loaded}, names | inner_names
    return fine, tuple(sorted(loaded)), frozenset(names)
