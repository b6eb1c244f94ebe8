"""Mass of dense causal attention on blocks, one program for each row of query blocks.

Axes: a program holds BLOCK_Q queries and walks over the keys twice, BLOCK_K at a time: first for the logarithm of
the softmax's denominator, then for the mass of every block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _block_mass_kernel(
    q, k, mean, peak,
    q_batch, q_head, q_row, k_batch, k_head, k_row,
    q_heads, group, q_len, k_len, q_blocks, k_blocks, q_offset, scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    row = q_blocks - 1 - tl.program_id(0)  # the longest rows first
    head = tl.program_id(1)
    batch, local = head // q_heads, head % q_heads
    q += batch.to(tl.int64) * q_batch + local.to(tl.int64) * q_head
    k += batch.to(tl.int64) * k_batch + (local // group).to(tl.int64) * k_head
    queries = row * BLOCK_Q + tl.arange(0, BLOCK_Q)
    dims = tl.arange(0, D)
    within = dims < DIM
    real = queries < q_len
    tile = tl.load(
        q + queries[:, None].to(tl.int64) * q_row + dims[None, :], mask=real[:, None] & within[None, :], other=0.0
    )
    positions = queries + q_offset
    last = tl.minimum((q_offset + tl.minimum((row + 1) * BLOCK_Q, q_len) - 1) // BLOCK_K + 1, k_blocks)
    highest = tl.full([BLOCK_Q], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    for j in range(0, last):
        keys = j * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = keys < k_len
        other = tl.load(k + keys[None, :].to(tl.int64) * k_row + dims[:, None],
                        mask=inside[None, :] & within[:, None], other=0.0)  # fmt: skip
        logits = tl.dot(tile, other, input_precision="ieee") * scale
        logits = tl.where((keys[None, :] <= positions[:, None]) & inside[None, :], logits, -1.0e30)
        higher = tl.maximum(highest, tl.max(logits, 1))
        total = total * tl.exp2(highest - higher) + tl.sum(tl.exp2(logits - higher[:, None]), 1)
        highest = higher
    normal = highest + tl.log2(total)
    count = tl.sum(real.to(tl.float32), 0)
    out = (head.to(tl.int64) * q_blocks + row) * k_blocks
    for j in range(0, last):
        keys = j * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = keys < k_len
        other = tl.load(k + keys[None, :].to(tl.int64) * k_row + dims[:, None],
                        mask=inside[None, :] & within[:, None], other=0.0)  # fmt: skip
        logits = tl.dot(tile, other, input_precision="ieee") * scale
        kept = (keys[None, :] <= positions[:, None]) & inside[None, :] & real[:, None]
        mass = tl.sum(tl.where(kept, tl.exp2(logits - normal[:, None]), 0.0), 1)
        tl.store(mean + out + j, tl.sum(mass, 0) / count)
        tl.store(peak + out + j, tl.max(mass, 0))


def block_mass_kernel(
    q: Tensor, k: Tensor, block: tuple[int, int], q_offset: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Mean and largest mass of each block, float32 (B, Hq, Qb, Kb); see `stem_flex.selectors.oracle.block_mass`."""
    batch, heads, q_len, dim = q.shape
    k_len, (q_block, k_block) = k.shape[2], block
    q_blocks, k_blocks = -(-q_len // q_block), -(-k_len // k_block)
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    mean = torch.zeros(batch, heads, q_blocks, k_blocks, dtype=torch.float32, device=q.device)
    peak = torch.zeros_like(mean)
    _block_mass_kernel[(q_blocks, batch * heads)](
        q, k, mean, peak, *q.stride()[:3], *k.stride()[:3], heads, heads // k.shape[1], q_len, k_len, q_blocks,
        k_blocks, q_offset, scale * 1.4426950408889634, BLOCK_Q=q_block, BLOCK_K=k_block,
        D=triton.next_power_of_2(dim), DIM=dim, num_warps=8,
    )  # fmt: skip
    return mean, peak
