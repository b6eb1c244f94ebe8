"""Correctness of what a benchmark is about to time, on sampled rows, in float32, without the kernels."""

from __future__ import annotations

import math

import torch
from torch.nn.attention.flex_attention import BlockMask


def sample_rows(heads: int, length: int, count: int) -> list[tuple[int, int]]:
    """``count`` (head, query) pairs: first and last query, block edges, the rest drawn with a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(length, (count,), generator=generator).tolist()
    fixed = [0, length - 1, min(127, length - 1), min(128, length - 1)]
    return [(index % heads, row) for index, row in enumerate((fixed + drawn)[:count])]


def kept_keys(block_mask: BlockMask, head: int, row: int) -> torch.Tensor:
    """Keys (int64, ascending) that query ``row`` of ``head``, batch row 0, attends to.

    Reads the tables and applies mask_mod to the partial blocks, as flex_attention's kernels are meant to.
    """
    block_q, block_k = block_mask.BLOCK_SIZE
    keys = block_mask.seq_lengths[1]
    h = min(head, block_mask.kv_num_blocks.shape[1] - 1)
    place = (0, h, row // block_q)
    device = block_mask.kv_indices.device

    def tokens(counts: torch.Tensor | None, indices: torch.Tensor | None) -> torch.Tensor:
        if counts is None or indices is None:
            return torch.empty(0, dtype=torch.int64, device=device)
        blocks = indices[place][: int(counts[place])].long()
        found = (blocks[:, None] * block_k + torch.arange(block_k, device=device)).flatten()
        return found[found < keys]

    partial = tokens(block_mask.kv_num_blocks, block_mask.kv_indices)
    at = [torch.full_like(partial, index) for index in (0, head, row)]
    partial = partial[block_mask.mask_mod(*at, partial)] if len(partial) else partial
    full = tokens(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    return torch.cat([partial, full]).sort().values


def sampled_error(
    output: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_mask: BlockMask | None,
    *,
    count: int = 24,
) -> float:
    """Largest relative L2 error of sampled rows of ``output`` (1, Hq, L, Dv) against a float32 gather.

    ``block_mask=None`` means dense causal attention. Each sampled row gathers its keys and values and does
    one softmax in float32.
    """
    group = q.shape[1] // k.shape[1]
    worst = 0.0
    for head, row in sample_rows(q.shape[1], q.shape[2], count):
        if block_mask is None:
            chosen = slice(0, row + 1)
        else:
            chosen = kept_keys(block_mask, head, row)
        keys, values = (x[0, head // group][chosen].float() for x in (k, v))
        weights = torch.softmax(keys @ q[0, head, row].float() / math.sqrt(q.shape[-1]), dim=0)
        exact = weights @ values
        error = (output[0, head, row].float() - exact).norm() / exact.norm().clamp_min(1e-20)
        worst = max(worst, float(error)) if not math.isnan(float(error)) else math.nan
        if math.isnan(worst):
            return worst
    return worst


def computed_pairs(block_mask: BlockMask) -> int:
    """Query-key pairs in the kept blocks of all heads of one batch row, blocks counted whole."""
    block_q, block_k = block_mask.BLOCK_SIZE
    blocks = int(block_mask.kv_num_blocks.sum())
    if block_mask.full_kv_num_blocks is not None:
        blocks += int(block_mask.full_kv_num_blocks.sum())
    return blocks * block_q * block_k


def same_selection(first: BlockMask, second: BlockMask, scores: torch.Tensor | None, tolerance: float) -> dict:
    """Compare two masks of one block row per (batch, head), table by table.

    Returns the share of kept blocks that differ, and, given ``scores`` (B, H, Qb, Kb) float32, the largest
    score by which a block of one mask beats what it replaced in the other: rounding may swap near ties only.
    ``ok`` is False where that gap exceeds ``tolerance``, or more than a fiftieth of the blocks differ. Counts may
    differ by a near tie of a forced block with another: the forced one is kept either way.
    """
    one, two = (_keep(mask) for mask in (first, second))
    counts = bool((one.sum(-1) == two.sum(-1)).all())
    differ = one != two
    share = float(differ.sum()) / max(1.0, 2.0 * float(one.sum()))
    gap = 0.0
    if scores is not None and bool(differ.any()):
        low = scores.masked_fill(~differ, torch.inf).amin(-1)
        high = scores.masked_fill(~differ, -torch.inf).amax(-1)
        gap = float((high - low).clamp_min(0).max())
    return {"equal_counts": counts, "differing": share, "largest_gap": gap, "ok": gap <= tolerance and share <= 0.02}


def _keep(block_mask: BlockMask) -> torch.Tensor:
    """Bool (B, H, Qb, Kb) of kept blocks, from the tables alone."""
    blocks = -(-block_mask.seq_lengths[1] // block_mask.BLOCK_SIZE[1])

    def dense(counts: torch.Tensor | None, indices: torch.Tensor | None) -> torch.Tensor | None:
        if counts is None or indices is None:
            return None
        width = min(indices.shape[-1], int(counts.max()))
        index = indices[..., :width].long()
        live = torch.arange(width, device=index.device) < counts[..., None]
        grid = torch.zeros(*counts.shape, blocks + 1, dtype=torch.bool, device=index.device)
        return grid.scatter_(-1, torch.where(live, index, blocks), True)[..., :blocks]

    partial = dense(block_mask.kv_num_blocks, block_mask.kv_indices)
    full = dense(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    assert partial is not None
    return partial if full is None else partial | full
