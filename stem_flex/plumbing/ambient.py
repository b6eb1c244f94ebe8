"""Switches of PyTorch that act from outside a call and must not reach what this package computes.

Every tensor made here says its device and dtype, so default device and default dtype can't; products whose rounding
decides a choice of blocks are taken in float64, which no switch for float32 products reaches. Autocast is left here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_DEVICES = ("cpu", "cuda")  # where this package computes

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(f: Callable[P, R]) -> Callable[P, R]:
    """``f`` with autocast off inside, whichever device it is on for; under half a microsecond where it is off."""

    @functools.wraps(f)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
            return f(*args, **kwargs)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return f(*args, **kwargs)

    return run


def refuse_transforms(*tensors: Tensor) -> None:
    """Raise ValueError where something that watches compiled flex_attention would get another function or none."""
    if _exporting():
        raise ValueError(
            "stem_attention can't be exported: an exported program runs flex_attention eagerly, which ignores block "
            "lists and attends to everything; export around it, or compile the model with torch.compile"
        )
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise ValueError(
            "stem_attention must not run inside a transform of torch.func (vmap, grad, jvp, functionalize), which "
            "can't see into compiled flex_attention; use a larger batch for vmap, autograd for grad"
        )
    if is_in_torch_dispatch_mode():  # after one try Dynamo leaves flex_attention uncompiled without the mode too
        raise ValueError(
            "stem_attention must not run inside a TorchDispatchMode (FlopCounterMode, FakeTensorMode, selective "
            "checkpointing), in which torch.compile compiles nothing; leave the mode around it"
        )
    if any(unpack_dual(x).tangent is not None for x in tensors):
        raise ValueError(
            "q, k and v must not be dual tensors: flex_attention has no forward-mode derivative; use autograd on CUDA"
        )


def _exporting() -> bool:
    # the flag behind torch.compiler.is_exporting(), which torch 2.11 traces as True in every compilation
    return getattr(torch.compiler, "_is_exporting_flag", False)


def cast_as_sdpa(q: Any, k: Any, v: Any, *, only_mixed: bool = False) -> tuple[Any, Any, Any]:
    """What scaled_dot_product_attention makes of its arguments: under autocast all are cast to its dtype, else nothing.

    float64 stays, as everywhere under autocast. With ``only_mixed`` tensors of one dtype stay too.
    """
    if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
        return q, k, v
    if not all(isinstance(x, Tensor) for x in (q, k, v)) or q.device.type not in _DEVICES:
        return q, k, v  # for the caller's checks
    if not torch.is_autocast_enabled(q.device.type) or (only_mixed and q.dtype == k.dtype == v.dtype):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    q, k, v = (x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))
    return q, k, v
