"""torch.compile of one function for many kinds of call, where running eagerly is an error."""

from __future__ import annotations

import functools
import itertools
import types
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

_FIXED_SIZES = 256  # compilations of a kind of call whose sizes can't be left open
MOST_CONSTANTS = 64  # sets of numbers that a kind of call may have compiled in

_constants: Counter[Hashable] = Counter()
_number = itertools.count()


def compiled(
    f: types.FunctionType, kind: Hashable, dynamic: bool | None = None, constants: Hashable = None
) -> Callable:
    """``f`` compiled whole, separately for each ``kind`` and each value of ``constants``, what is compiled in.

    TorchDynamo counts recompilations by code object. A copy of the code for each kind leaves its limit to what
    varies within a kind. ``dynamic=None``: the first length compiles for itself, the second for all others; True:
    the first for all; False: each for itself.

    Raises:
        RuntimeError: a kind met too many values of ``constants``; or, when called, the recompile limit was met, where
            Dynamo would run eagerly if it were not for ``fullgraph``.
    """
    return _compiled(f, kind, dynamic, constants)


@functools.cache
def _compiled(f: types.FunctionType, kind: Hashable, dynamic: bool | None, constants: Hashable) -> Callable:
    name = f"{f.__name__}_"
    if constants is not None:
        # Dynamo takes a number that differs from that of a code of the same name for an input, so each gets a name.
        _constants[kind] += 1
        if _constants[kind] > MOST_CONSTANTS:
            raise RuntimeError(
                f"mask_mod and score_mod of one kind of call read more than {MOST_CONSTANTS} different numbers, each "
                "of which is compiled into code of its own; pass what changes in tensors"
            )
        name += f"{next(_number)}_"
    run = torch.compile(_copy(f, name), fullgraph=True, dynamic=dynamic)
    fixed_sizes = run if dynamic is False else None

    @functools.wraps(f)
    def call(*args):
        nonlocal fixed_sizes
        try:
            if fixed_sizes is None:
                try:
                    return run(*args)
                except RuntimeError as error:  # Inductor's, whose class would cost seconds to import
                    if "C++ compile error" not in str(error):
                        raise
                    # The C++ template replaces a symbol by its text, "ks7" inside "ks79" too, so that some masks
                    # with captured tensors compile for fixed sizes only (torch 2.11 to 2.13): one each from here.
                    fixed_sizes = torch.compile(_copy(f, name), fullgraph=True, dynamic=False)
            with torch._dynamo.config.patch(recompile_limit=_FIXED_SIZES):
                return fixed_sizes(*args)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise RuntimeError(
                "flex_attention met more variants of one kind of call than torch._dynamo.config.recompile_limit "
                f"({torch._dynamo.config.recompile_limit}) and would run eagerly, which is dense; pass the same "
                "mask_mod and score_mod functions each time, with what changes in tensors, or raise the limit"
            ) from error

    return call


def _copy(f: types.FunctionType, name: str) -> types.FunctionType:
    code = f.__code__.replace(co_name=name)
    return types.FunctionType(code, f.__globals__, f.__name__, f.__defaults__)


def to_constant(value: Any) -> Any:
    """``value`` as an argument of compiled code that stays a constant of it: ints as text.

    TorchDynamo takes an int for a size that varies and leaves it to Inductor to settle on a value. Graphs that differ
    in such an int alone are then one text and one key of its caches, told apart by guards alone.
    """
    return f"int {value}" if type(value) is int else value


def from_constant(value: Any) -> Any:
    """The value that :func:`to_constant` was given."""
    return int(value[4:]) if isinstance(value, str) and value.startswith("int ") else value


def based(*tensors: Tensor) -> tuple[Tensor, ...]:
    """``tensors``, those that begin inside their storage as tensors that begin theirs: same memory, same strides.

    Inductor takes the offset of a view for a number that varies, can then not tell that the view is aligned, and its
    Triton kernel reads such a q, k or v in small pieces: the second half of the heads, on a card of its own, took twice
    the first's time (H200, 128K tokens). Views that are not on 16 bytes stay as they are.
    """
    return tuple(_based(x) if _begins_inside(x) else x for x in tensors)


def _begins_inside(x: Tensor) -> bool:
    """A plain tensor whose memory says all there is, beginning on 16 bytes inside its storage."""
    plain = type(x) in (Tensor, torch.nn.Parameter) and not x.is_neg()
    return plain and x.storage_offset() > 0 and x.data_ptr() % 16 == 0


def _based(x: Tensor) -> Tensor:
    # DLPack hands on a pointer, without an offset; it says 1 for the stride of a dimension of one
    return torch.from_dlpack(to_dlpack(x.detach())).as_strided(x.shape, x.stride())


def apart(*tensors: Tensor) -> Sequence[Tensor]:
    """``tensors`` as buffers of their own where they are traced into one graph with flex_attention on the CPU.

    Inductor's C++ template reads buffers that are inputs of the graph or results of operators it can't see into: of two
    views of one buffer it declares only one, and what it would compute on the way it doesn't find.
    """
    if not torch.compiler.is_compiling() or tensors[0].device.type != "cpu":
        return tensors
    return _apart(list(tensors))


@torch.library.custom_op("stem_flex::apart", mutates_args=())
def _apart(views: list[Tensor]) -> list[Tensor]:
    return [view.clone(memory_format=torch.contiguous_format) for view in views]


@_apart.register_fake
def _(views):
    return [torch.empty(view.shape, dtype=view.dtype, device=view.device) for view in views]
