"""Block scores by one GEMM over the pooled vectors, in chunks of query-block rows.

    score[b, h, I, J] = q_flat[b, h, I] . k_flat[b, h // (Hq/Hkv), J] / (sqrt(D) * s) + bias[b, h // (Hq/Hkv), J]

float32 accumulation (IEEE products for float32 inputs), float32 out. Tiles that hold no allowed pair of their rows are
skipped: they are left unwritten when streaming (the selection never looks at them) and -inf in the full matrix.

Streaming: the rows [row, row + count) of all B*Hq heads are scored into one workspace and selected from there before
the next chunk overwrites it, so that score memory is at most ``max(MOST_WORKSPACE_BYTES, 16 rows of every head)``
however long the sequence is. Every chunk reads all pooled keys again, so long sequences get chunks of ROWS rows as far
as that allows. A chunk is only as wide as its rows can reach where the host knows that (causal, integer offset).

Model, causal, per head: ``s*D * Kb*Qb`` multiply-adds after the skip (half of the square), s/(2*B^2) of dense
attention's; reads ``2*s*D*e`` bytes a block pair tile row from L2, writes (and the selection reads) ``4*Qb*Kb/2``
bytes. 128K tokens, 32 heads, s=8, D=128: 39 GFLOP, 67 MB.
"""

from functools import lru_cache
from math import sqrt
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from stem_flex.kernels.launch import Plan, launch
from stem_flex.kernels.pool import INTERPRETED, Sizes

WORKSPACE_BYTES = 128 * 2**20
"""Bytes of scores alive at a time while tables are built, unless ROWS rows of every head need more."""

MOST_WORKSPACE_BYTES = 512 * 2**20
"""Most bytes of scores alive at a time (more only if 16 rows of every head need more)."""

# Tuning: (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages) where the 128-wide tiles fill the GPU, where they do not, and for
# float32 (no tensor cores); FILL is the number of 128-wide tiles that counts as filling it.
LARGE_TILE = (128, 128, 64, 4, 3)
SMALL_TILE = (64, 64, 64, 4, 4)
FLOAT_TILE = (64, 64, 32, 4, 2)
FILL = 264
ROWS = 512  # rows of a chunk: pooled keys of ROWS/128 tiles are read once from memory, then from L2


class Chunk(NamedTuple):
    """Rows [row, row + height) of every head, scored against key blocks [0, width)."""

    row: int
    height: int
    width: int


