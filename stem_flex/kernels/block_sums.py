"""Every query against the mean key of each block: logarithm of each row's sums, one program for a row of query blocks.

Axes: a program holds BLOCK_Q queries of one head and walks over the key blocks that some of them may see, TILE mean
keys at a time: one product, then maximum and sum over the queries, and two numbers fewer than it read are written.
128K tokens, 32 heads of 128: 0.55 TFLOP, 67 MB written; PyTorch alone moves some 60 GB.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def _block_sums_kernel(
    q, keys, start, end, first, last, lo, hi, out,
    q_batch, q_head, q_row, k_batch, k_head, span_batch, block_batch, row_batch,
    q_heads, group, q_len, q_blocks, k_blocks, scale,
    BLOCK_Q: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    row = q_blocks - 1 - tl.program_id(0)  # the longest rows first
    head = tl.program_id(1)
    batch, local = head // q_heads, head % q_heads
    q += batch.to(tl.int64) * q_batch + local.to(tl.int64) * q_head
    keys += batch.to(tl.int64) * k_batch + (local // group).to(tl.int64) * k_head
    queries = row * BLOCK_Q + tl.arange(0, BLOCK_Q)
    dims = tl.arange(0, D)
    within = dims < DIM
    real = queries < q_len
    tile = tl.load(
        q + queries[:, None].to(tl.int64) * q_row + dims[None, :], mask=real[:, None] & within[None, :], other=0.0
    )
    from_key = tl.load(start + batch * span_batch + queries)
    to_key = tl.load(end + batch * span_batch + queries)
    begin = tl.load(lo + batch * row_batch + row) // TILE * TILE
    stop = tl.load(hi + batch * row_batch + row)
    out += (head.to(tl.int64) * q_blocks + row) * k_blocks
    for j in range(begin, stop, TILE):
        blocks = j + tl.arange(0, TILE)
        inside = blocks < k_blocks
        other = tl.load(keys + blocks[None, :].to(tl.int64) * DIM + dims[:, None],
                        mask=inside[None, :] & within[:, None], other=0.0)  # fmt: skip
        logits = tl.dot(tile, other, input_precision="ieee") * scale
        opens = tl.load(first + batch * block_batch + blocks, mask=inside, other=0)
        closes = tl.load(last + batch * block_batch + blocks, mask=inside, other=2147483647)
        seen = (from_key[:, None] <= opens[None, :]) & (to_key[:, None] >= closes[None, :]) & real[:, None]
        logits = tl.where(seen, logits, float("-inf"))
        highest = tl.max(logits, 0)
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        total = tl.sum(tl.exp2(logits - shift[None, :]), 0)
        tl.store(out + blocks, (shift + tl.log2(total)) * 0.6931471805599453, mask=inside)


def block_sums_kernel(
    q: Tensor, keys: Tensor, spans: tuple[Tensor, Tensor], blocks: tuple[Tensor, Tensor], lo: Tensor, hi: Tensor,
    q_block: int,
) -> Tensor:  # fmt: skip
    """ln of the sum over a row's queries of exp(q key / sqrt(D)), float32 (B, Hq, Qb, Kb); -inf where none counts.

    Args:
        q: (B, Hq, Lq, D), float16, bfloat16 or float32, unit stride in its last dimension.
        keys: (B, Hkv, Kb, D), mean keys of q's dtype.
        spans: first key and one past the last of each query, int32 (1 or B, Qb * q_block).
        blocks: first key and one past the last of each block, int32 (1 or B, Kb): a query counts that sees all.
        lo, hi: key blocks [lo, hi) that a row may see some of, int32 (1 or B, Qb).
        q_block: queries of a row.

    Raises:
        TypeError: another dtype.
    """
    if q.dtype not in _DTYPES or keys.dtype != q.dtype:
        raise TypeError(
            f"q and k must share a dtype of float16, bfloat16, float32 for Triton, got {q.dtype} and {keys.dtype}; "
            "cast them, or use impl='torch'"
        )
    (batch, heads, q_len, dim), k_blocks = q.shape, keys.shape[2]
    q = q if q.stride(-1) == 1 else q.contiguous()
    keys, lo, hi = keys.contiguous(), lo.contiguous(), hi.contiguous()
    start, end, first, last = (x.contiguous() for x in (*spans, *blocks))
    q_blocks = lo.shape[1]
    out = torch.full((batch, heads, q_blocks, k_blocks), float("-inf"), dtype=torch.float32, device=q.device)
    steps = [x.stride(0) if x.shape[0] > 1 else 0 for x in (start, first, lo)]
    tile = 64 if k_blocks > 16 else 16
    _block_sums_kernel[(q_blocks, batch * heads)](
        q, keys, start, end, first, last, lo, hi, out, *q.stride()[:3], *keys.stride()[:2], *steps, heads,
        heads // keys.shape[1], q_len, q_blocks, k_blocks, 1.4426950408889634 / dim**0.5, BLOCK_Q=q_block, TILE=tile,
        D=max(16, triton.next_power_of_2(dim)), DIM=dim, num_warps=8 if q_block > 64 else 4,
    )  # fmt: skip
    return out
