"""torch.compile of one function for many kinds of call, where running eagerly is an error."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Hashable

import torch


def compiled(f: types.FunctionType, kind: Hashable) -> Callable:
    """``f`` compiled whole, separately for each ``kind``.

    TorchDynamo counts recompilations by code object. A copy of the code for each kind leaves its limit to what
    varies within a kind: the first length compiles for itself, the second for all others.

    Raises (when called):
        RuntimeError: the recompile limit was met. Dynamo would run eagerly if it were not for ``fullgraph``.
    """
    return _compiled(f, kind)


@functools.cache
def _compiled(f: types.FunctionType, kind: Hashable) -> Callable:
    copy = types.FunctionType(f.__code__.replace(co_name=f"{f.__name__}_"), f.__globals__, f.__name__, f.__defaults__)
    run = torch.compile(copy, fullgraph=True)

    @functools.wraps(f)
    def call(*args):
        try:
            return run(*args)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise RuntimeError(
                "flex_attention met more variants of one kind of call than torch._dynamo.config.recompile_limit "
                f"({torch._dynamo.config.recompile_limit}) and would run eagerly, which is dense; pass the same "
                "mask_mod and score_mod functions each time, with what changes in tensors, or raise the limit"
            ) from error

    return call