def reach(rows: int, k_blocks: int, block_q: int, block_k: int, causal_offset: int | None) -> int:
    """Key blocks that the first ``rows`` query blocks can reach: a bound on every ``hi`` of those rows."""
    if causal_offset is None:
        return k_blocks
    return max(1, min(k_blocks, -(-(causal_offset + rows * block_q) // block_k)))


def workspace_bytes(heads: int, k_blocks: int) -> int:
    """Bytes of scores to keep alive at a time for rows of ``k_blocks``."""
    return min(MOST_WORKSPACE_BYTES, max(WORKSPACE_BYTES, 4 * heads * ROWS * k_blocks))


def aligned(width: int) -> int:
    """Elements from one row of ``width`` to the next, for aligned loads."""
    return -(-width // 16) * 16


@lru_cache(maxsize=4096)
def cut(
    q_blocks: int, k_blocks: int, block_q: int, block_k: int, causal_offset: int | None, bytes_a_row: int,
    bytes_a_column: int, workspace: int,
) -> tuple[Chunk, ...]:  # fmt: skip
    """Chunks of rows of at most ``workspace`` bytes.

    A row takes ``bytes_a_row``, and ``bytes_a_column`` for each key block that the chunk's rows can reach, `aligned`.
    Chunks hold at least 16 rows, and multiples of 16 (of 128 from 128 on, the GEMM's tile) except the last.
    """
    found: list[Chunk] = []
    row = 0
    while row < q_blocks:
        count = q_blocks - row
        while True:
            width = reach(row + count, k_blocks, block_q, block_k, causal_offset)
            fit = workspace // (bytes_a_row + bytes_a_column * aligned(width))
            if count <= max(16, fit):
                break
            fit = max(16, fit // 16 * 16)
            count = fit // 128 * 128 if fit >= 128 else fit
        found.append(Chunk(row, count, width))
        row += count
    return tuple(found)


@lru_cache(maxsize=4096)
def chunks(
    heads: int, q_blocks: int, k_blocks: int, block_q: int, block_k: int, causal_offset: int | None, workspace: int
) -> tuple[tuple[Chunk, ...], int]:
    """Cut the rows of float32 scores of ``heads`` into chunks. Returns (chunks, elements of the workspace)."""
    found = cut(q_blocks, k_blocks, block_q, block_k, causal_offset, 0, 4 * heads, workspace)
    return found, max((heads * chunk.height * aligned(chunk.width) for chunk in found), default=0)


@triton.jit
def _load_tile(base, index, k0, INNER: tl.constexpr, BLOCK_K: tl.constexpr):
    """(len(index), BLOCK_K) elements of flat vectors, zeros past INNER."""
    k = k0 + tl.arange(0, BLOCK_K)
    pointers = base + index[:, None] * INNER + k[None, :]
    if INNER % BLOCK_K == 0:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(k < INNER)[None, :], other=0.0)


@triton.jit(do_not_specialize=["batch", "q_blocks", "k_blocks", "row", "count", "width"])
def _scores_kernel(
    flats, bias, rows, classes, out, batch, q_blocks, k_blocks, row, count, width,
    out_stride_h, out_stride_r, rows_stride_b, class_stride_b, class_stride_h, class_stride_r, scale,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, INNER: tl.constexpr, HAS_BIAS: tl.constexpr, FULL: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program a tile: (b, kv head) slowest, then the key tile, then the (head of the group, row tile) sharing it.

    ``out`` holds row ``row + m`` of head (b, h) at ``(b*Hq + h)*out_stride_h + m*out_stride_r``.
    """
    GROUP: tl.constexpr = Q_HEADS // KV_HEADS
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(count, BLOCK_M)
    tiles_n = tl.cdiv(width, BLOCK_N)
    inner = pid % (tiles_m * GROUP)
    outer = pid // (tiles_m * GROUP)
    tile_n = outer % tiles_n
    b = outer // tiles_n // KV_HEADS
    kv_head = (outer // tiles_n) % KV_HEADS
    h = kv_head * GROUP + inner // tiles_m

    m = (inner % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m = m < count
    in_n = n < width
    ranges = rows + b.to(tl.int64) * rows_stride_b + (row + m) * 8
    low = tl.load(ranges, mask=in_m, other=0)
    high = tl.load(ranges + 1, mask=in_m, other=0)
    first = tl.min(tl.where(high > low, low, 2147483647), axis=0)
    last = tl.max(high, axis=0)
    head = (b * Q_HEADS + h).to(tl.int64)
    target = out + head * out_stride_h + m[:, None].to(tl.int64) * out_stride_r + n[None, :]
    mask = in_m[:, None] & in_n[None, :]

    if (first < (tile_n + 1) * BLOCK_N) & (last > tile_n * BLOCK_N):
        kv = (b * KV_HEADS + kv_head).to(tl.int64) * k_blocks
        q_base = flats + (head * q_blocks + row) * INNER
        k_base = flats + (batch.to(tl.int64) * Q_HEADS * q_blocks + kv) * INNER
        # Rows past the end repeat the last one: no mask on the loads, and they are never stored.
        m_safe = tl.minimum(m, count - 1)
        n_safe = tl.minimum(n, width - 1)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k0 in range(0, INNER, BLOCK_K):
            q = _load_tile(q_base, m_safe, k0, INNER, BLOCK_K)
            k = _load_tile(k_base, n_safe, k0, INNER, BLOCK_K)
            if UPCAST:  # the interpreter's dot product takes bfloat16 for integers
                q = q.to(tl.float32)
                k = k.to(tl.float32)
            acc = tl.dot(q, tl.trans(k), acc, input_precision=PRECISION)
        score = acc * scale
        if HAS_BIAS:
            score += tl.load(bias + kv + n, mask=in_n, other=0.0)[None, :]
        if FULL:
            allowed = (n[None, :] >= low[:, None]) & (n[None, :] < high[:, None])
            if classes is not None:
                kind = tl.load(
                    classes + b.to(tl.int64) * class_stride_b + h.to(tl.int64) * class_stride_h
                    + (row + m)[:, None].to(tl.int64) * class_stride_r + n[None, :], mask=mask, other=0,
                )  # fmt: skip
                allowed = allowed & (kind > 0)
            score = tl.where(allowed, score, float("-inf"))
        tl.store(target, score, mask=mask)
    elif FULL:
        tl.store(target, tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float32), mask=mask)


@lru_cache(maxsize=1024)
def _scores_meta(sizes: Sizes, chunk: Chunk, item_size: int, has_bias: bool, full: bool) -> tuple[int, float, dict]:
    """(programs, scale, compile-time arguments) of one launch."""
    heads = sizes.batch * sizes.q_heads
    if item_size == 4:
        tile = FLOAT_TILE
    elif heads * -(-chunk.height // 128) * -(-chunk.width // 128) >= FILL:
        tile = LARGE_TILE
    else:
        tile = SMALL_TILE
    block_m, block_n, block_k, warps, stages = tile
    meta = dict(
        Q_HEADS=sizes.q_heads, KV_HEADS=sizes.kv_heads, INNER=sizes.inner, HAS_BIAS=has_bias, FULL=full,
        PRECISION="ieee" if item_size == 4 else "tf32", UPCAST=INTERPRETED, BLOCK_M=block_m, BLOCK_N=block_n,
        BLOCK_K=block_k, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    programs = heads * -(-chunk.height // block_m) * -(-chunk.width // block_n)
    return programs, 1.0 / (sqrt(sizes.head_dim) * sizes.stride), meta


def score_rows(
    flats: Tensor,
    stats: Tensor,
    rows: Tensor,
    classes: Tensor | None,
    class_strides: tuple[int, int, int],
    out: Tensor,
    chunk: Chunk,
    head_stride: int,
    row_stride: int,
    sizes: Sizes,
    plan: Plan,
    *,
    has_bias: bool,
    full: bool,
) -> None:
    """Score one chunk into float32 ``out``: rows ``row_stride`` elements apart, heads (of B*Hq) ``head_stride``.

    ``full`` writes every pair of the chunk, -inf where the layout does not allow it; otherwise only tiles with an
    allowed pair are written, and ``classes`` is not read.
    """
    programs, scale, meta = _scores_meta(sizes, chunk, flats.element_size(), has_bias, full)
    args = (
        flats, stats, rows, classes if full else None, out,
        sizes.batch, sizes.q_blocks, sizes.k_blocks, chunk.row, chunk.height, chunk.width,
        head_stride, row_stride, rows.stride(0) if rows.shape[0] > 1 else 0, *class_strides, scale,
    )  # fmt: skip
    launch(_scores_kernel, programs, args, meta, plan, ("scores", chunk.row))
