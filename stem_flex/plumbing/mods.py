"""The mask_mods of bound layouts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stem_flex.plumbing.compiled import apart
from stem_flex.plumbing.geometry import Geometry, Spans
from stem_flex.plumbing.recipes import with_recipe

MaskModFn = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_WIDEST_BLOCK = 2**14  # tables reach as far as any block or tile that lengths are rounded up to


def causal_mask(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    """mask_mod of plain causal attention."""
    return q >= kv


def interval_mod(plain_causal: bool, geometry: Geometry, spans: Spans) -> MaskModFn:
    """mask_mod of one interval of keys for each query; of plain causal ones at offset 0 :func:`causal_mask`."""
    if plain_causal and geometry.kv_len is None and isinstance(geometry.q_offset, int) and geometry.q_offset == 0:
        return causal_mask
    start, end = apart(*(x.contiguous() for x in torch.broadcast_tensors(*spans)))
    return _one_interval(start[0], end[0]) if start.shape[0] == 1 else _interval_by_row(start, end)


@with_recipe
def _one_interval(start: Tensor, end: Tensor) -> MaskModFn:
    def interval_mask(b, h, q, kv):
        return (kv >= start[q]) & (kv < end[q])

    return interval_mask


@with_recipe
def _interval_by_row(start: Tensor, end: Tensor) -> MaskModFn:
    def interval_mask_by_row(b, h, q, kv):
        return (kv >= start[b, q]) & (kv < end[b, q])

    return interval_mask_by_row


@with_recipe
def below(length: int, device: torch.device, block: int = 1) -> Callable[[Tensor], Tensor]:
    """Cuts the token indices that a mask_mod is asked for, rounded up to whole blocks, to the last, ``length`` - 1.

    With ``block`` the index of the token's block. On CUDA by a table, a gather for each pair of a partial block: FLASH
    takes no numbers that vary from call to call, and a mask does not know who will run it.
    """
    last = length - 1
    if device.type != "cuda":
        return lambda index: index.clamp(max=last) // block
    # A mask of narrower blocks may be composed with one of wider ones.
    rounded = -(-length // _WIDEST_BLOCK) * _WIDEST_BLOCK
    table = torch.arange(rounded, dtype=torch.int32, device=device).clamp(max=last) // block
    return lambda index: table[index]


@with_recipe
def of_blocks(table: Tensor, lengths: tuple[int, int], block_size: tuple[int, int]) -> MaskModFn:
    """The entry of ``table``, (B or 1, H or 1, Qb, Kb), for the blocks of a query and a key, also past the lengths."""
    row, column = (below(n, table.device, block) for n, block in zip(lengths, block_size, strict=True))
    # FLASH takes no constants for indices, so what is the same for all rows or heads loses that dimension.
    batch, heads = (size > 1 for size in table.shape[:2])
    table = table[slice(None) if batch else 0]
    table = table.select(-3, 0) if not heads else table

    def of_pair(b, h, q, kv):
        return table[row(q), column(kv)]

    def of_head(b, h, q, kv):
        return table[h, row(q), column(kv)]

    def of_batch_row(b, h, q, kv):
        return table[b, row(q), column(kv)]

    def of_both(b, h, q, kv):
        return table[b, h, row(q), column(kv)]

    if batch:  # sizes may be symbols, which index nothing
        return of_both if heads else of_batch_row
    return of_head if heads else of_pair


@with_recipe
def shifted(mod: MaskModFn, start: int, length: int, whole: int, device: torch.device) -> MaskModFn:
    """``mod`` of ``whole`` queries for those of them from ``start`` on, of which there are ``length``."""
    rounded = -(-length // _WIDEST_BLOCK) * _WIDEST_BLOCK
    query = (torch.arange(rounded, dtype=torch.int32, device=device) + start).clamp(max=whole - 1)

    def shifted_mask(b, h, q, kv):
        return mod(b, h, query[q], kv)

    return shifted_mask


def inside(mod: MaskModFn, geometry: Geometry) -> MaskModFn:
    """``mod`` that is never asked past the lengths."""
    if geometry.q_len % geometry.q_block == 0 and geometry.k_len % geometry.k_block == 0:
        return mod
    return _inside(mod, below(geometry.q_len, geometry.device), below(geometry.k_len, geometry.device))


@with_recipe
def _inside(mod: MaskModFn, real_q: Callable, real_k: Callable) -> MaskModFn:
    def inside_mask(b, h, q, kv):
        return mod(b, h, real_q(q), real_k(kv))

    return inside_mask


def all_of(mods: list[MaskModFn]) -> MaskModFn:
    """The intersection of ``mods``."""
    first, *rest = mods
    return _both(first, all_of(rest)) if rest else first


@with_recipe
def _both(first: MaskModFn, second: MaskModFn) -> MaskModFn:
    def both(b, h, q, kv):
        return first(b, h, q, kv) & second(b, h, q, kv)

    return both
