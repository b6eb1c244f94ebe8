"""Logits of cells, reduced by block where they are made: for XAttention, CoSA, ProxyAttn, VecAttention and others.

A cell (a, b) is a pair of ``tokens`` queries and as many keys, its logit the product of both along the antidiagonal,

    s[a, b] = scale * sum over r of q[a tokens + tokens-1-r] . k[b tokens + r]       1 token: the logit of two tokens

for keys lo[a] <= b < hi[a]; tokens that are padding count as zeros. Two kernels, no matrix of cells in memory:

1. `_cells_kernel`: a product of (BLOCK_M, tokens D) and (tokens D, BLOCK_N), straight from q and k, and in registers
   for each row and block of ``columns`` keys log2 of the sum of exp (``sums``), the maximum (``peaks``), or both; or
   for each key log2 of the sum over ``rows`` queries, where each row's normaliser is not wanted (`query_logs`).
2. `_rows_kernel`: online, the normaliser of every row, log2 of its sum (without sums, its maximum); then, over the
   ``rows`` of a query block, the sum and the maximum of exp2(block - normaliser), peaks where there are any.

The numbers between them, float32 and keys by rows so that both write and read whole lines, live in a workspace of at
most WORKSPACE bytes, some rows at a time. Reading q and k twice instead would be twice the products.

Model, causal, a head: ``N^2 D / tokens`` FLOPs, ``(N / tokens)^2 / 2`` exponentials with sums, ``8 N/tokens Kb / 2``
bytes of workspace written and read, 2 (BLOCK_M + BLOCK_N) / (BLOCK_M BLOCK_N) bytes from L2 a multiply-add. For 128K
tokens, 32 heads of 128 in bfloat16, with products at 550 TFLOP/s and 3.0 TB/s:

============================  ===========  ============  ==========  ============================================
caller (tokens a cell)        TFLOP        exponentials  workspace   H100, the kernels alone, measured
============================  ===========  ============  ==========  ============================================
XAttention (16)               4.4          1.1 G         1.1 GB      7.9 ms, products; PyTorch 16
CoSA (8)                      8.8          0.3 G         2.1 GB      15.3 ms, products; PyTorch 20 to 30
ProxyAttn (1, 4 of 32 heads   1.1          4.3 G, two    0.5 GB      6.6 ms, its budgets' included; PyTorch 20
and 1 of 8 queries)                        planes
VecAttention (1 of 128        0.6          none          0.1 GB      3.0 ms; PyTorch 4
queries)
FlashPrefill (mean keys)      0.6          2.1 G         0.1 GB      4.9 ms; PyTorch 30
oracle (1)                    70           275 G         17 GB       130 ms estimated, products
============================  ===========  ============  ==========  ============================================

Short logits, of a head's dims, wait for their operands: four warps a program, so that two share a multiprocessor.
"""

from __future__ import annotations

from math import e, log2
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stem_flex.kernels.cell_tiles import Cut, tile_of
from stem_flex.kernels.launch import launch
from stem_flex.kernels.ops import _check_inputs, _guard
from stem_flex.kernels.pool import INTERPRETED, _valid_range
from stem_flex.kernels.scores import reach

WORKSPACE = 512 * 2**20  # bytes alive between the two kernels, unless the rows of one tile need more


class Operands(NamedTuple):
    """What the logits are made of.

    q: (B, Hq, Lq, D); k: (B, Hkv, Lk, D), one dtype of float16, bfloat16, float32, unit stride in the last dimension.
    spans: the keys [lo, hi) of each row of cells, int32 (1 or B, rows), counted in cells, empty for rows of padding.
    valid: key_start, key_end, query_start, query_end, int32 (B,) or None; looked at by cells of several tokens.
    cut: see :class:`Cut`. scale: of the logits.
    """

    q: Tensor
    k: Tensor
    spans: tuple[Tensor, Tensor]
    valid: tuple[Tensor | None, ...]
    cut: Cut
    scale: float


ROWS_TILE = 4096  # numbers of a step of the second kernel
SHARING = 16  # tiles of rows that share keys in L2


@triton.jit
def _log_sum(x, AXIS: tl.constexpr):
    """log2 of the sum of exp2 along an axis, -inf for nothing."""
    top = tl.max(x, AXIS)
    shift = tl.where(top == float("-inf"), 0.0, top)
    return shift + tl.log2(tl.sum(tl.exp2(x - tl.expand_dims(shift, AXIS)), AXIS))


