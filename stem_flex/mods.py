"""The mask_mods of bound layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stem_flex.geometry import Geometry

if TYPE_CHECKING:
    from stem_flex.binding import Spans
    from stem_flex.layout import Layout

MaskModFn = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def causal_mask(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    """mask_mod of plain causal attention."""
    return q >= kv


def interval_mod(parts: tuple[Layout, ...], geometry: Geometry, spans: Spans) -> MaskModFn:
    """mask_mod of one interval of keys for each query."""
    plain = all(part.plain_causal for part in parts) and geometry.kv_len is None
    if plain and isinstance(geometry.q_offset, int) and geometry.q_offset == 0:
        return causal_mask
    start, end = (x.contiguous() for x in torch.broadcast_tensors(*spans))
    if start.shape[0] == 1:
        start, end = start[0], end[0]

        def interval_mask(b, h, q, kv):
            return (kv >= start[q]) & (kv < end[q])

        return interval_mask

    def interval_mask_by_row(b, h, q, kv):
        return (kv >= start[b, q]) & (kv < end[b, q])

    return interval_mask_by_row


def inside(mod: MaskModFn, geometry: Geometry) -> MaskModFn:
    """``mod`` that is never asked past the lengths, which flex_attention rounds up to whole blocks."""
    last_q, last_k = geometry.q_len - 1, geometry.k_len - 1
    if (last_q + 1) % geometry.q_block == 0 and (last_k + 1) % geometry.k_block == 0:
        return mod
    if geometry.device.type == "cuda":  # FLASH takes no numbers that vary from call to call
        real_q, real_k = (
            torch.arange((blocks + 1) * block, dtype=torch.int32, device=geometry.device).clamp(max=last)
            for blocks, block, last in (
                (geometry.q_blocks, geometry.q_block, last_q),
                (geometry.k_blocks, geometry.k_block, last_k),
            )
        )

        def inside_by_table(b, h, q, kv):
            return mod(b, h, real_q[q], real_k[kv])

        return inside_by_table

    def inside_by_clamp(b, h, q, kv):
        return mod(b, h, q.clamp(max=last_q), kv.clamp(max=last_k))

    return inside_by_clamp


def all_of(mods: list[MaskModFn]) -> MaskModFn:
    """The intersection of ``mods``."""
    first, *rest = mods
    if not rest:
        return first
    second = all_of(rest)

    def both(b, h, q, kv):
        return first(b, h, q, kv) & second(b, h, q, kv)

    return both
