"""DTensors: heads are independent in Stem, so that each rank serves its own; other placements are refused by name."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

_F = TypeVar("_F", bound=Callable)

_FIXES = {
    0: "whose layout, lengths and budget would have to be its rows'; call it with x.to_local() and those",
    2: "which other tokens' keys are missing on; use stem_flex.distributed.context_prefill",
    3: "where logits are partial sums; redistribute to Shard(1), the heads",
}


def is_dtensor(x: object) -> bool:
    """Whether ``x`` is a DTensor, without importing what nobody imported."""
    if type(x) is Tensor:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def by_heads(f: _F) -> _F:
    """Let ``f(q, k, v, ...)`` take DTensors whose heads are spread, ``Shard(1)``, or that are whole on every rank.

    ``f`` runs on each rank's own heads. Tensors it returns become DTensors of q's placements, what else it returns
    (a BlockMask) is the rank's own. Nothing travels between ranks.
    """

    @functools.wraps(f)
    def call(q, k, v, *args, **options):
        if not (is_dtensor(q) or is_dtensor(k) or is_dtensor(v)):
            return f(q, k, v, *args, **options)
        _check(q, k, v, options)
        found = f(*(x.to_local() for x in (q, k, v)), *args, **options)
        if isinstance(found, tuple):
            return tuple(_of_ranks(x, q) for x in found)
        return _of_ranks(found, q) if isinstance(found, Tensor) else found

    return cast(_F, call)


def _of_ranks(x: Tensor, q: Any) -> Tensor:
    """The DTensor of each rank's output, (B, Hq, Lq, ...) in all, placed as q is."""
    from torch.distributed.tensor import DTensor

    shape = torch.Size((*q.shape[:3], *x.shape[3:]))
    stride = [1] * len(shape)
    for at in range(len(shape) - 2, -1, -1):
        stride[at] = stride[at + 1] * shape[at + 1]
    return DTensor.from_local(
        x.contiguous(), q.device_mesh, q.placements, run_check=False, shape=shape, stride=tuple(stride)
    )


def _check(q: Any, k: Any, v: Any, options: dict[str, Any]) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not is_dtensor(x):
            raise TypeError(f"{name} must be a DTensor as the others are, got {type(x).__name__}; or call .to_local()")
        if x.dim() != 4:
            raise ValueError(f"{name} must have shape (B, H, L, D), got {tuple(x.shape)}")
        if x.device_mesh != q.device_mesh or x.placements != q.placements:
            raise ValueError(
                f"{name} must be placed as q is, {q.placements} on {q.device_mesh}, got {x.placements} on "
                f"{x.device_mesh}; {name}.redistribute(q.device_mesh, q.placements)"
            )
    ways = 1
    for placement, size in zip(q.placements, q.device_mesh.shape, strict=True):
        if placement.is_replicate():
            continue
        if not placement.is_shard() or placement.dim % 4 != 1:
            fix = _FIXES[placement.dim % 4] if placement.is_shard() else "redistribute to Shard(1), the heads"
            raise ValueError(f"q, k and v must be spread by heads, Shard(1), or Replicate(), got {placement}: {fix}")
        ways *= size
    for name, x in (("q", q), ("k", k)):
        if x.shape[1] % ways:
            raise ValueError(
                f"{name} must have a multiple of the mesh's {ways} ranks as heads, got {x.shape[1]}; use fewer ranks, "
                "or repeat the key heads"
            )
    if ways > 1:
        _check_options(options)


def _check_options(options: dict[str, Any]) -> None:
    """What tells heads apart would take a rank's first head for the model's first."""
    layout, budget = options.get("layout"), options.get("budget")
    by_head = {
        "layout": any(part.sizes()[1] > 1 for part in getattr(layout, "parts", tuple)()),
        "budget": getattr(getattr(budget, "blocks", budget), "ndim", 0) > 1,
        "score_mod": options.get("score_mod") is not None,
    }
    for name, told in by_head.items():
        if told:
            raise ValueError(
                f"{name} must not tell heads apart where q's are spread over ranks; call it with x.to_local() and a "
                f"{name} of the rank's own heads"
            )