@triton.jit
def _cell_tile(x, cells, row_stride, offset, phase, part, low, high, TOKENS: tl.constexpr, EVEN: tl.constexpr,
               DIM: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """(len(cells), BLOCK_D) numbers of token ``phase`` of each of the ``cells``, from dimension part * BLOCK_D on."""
    dim = tl.arange(0, BLOCK_D)
    # whole rows are moved, then dims: so the compiler sees that a thread's dims lie side by side, and on 16 bytes
    pointers = x + (offset + (phase * row_stride + part * BLOCK_D))[:, None] + dim[None, :]
    if EVEN and DIM % BLOCK_D == 0:
        tile = tl.load(pointers)
    else:
        token = cells * TOKENS + phase
        real = (token >= low) & (token < high)
        tile = tl.load(pointers, mask=real[:, None] & (part * BLOCK_D + dim < DIM)[None, :], other=0.0)
    return tile.to(tl.float32) if UPCAST else tile  # the interpreter's dot product takes bfloat16 for integers


@triton.jit(do_not_specialize=["row", "count", "width"])
def _cells_kernel(
    q, k, sums, peaks, lo, hi, key_start, key_end, query_start, query_end, q_batch, q_head, q_row, k_batch, k_head,
    k_row, span_batch, q_len, k_len, row, count, width, head_stride, row_stride, column_stride, scale,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DIM: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program a tile: (b, kv head) slowest, then SHARED tiles of rows (of the group's heads) at a time, against all
    keys. Tiles without an allowed cell are left unwritten.

    Cells [row, row + count) against keys [0, width); block (I, J), counted from ``row``, of head (b, h) is written at
    ``(b*Hq + h)*head_stride + I*row_stride + J*column_stride``.
    """
    GROUP: tl.constexpr = Q_HEADS // KV_HEADS
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(count, BLOCK_M) * GROUP
    tiles_n = tl.cdiv(width, BLOCK_N)
    bkv = pid // (tiles_m * tiles_n)
    inner = pid % (tiles_m * tiles_n)
    first = inner // (SHARED * tiles_n) * SHARED
    shared = tl.minimum(tiles_m - first, SHARED)
    inner = inner % (SHARED * tiles_n)
    tile_m = tiles_m - 1 - (first + inner % shared)  # the longest rows first
    b = bkv // KV_HEADS
    kv_head = bkv % KV_HEADS
    h = kv_head * GROUP + tile_m % GROUP
    m = tile_m // GROUP * BLOCK_M + tl.arange(0, BLOCK_M)
    n = inner // shared * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m = m < count
    low = tl.load(lo + b * span_batch + row + m, mask=in_m, other=0)
    high = tl.load(hi + b * span_batch + row + m, mask=in_m, other=0)
    least = tl.min(tl.where(high > low, low, 2147483647), axis=0)
    if (least < tl.min(n, axis=0) + BLOCK_N) & (tl.max(high, axis=0) > tl.min(n, axis=0)):
        key_low, key_high = _valid_range(key_start, key_end, b, k_len)
        query_low, query_high = _valid_range(query_start, query_end, b, q_len)
        q += b.to(tl.int64) * q_batch + h.to(tl.int64) * q_head
        k += b.to(tl.int64) * k_batch + kv_head.to(tl.int64) * k_head
        # past the end the last cell is repeated: it is never seen
        a = tl.minimum(row + m, tl.cdiv(q_len, TOKENS) - 1)
        j = tl.minimum(n, tl.cdiv(k_len, TOKENS) - 1)
        q_at = a.to(tl.int64) * (TOKENS * q_row)
        k_at = j.to(tl.int64) * (TOKENS * k_row)
        s = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        PARTS: tl.constexpr = (DIM + BLOCK_D - 1) // BLOCK_D
        for step in range(0, TOKENS * PARTS):
            phase, part = step // PARTS, step % PARTS
            left = _cell_tile(q, a, q_row, q_at, TOKENS - 1 - phase, part, query_low, query_high, TOKENS, EVEN, DIM,
                              BLOCK_D, UPCAST)  # fmt: skip
            right = _cell_tile(k, j, k_row, k_at, phase, part, key_low, key_high, TOKENS, EVEN, DIM, BLOCK_D, UPCAST)
            s = tl.dot(left, tl.trans(right), s, input_precision=PRECISION)
        seen = (n[None, :] >= low[:, None]) & (n[None, :] < high[:, None])
        s = tl.where(seen, s * scale, float("-inf"))
        blocks_m = tile_m // GROUP * (BLOCK_M // ROWS) + tl.arange(0, BLOCK_M // ROWS)
        blocks_n = inner // shared * (BLOCK_N // COLUMNS) + tl.arange(0, BLOCK_N // COLUMNS)
        at = (b * Q_HEADS + h).to(tl.int64) * head_stride + blocks_m.to(tl.int64)[:, None] * row_stride
        at += blocks_n.to(tl.int64)[None, :] * column_stride
        inside = (blocks_m * ROWS < count)[:, None] & (blocks_n * COLUMNS < width)[None, :]
        if ROWS > 1:
            found = _log_sum(tl.reshape(s, (BLOCK_M // ROWS, ROWS, BLOCK_N)), 1)
            tl.store(sums + at, found, mask=inside)
        else:
            s = tl.reshape(s, (BLOCK_M, BLOCK_N // COLUMNS, COLUMNS))
            if peaks is not None:
                tl.store(peaks + at, tl.max(s, 2), mask=inside)
            if sums is not None:
                tl.store(sums + at, _log_sum(s, 2), mask=inside)


@triton.jit
def _block_tile(x, rows, blocks, column_stride, low, high, COLUMNS: tl.constexpr):
    """What the first kernel wrote, (rows, blocks), -inf where a row sees nothing of a block."""
    seen = (blocks[None, :] * COLUMNS < high[:, None]) & ((blocks[None, :] + 1) * COLUMNS > low[:, None])
    return tl.load(x + blocks.to(tl.int64)[None, :] * column_stride + rows[:, None], mask=seen, other=float("-inf"))


@triton.jit(do_not_specialize=["row", "query_blocks", "blocks"])
def _rows_kernel(
    sums, peaks, lo, hi, total, peak, span_batch, row, query_blocks, blocks, head_stride, column_stride, out_head,
    out_row, Q_HEADS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """One program a query block of a head: its rows' normalisers, then the sum and the maximum of their weights."""
    pid = tl.program_id(0)
    head = pid // query_blocks
    i = query_blocks - 1 - pid % query_blocks
    rows = i * ROWS + tl.arange(0, ROWS)
    low = tl.load(lo + head // Q_HEADS * span_batch + row + rows)
    high = tl.load(hi + head // Q_HEADS * span_batch + row + rows)
    begin = tl.min(tl.where(high > low, low, 2147483647), axis=0) // COLUMNS // BLOCK_J * BLOCK_J
    end = tl.minimum(tl.cdiv(tl.max(high, axis=0), COLUMNS), blocks)
    parts = sums if sums is not None else peaks
    weights = peaks if peaks is not None else sums
    parts += head.to(tl.int64) * head_stride
    weights += head.to(tl.int64) * head_stride
    top = tl.full((ROWS,), -1.0e30, tl.float32)
    upto = tl.zeros((ROWS,), tl.float32)
    for j in range(begin, end, BLOCK_J):
        x = _block_tile(parts, rows, j + tl.arange(0, BLOCK_J), column_stride, low, high, COLUMNS)
        higher = tl.maximum(top, tl.max(x, 1))
        upto = upto * tl.exp2(top - higher) + tl.sum(tl.exp2(x - higher[:, None]), 1)
        top = higher
    if sums is not None:
        top = tl.where(upto > 0, top + tl.log2(tl.where(upto > 0, upto, 1.0)), float("inf"))
    total += head.to(tl.int64) * out_head + i.to(tl.int64) * out_row
    peak += head.to(tl.int64) * out_head + i.to(tl.int64) * out_row
    for j in range(begin, end, BLOCK_J):
        block = j + tl.arange(0, BLOCK_J)
        x = _block_tile(weights, rows, block, column_stride, low, high, COLUMNS)
        weight = tl.exp2(x - top[:, None])
        tl.store(total + block, tl.sum(weight, 0), mask=block < end)
        tl.store(peak + block, tl.max(weight, 0), mask=block < end)


def _launch_cells(operands: Operands, sums: Tensor | None, peaks: Tensor | None, strides: tuple[int, ...],
                  rows: tuple[int, int, int], *, by_query: bool = False) -> None:  # fmt: skip
    """The first kernel for (first row, rows, keys) into tensors of (head, row of blocks, block) strides."""
    q, k, (lo, hi), valid, cut, scale = operands
    tile = tile_of(q.element_size(), cut, q.shape[3], by_query=by_query)
    even = cut.tokens == 1 or (
        all(x is None for x in valid) and q.shape[2] % cut.tokens == 0 and k.shape[2] % cut.tokens == 0
    )
    meta = dict(
        Q_HEADS=q.shape[1], KV_HEADS=k.shape[1], TOKENS=cut.tokens, ROWS=cut.rows if by_query else 1,
        COLUMNS=cut.columns, DIM=q.shape[3], EVEN=even, PRECISION="ieee" if q.element_size() == 4 else "tf32",
        UPCAST=INTERPRETED, SHARED=SHARING, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        BLOCK_D=min(tile.block_d, max(16, triton.next_power_of_2(q.shape[3]))), num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    args = (
        q, k, sums, peaks, lo, hi, *valid, *q.stride()[:3], *k.stride()[:3], lo.stride(0) if lo.shape[0] > 1 else 0,
        q.shape[2], k.shape[2], *rows, *strides, scale * log2(e),
    )  # fmt: skip
    programs = q.shape[0] * q.shape[1] * -(-rows[1] // tile.block_m) * -(-rows[2] // tile.block_n)
    with _guard(q):
        launch(_cells_kernel, programs, args, meta, {}, "cells")


def _checked(operands: Operands) -> Operands:
    """Contiguous in the last dimension; raises TypeError for dtypes that the kernels don't take."""
    q, k = (x.detach() if x.stride(-1) == 1 else x.detach().contiguous() for x in (operands.q, operands.k))
    _check_inputs("q and k", q=q, k=k)
    lo, hi = (x.contiguous() for x in operands.spans)
    return operands._replace(q=q, k=k, spans=(lo, hi))


def cell_mass(
    operands: Operands, causal_offset: int | None = None, step: int = 1, *, sums: bool = True, peaks: bool = False
) -> tuple[Tensor, Tensor]:
    """Sum and maximum over the rows of each query block of the rows' weights on each key block, (B, Hq, Qb, Kb).

    A row's weight on a block is the sum of its softmax there; with ``peaks`` the largest entry of its softmax there;
    with ``peaks`` alone the largest exp(logit - the row's largest logit). float32, 0 where nothing is allowed.

    Args:
        operands: with as many rows as whole query blocks have.
        causal_offset, step: the first ``n`` rows see no key from ``causal_offset + n step`` on; None: they may.

    Raises:
        TypeError: another dtype.
    """
    operands = _checked(operands)
    q, k, (lo, hi), _, cut, _ = operands
    heads, rows = q.shape[0] * q.shape[1], lo.shape[1]
    blocks = -(-k.shape[2] // (cut.tokens * cut.columns))
    total = torch.zeros(q.shape[0], q.shape[1], rows // cut.rows, blocks, dtype=torch.float32, device=q.device)
    peak = torch.zeros_like(total)
    if total.numel() == 0:
        return total, peak
    tile = max(tile_of(q.element_size(), cut, q.shape[3]).block_m, cut.rows)
    most = max(1, WORKSPACE // (4 * (sums + peaks) * heads * blocks * tile)) * tile
    size = heads * blocks * min(most, rows)
    log, best = (
        torch.empty(size, dtype=torch.float32, device=q.device) if wanted else None for wanted in (sums, peaks)
    )
    block_j = min(512, max(16, ROWS_TILE // cut.rows))
    for row in range(0, rows, most):
        count = min(most, rows - row)
        width = reach(row + count, -(-k.shape[2] // cut.tokens), step, cut.tokens, causal_offset)
        part = -(-width // cut.columns)
        strides = part * count, 1, count
        _launch_cells(operands, log, best, strides, (row, count, width))
        out = slice(row // cut.rows, None)
        args = (
            log, best, lo, hi, total[:, :, out], peak[:, :, out], lo.stride(0) if lo.shape[0] > 1 else 0, row,
            count // cut.rows, part, part * count, count, total.stride(1), blocks,
        )  # fmt: skip
        meta = dict(Q_HEADS=q.shape[1], ROWS=cut.rows, COLUMNS=cut.columns, BLOCK_J=block_j, num_warps=4)
        with _guard(q):
            launch(_rows_kernel, heads * (count // cut.rows), args, meta, {}, "rows")
    return total, peak


def cell_peaks(operands: Operands) -> Tensor:
    """log2(e) times the largest logit of each row in each key block, float32 (B, Hq, rows, Kb); -inf where nothing is.

    Raises:
        TypeError: another dtype.
    """
    return _whole(operands, by_query=False)


def query_logs(operands: Operands) -> Tensor:
    """log2 of the sum over a query block's rows of exp(logit), for each key: float32 (B, Hq, Qb, Lk); -inf for none.

    Raises:
        TypeError: another dtype.
    """
    return _whole(operands, by_query=True)


def _whole(operands: Operands, *, by_query: bool) -> Tensor:
    """The first kernel over all rows, its matrix in memory."""
    operands = _checked(operands)
    q, k, (lo, _), _, cut, _ = operands
    keys = -(-k.shape[2] // cut.tokens)
    shape = lo.shape[1] // (cut.rows if by_query else 1), -(-keys // cut.columns)
    found = torch.full((*q.shape[:2], *shape), float("-inf"), dtype=torch.float32, device=q.device)
    planes = (found, None) if by_query else (None, found)
    if found.numel():
        _launch_cells(operands, *planes, found.stride()[1:], (0, lo.shape[1], keys), by_query=by_query)
    return found
