"""What a layout means, token by token: the dense mask, its block classes and where each row stands."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask

EMPTY, PARTIAL, FULL = 0, 1, 2


@dataclass(frozen=True)
class RowPlace:
    """Where query block I of one batch row stands: its own key blocks, its TPD position and prompt length."""

    own_lo: int
    own_hi: int
    position: int
    prompt_blocks: int


def pair(block_size: int | tuple[int, int]) -> tuple[int, int]:
    """(query, key) block sizes of an int or a pair."""
    return (block_size, block_size) if isinstance(block_size, int) else (block_size[0], block_size[1])


def blocks(length: int, size: int) -> int:
    """Blocks of ``size`` that cover ``length`` tokens."""
    return -(-length // size)


def per_row(value: int | Tensor | None, B: int, default: int) -> list[int]:
    """An int, a (B,) or (1,) tensor or None, as B Python ints."""
    if value is None:
        return [default] * B
    if isinstance(value, Tensor):
        values = [int(x) for x in value.reshape(-1)]
        return values * B if len(values) == 1 else values
    return [int(value)] * B


def token_mask(
    layout: Any,
    B: int,
    H: int,
    Lq: int,
    Lk: int,
    q_offset: int | Tensor = 0,
    kv_len: int | Tensor | None = None,
) -> Tensor:
    """Which query may attend to which key.

    Args:
        layout: any object of :mod:`stem_flex.layout`, or None for causal.
        q_offset: position of the first query, int or (B,).
        kv_len: valid keys, int or (B,); default all Lk.

    Returns:
        (B, H, Lq, Lk) bool, True = attend.
    """
    offset, keys = per_row(q_offset, B, 0), per_row(kv_len, B, Lk)
    mask = torch.zeros(B, H, Lq, Lk, dtype=torch.bool, device="cpu")
    for b in range(B):
        p = torch.arange(Lq, device="cpu")[:, None] + offset[b]
        j = torch.arange(Lk, device="cpu")[None, :]
        mask[b] = _layout_mask(layout, b, p, j, (B, H, Lq, Lk), keys[b]) & (j < keys[b])
    return mask


def _layout_mask(layout: Any, b: int, p: Tensor, j: Tensor, sizes: tuple, keys: int) -> Tensor:
    """(H or 1, Lq, Lk) bool of batch row b; p (Lq, 1) query positions, j (1, Lk) key positions."""
    everything = torch.ones(1, p.shape[0], j.shape[1], dtype=torch.bool, device="cpu")
    match _kind(layout):
        case "Causal":
            return everything & (p >= j)
        case "Full":
            return everything
        case "SlidingWindow":
            return everything & (p >= j) & (p - layout.window < j)
        case "Prefix":
            return everything & ((j < per_row(layout.length, b + 1, 0)[b]) | (p >= j))
        case "Documents":
            doc_of = {t: d for d, (lo, hi) in enumerate(document_ranges(layout, b)) for t in range(lo, hi)}
            at = _integers([doc_of.get(int(x), -1) for x in p.reshape(-1)])[:, None]
            key = _integers([doc_of.get(int(x), -2) for x in j.reshape(-1)])[None, :]
            return everything & (at == key) & ((p >= j) | (not layout.causal))
        case "Padding":
            start, end = padding_range(layout, b, keys)
            inside = (p >= start) & (p < end) & (j >= start) & (j < end)
            return everything & inside & ((p >= j) | (not layout.causal))
        case "MaskMod":
            return create_mask(layout.f, *sizes, device="cpu")[b]
        case "FromBlockMask":
            dense = dense_mask(layout.block_mask)
            return dense[b if dense.shape[0] > 1 else 0]
        case "And":
            left = _layout_mask(layout.left, b, p, j, sizes, keys)
            return left & _layout_mask(layout.right, b, p, j, sizes, keys)
        case kind:
            raise TypeError(f"layout must be an object of stem_flex.layout, got {kind}")


def _integers(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def _kind(layout: Any) -> str:
    return "Causal" if layout is None else type(layout).__name__


def leaves(layout: Any) -> list:
    """The layouts an intersection is made of, left to right."""
    return leaves(layout.left) + leaves(layout.right) if _kind(layout) == "And" else [layout]


def document_ranges(layout: Any, b: int) -> list[tuple[int, int]]:
    """[start, end) of every document of batch row b."""
    if layout.cu_seqlens is not None:
        cu = layout.cu_seqlens
        edges = [int(x) for x in (cu if cu.dim() == 1 else cu[b if cu.shape[0] > 1 else 0])]
        return [(lo, hi) for lo, hi in pairwise(edges) if hi > lo]
    ids = layout.ids if layout.ids.dim() == 1 else layout.ids[b if layout.ids.shape[0] > 1 else 0]
    ranges, start = [], 0
    length = len(ids)
    for t in range(1, length + 1):
        if t == length or int(ids[t]) != int(ids[start]):
            ranges.append((start, t))
            start = t
    return ranges


def padding_range(layout: Any, b: int, keys: int) -> tuple[int, int]:
    """[start, end) of the valid tokens of batch row b, of ``keys`` filled key slots."""
    length = per_row(layout.lengths, b + 1, 0)[b]
    return (keys - length, keys) if layout.side == "left" else (0, length)


def valid_range(layout: Any, b: int, Lk: int, kv_len: int | Tensor | None = None) -> tuple[int, int]:
    """[start, end) of the keys that are neither padding nor past ``kv_len``, of batch row b."""
    keys = per_row(kv_len, b + 1, Lk)[b]
    start, end = 0, keys
    for lo, hi in token_ranges(layout, b, keys):
        start, end = max(start, lo), min(end, hi)
    return start, end


def token_ranges(layout: Any, b: int, keys: int) -> list[tuple[int, int]]:
    """[start, end) of the real tokens by each layout that tells: padding, documents."""
    ranges = []
    for leaf in leaves(layout):
        if _kind(leaf) == "Padding":
            ranges.append(padding_range(leaf, b, keys))
        if _kind(leaf) == "Documents":
            ranges.append((0, max((hi for _, hi in document_ranges(leaf, b)), default=0)))
    return ranges


def query_range(layout: Any, b: int, Lk: int, offset: int, Lq: int, kv_len: int | Tensor | None) -> tuple[int, int]:
    """[start, end) of the LOCAL query indices that are not padding, of batch row b."""
    first, last = 0, Lq
    for start, end in token_ranges(layout, b, per_row(kv_len, b + 1, Lk)[b]):
        first, last = max(first, start - offset), min(last, end - offset)
    return min(first, Lq), max(last, 0)


def row_places(
    layout: Any,
    b: int,
    Lq: int,
    Lk: int,
    block_size: tuple[int, int],
    q_offset: int | Tensor = 0,
    kv_len: int | Tensor | None = None,
    prompt_len: int | Tensor | None = None,
) -> list[RowPlace]:
    """Own key blocks, TPD position and prompt length of every query block of batch row b."""
    BQ, BK = block_size
    offset = per_row(q_offset, b + 1, 0)[b]
    first, last = query_range(layout, b, Lk, offset, Lq, kv_len)
    Kb, places = blocks(Lk, BK), []
    for block in range(blocks(Lq, BQ)):
        queries = [i for i in range(block * BQ, min((block + 1) * BQ, Lq)) if first <= i < last]
        if not queries:
            places.append(RowPlace(0, 0, 0, 1))
            continue
        p = [offset + i for i in queries]
        own_lo, own_hi = min(p[0] // BK, Kb), min(p[-1] // BK + 1, Kb)
        start, end = prompt_segment(layout, b, p[0], Lq, Lk, offset, kv_len, prompt_len)
        n = (end - 1) // BK - start // BK + 1 if end > start else 1
        position = min(max(own_hi - 1 - start // BK, 0), n - 1)
        places.append(RowPlace(own_lo, own_hi, position, n))
    return places


def prompt_segment(
    layout: Any,
    b: int,
    p: int,
    Lq: int,
    Lk: int,
    offset: int,
    kv_len: int | Tensor | None,
    prompt_len: int | Tensor | None,
) -> tuple[int, int]:
    """[start, end) of the prompt of position p: its document, else the unpadded row, else everything."""
    keys = per_row(kv_len, b + 1, Lk)[b]
    found, in_document = [(0, math.inf)], False
    for leaf in leaves(layout):
        if _kind(leaf) == "Padding":
            found.append(padding_range(leaf, b, keys))
        if _kind(leaf) == "Documents":
            found += [(lo, hi) for lo, hi in document_ranges(leaf, b) if lo <= p < hi]
            in_document = True
    start, end = max(lo for lo, _ in found), min(hi for _, hi in found)
    if prompt_len is not None:
        return start, start + per_row(prompt_len, b + 1, 0)[b]
    if in_document:
        return start, int(end)
    return start, int(min(end if len(found) > 1 else keys, offset + Lq))


def block_classes(mask: Tensor, block_size: int | tuple[int, int]) -> Tensor:
    """Block-pair classes of a dense mask, by the rule of torch's create_block_mask.

    Args:
        mask: (..., Lq, Lk) bool.

    Returns:
        (..., Qb, Kb) int8: 0 nothing allowed, 1 some, 2 every pair. Tokens past Lq or Lk count as not
        allowed, so the blocks at a ragged edge are never full.
    """
    BQ, BK = pair(block_size)
    Lq, Lk = mask.shape[-2:]
    classes = torch.zeros(*mask.shape[:-2], blocks(Lq, BQ), blocks(Lk, BK), dtype=torch.int8, device="cpu")
    for i in range(classes.shape[-2]):
        for j in range(classes.shape[-1]):
            cells = mask[..., i * BQ : (i + 1) * BQ, j * BK : (j + 1) * BK]
            count = cells.sum(dim=(-2, -1))
            classes[..., i, j] = (count > 0).to(torch.int8) + (count == BQ * BK).to(torch.int8)
    return classes


def dense_blocks(block_mask: BlockMask) -> tuple[Tensor, Tensor]:
    """The (partial, full) block lists as bool (B, H, Qb, Kb), whatever the tables' width."""
    Kb = blocks(block_mask.seq_lengths[1], pair(block_mask.BLOCK_SIZE)[1])
    lists = []
    for counts, indices in (
        (block_mask.kv_num_blocks, block_mask.kv_indices),
        (block_mask.full_kv_num_blocks, block_mask.full_kv_indices),
    ):
        B, H, Qb = block_mask.kv_num_blocks.shape
        kept = torch.zeros(B, H, Qb, Kb, dtype=torch.bool, device="cpu")
        if counts is not None and indices is not None:
            for b in range(B):
                for h in range(H):
                    for i in range(Qb):
                        row = indices[b, h, i, : int(counts[b, h, i])].long().cpu()
                        kept[b, h, i, row] = True
        lists.append(kept)
    return lists[0], lists[1]


def dense_mask(block_mask: BlockMask) -> Tensor:
    """Token mask (B, H, Lq, Lk) of a BlockMask: its lists AND, in partial blocks, its mask_mod."""
    partial, full = dense_blocks(block_mask)
    (BQ, BK), (Lq, Lk) = pair(block_mask.BLOCK_SIZE), block_mask.seq_lengths
    B, H = partial.shape[:2]

    def tokens(kept: Tensor) -> Tensor:
        return kept.repeat_interleave(BQ, -2)[..., :Lq, :].repeat_interleave(BK, -1)[..., :Lk]

    device = block_mask.kv_indices.device
    allowed = create_mask(block_mask.mask_mod, B, H, Lq, Lk, device=device).cpu()
    return (tokens(partial) & allowed) | tokens(full)
