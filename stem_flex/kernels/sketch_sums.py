"""The block sketch's logits, exponentials summed by key block: one product of query and key proxies.

With s[a, b] = q_a . k_b / sqrt(D) + ln(tokens that b stands for), of a query proxy a and the key proxies b of block J,

    sums[a, J] * exp2(top[a, tile of J]) = sum_{b in J} exp s[a, b]         0 where the layout forbids (I of a, J)
    log[a, tile]                         = log2 of the sum of the above over the tile

``sums`` are float16 (float32 for float32 inputs), the largest of a row of a tile between 1 and the number of proxies;
``top`` and ``log`` float32. A tile is BLOCK_M query proxies of one head, of several query blocks packed without gaps,
by BLOCK_J key blocks. For each proxy number of the keys it takes one product with the proxies of that number, and
updates the sums elementwise as online softmax does: the proxies of a key block meet in one register, nothing is
shuffled but the row's maximum, and their number needs no padding. scale * log2(e) is folded into the logit's one
multiply-add.

Tiles outside the rows' ranges are skipped and left unwritten. Where all of a tile is allowed and real, what a key proxy
stands for is a constant; elsewhere it is counted from the real keys, and pairs are masked.

Model, causal, with P query and R key proxies a block, a head: ``2*D * P*R * Qb*Kb/2`` operations, ``P*R * Qb*Kb/2``
exp2 with 3 float32 instructions each, ``e*P*Qb*Kb/2`` bytes written; 2*D*BLOCK_J bytes of keys from L2 for BLOCK_M x
BLOCK_J products. 128K tokens of 32 heads, D=128, 24 x 12: 1.24 TFLOP (1.3 ms of an H100's tensor cores at their peak),
4.8 G exp2 (1.35 ms of its special function units), 0.8 GB written, 9.7 GB from L2. The two overlap as far as the
programs of a multiprocessor are at different places.
"""

from functools import lru_cache
from math import exp, log2, sqrt
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from stem_flex.kernels.launch import Plan, launch
from stem_flex.kernels.pool import INTERPRETED, _valid_range
from stem_flex.kernels.scores import Chunk, aligned
from stem_flex.kernels.sketch_proxies import Plane


class Tile(NamedTuple):
    """Tuning: query proxies and key blocks of a tile, dims at a time (or all), tiles a program, warps, stages."""

    block_m: int
    block_j: int
    block_d: int
    span: int
    warps: int
    stages: int


# Several programs of four warps a multiprocessor: one's products run beside another's exponentials.
HALF_TILE = Tile(64, 64, 128, 4, 4, 3)
WIDE_TILE = Tile(64, 64, 256, 4, 4, 2)  # heads of more than 128 dims
FLOAT_TILE = Tile(64, 64, 32, 4, 4, 2)  # no tensor cores


def tile_of(item_size: int, head_dim: int) -> Tile:
    """The tile for inputs of ``item_size`` bytes an element."""
    if item_size == 4:
        return FLOAT_TILE
    return HALF_TILE if head_dim <= 128 else WIDE_TILE


@triton.jit
def _products(
    q, queries, keys, m, j, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """Products of query proxies ``m`` (in ``q`` unless dims are taken in parts) and the blocks ``j`` of a plane."""
    if BLOCK_D == WIDTH:
        k = tl.load(keys + j[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])
        if UPCAST:  # the interpreter's dot product takes bfloat16 for integers
            k = k.to(tl.float32)
        return tl.dot(q, tl.trans(k), input_precision=PRECISION)
    else:
        s = tl.zeros((m.shape[0], j.shape[0]), dtype=tl.float32)
        for d0 in range(0, WIDTH, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            left = tl.load(queries + m[:, None] * WIDTH + d[None, :])
            right = tl.load(keys + j[:, None] * WIDTH + d[None, :])
            if UPCAST:
                left = left.to(tl.float32)
                right = right.to(tl.float32)
            s = tl.dot(left, tl.trans(right), s, input_precision=PRECISION)
        return s


@triton.jit
def _log_stood_for(p, j, low, high, OUTLIERS: tl.constexpr, MEANS: tl.constexpr, BLOCK: tl.constexpr):
    """log2 of how many real tokens, [low, high), the proxies ``p`` of the blocks ``j`` stand for; -inf for none."""
    TOKENS: tl.constexpr = BLOCK // MEANS
    first = j * BLOCK
    real = tl.minimum(high, first + BLOCK) - tl.maximum(low, first)
    begin = first + (p - OUTLIERS) * TOKENS
    group = tl.minimum(high, begin + TOKENS) - tl.maximum(low, begin)
    stood_for = tl.where(p < OUTLIERS, tl.where(p < real, 1, 0), tl.maximum(group, 0))
    return tl.where(stood_for > 0, tl.log2(tl.maximum(stood_for, 1).to(tl.float32)), float("-inf"))


@triton.jit
def _plain_tile(
    q, queries, keys, plane, m, j, scale, OUTLIERS: tl.constexpr, MEANS: tl.constexpr, LOG_TOKENS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(sums, top) of a tile of which every pair is allowed and every key real."""
    top = tl.full((m.shape[0],), -1.0e30, tl.float32)
    sums = tl.zeros((m.shape[0], j.shape[0]), dtype=tl.float32)
    for p in range(0, OUTLIERS + MEANS):
        s = _products(q, queries, keys + p * plane, m, j, WIDTH, BLOCK_D, PRECISION, UPCAST)
        log_tokens = tl.where(p < OUTLIERS, 0.0, LOG_TOKENS)
        higher = tl.maximum(top, tl.max(s, axis=1) * scale + log_tokens)
        sums = sums * tl.exp2(top - higher)[:, None] + tl.exp2(s * scale + (log_tokens - higher)[:, None])
        top = higher
    return sums, top


@triton.jit
def _edge_tile(
    q, queries, keys, plane, m, j, j_safe, low, high, kinds, real_low, real_high, scale, OUTLIERS: tl.constexpr,
    MEANS: tl.constexpr, BLOCK: tl.constexpr, LOG_TOKENS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(sums, top) of any tile; ``kinds`` points at the classes of each proxy's row, or is None."""
    top = tl.full((m.shape[0],), -1.0e30, tl.float32)
    sums = tl.zeros((m.shape[0], j.shape[0]), dtype=tl.float32)
    first, end = tl.min(j, axis=0) * BLOCK, (tl.max(j, axis=0) + 1) * BLOCK
    # Not hoisted: comparing anew costs less than holding a flag for every pair.
    for p in tl.range(0, OUTLIERS + MEANS, disable_licm=True):
        s = _products(q, queries, keys + p * plane, m, j_safe, WIDTH, BLOCK_D, PRECISION, UPCAST)
        log_tokens = tl.zeros((j.shape[0],), tl.float32) + tl.where(p < OUTLIERS, 0.0, LOG_TOKENS)
        if (first < real_low) | (end > real_high):
            log_tokens = _log_stood_for(p, j, real_low, real_high, OUTLIERS, MEANS, BLOCK)
        allowed = (j[None, :] >= low[:, None]) & (j[None, :] < high[:, None])
        if kinds is not None:
            allowed = allowed & (tl.load(kinds[:, None] + j[None, :], mask=allowed, other=0) > 0)
        s = tl.where(allowed, s * scale + log_tokens[None, :], float("-inf"))
        higher = tl.maximum(top, tl.max(s, axis=1))
        sums = sums * tl.exp2(top - higher)[:, None] + tl.exp2(s - higher[:, None])
        top = higher
    return sums, top


@triton.jit
def _store_tile(sums, tops, sums_at, tops_at, tops_plane, total, top, in_m, j, width):
    """Write one tile. The largest sum of a row with any allowed pair is at least 1: its top is one of its terms."""
    row_sum = tl.sum(total, axis=1)
    tl.store(sums + sums_at[:, None] + j[None, :], total.to(sums.dtype.element_ty),
             mask=in_m[:, None] & (j < width)[None, :])  # fmt: skip
    tl.store(tops + tops_at, top, mask=in_m)
    tl.store(tops + tops_plane + tops_at, top + tl.log2(tl.where(row_sum > 0, row_sum, 1.0)), mask=in_m)


@triton.jit(do_not_specialize=["k_blocks", "k_len", "row", "count", "width"])
def _sums_kernel(
    queries, keys, sums, tops, rows, classes, key_start, key_end, k_blocks, k_len, row, count, width, sums_stride,
    tops_stride, tops_plane, rows_stride_b, class_stride_b, class_stride_h, class_stride_r, plane, scale,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, OUTLIERS: tl.constexpr,
    MEANS: tl.constexpr, BLOCK: tl.constexpr, LOG_TOKENS: tl.constexpr, SPAN: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """One program BLOCK_M query proxies and SPAN tiles of key blocks: (b, kv head) slowest, then the tiles, then the
    (query proxies, head of the group) that share them, last rows first.

    Row ``head*count*P + m`` of ``sums`` and of both planes of ``tops``: proxy m of the chunk's rows of that head.
    """
    GROUP: tl.constexpr = Q_HEADS // KV_HEADS
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(count * P, BLOCK_M)
    spans = tl.cdiv(tl.cdiv(width, BLOCK_J), SPAN)
    inner = pid % (tiles_m * GROUP)
    span = pid // (tiles_m * GROUP) % spans
    bkv = pid // (tiles_m * GROUP * spans)
    b = bkv // KV_HEADS
    h = (bkv % KV_HEADS) * GROUP + inner % GROUP

    m = (tiles_m - 1 - inner // GROUP) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = m < count * P
    m = tl.minimum(m, count * P - 1)  # proxies past the end repeat the last one and are not stored
    i = row + m // P
    ranges = rows + b.to(tl.int64) * rows_stride_b + i * 8
    low = tl.maximum(tl.load(ranges), 0)
    high = tl.minimum(tl.load(ranges + 1), width)
    some = high > low
    begin = tl.maximum(span * SPAN, tl.min(tl.where(some, low, 2147483647), axis=0) // BLOCK_J)
    end = tl.minimum((span + 1) * SPAN, tl.cdiv(tl.max(tl.where(some, high, 0), axis=0), BLOCK_J))
    real_low, real_high = _valid_range(key_start, key_end, b, k_len)
    # tiles of which every pair is allowed and every key real; with a class table none is known to be
    plain_begin = tl.cdiv(tl.maximum(tl.max(low, axis=0), tl.cdiv(real_low, BLOCK)), BLOCK_J)
    plain_end = tl.minimum(tl.min(high, axis=0), real_high // BLOCK) // BLOCK_J
    if classes is not None:
        plain_end = begin
    plain_begin = tl.minimum(tl.maximum(plain_begin, begin), end)
    plain_end = tl.maximum(tl.minimum(plain_end, end), plain_begin)
    tiles = plain_end - plain_begin
    if EDGE:
        tiles = end - begin - tiles
    if tiles > 0:
        kinds = classes
        if classes is not None:
            kinds = classes + (b.to(tl.int64) * class_stride_b + h.to(tl.int64) * class_stride_h)
            kinds = kinds + i.to(tl.int64) * class_stride_r
        first = (b * Q_HEADS + h).to(tl.int64) * (count * P)
        queries += first * WIDTH
        keys += bkv.to(tl.int64) * (OUTLIERS + MEANS) * plane
        q = m
        if BLOCK_D == WIDTH:
            q = tl.load(queries + m[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])
            if UPCAST:
                q = q.to(tl.float32)
        for n in range(0, tiles):
            if EDGE:
                tile = tl.where(begin + n < plain_begin, begin + n, plain_end + (n - (plain_begin - begin)))
                j = tile * BLOCK_J + tl.arange(0, BLOCK_J)
                total, top = _edge_tile(q, queries, keys, plane, m, j, tl.minimum(j, k_blocks - 1), low, high, kinds,
                                        real_low, real_high, scale, OUTLIERS, MEANS, BLOCK, LOG_TOKENS, WIDTH, BLOCK_D,
                                        PRECISION, UPCAST)  # fmt: skip
            else:
                tile = plain_begin + n
                j = tile * BLOCK_J + tl.arange(0, BLOCK_J)
                total, top = _plain_tile(q, queries, keys, plane, m, j, scale, OUTLIERS, MEANS, LOG_TOKENS, WIDTH,
                                         BLOCK_D, PRECISION, UPCAST)  # fmt: skip
            _store_tile(sums, tops, (first + m) * sums_stride, (first + m) * tops_stride + tile, tops_plane, total,
                        top, in_m, j, width)  # fmt: skip


@lru_cache(maxsize=1024)
def _sums_meta(keys: Plane, queries: Plane, item_size: int, tile: Tile) -> tuple[float, tuple[dict[str, object], ...]]:
    """scale in base 2, and the compile-time arguments of the plain tiles' launch and of the others'."""
    meta = dict(
        Q_HEADS=queries.heads, KV_HEADS=keys.heads, WIDTH=keys.width, P=queries.proxies, OUTLIERS=keys.outliers,
        MEANS=keys.means, BLOCK=keys.block, LOG_TOKENS=log2(keys.block / keys.means), SPAN=tile.span,
        PRECISION="ieee" if item_size == 4 else "tf32", UPCAST=INTERPRETED, BLOCK_M=tile.block_m, BLOCK_J=tile.block_j,
        BLOCK_D=min(tile.block_d, keys.width), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    edge = {**meta, "EDGE": True}
    if tile.block_m * tile.block_j <= 32 * 32 * tile.warps:  # then two programs fit a multiprocessor, with few spills
        edge["maxnreg"] = 32768 // (32 * tile.warps)
    return log2(exp(1)) / sqrt(keys.head_dim), ({**meta, "EDGE": False}, edge)


def sum_tiles(
    queries: Tensor,
    keys: Tensor,
    sums: Tensor,
    tops: Tensor,
    rows: Tensor,
    restrictions: tuple[Tensor | None, ...],
    class_strides: tuple[int, int, int],
    planes: tuple[Plane, Plane],
    chunk: Chunk,
    batch: int,
    plan: Plan,
    tile: Tile,
) -> None:
    """Sums of the rows of ``chunk`` against the key blocks [0, chunk.width), see the module.

    Args:
        queries: proxies of the chunk's rows; keys: of all key blocks; ``planes``: how (query, key) proxies lie.
        sums: at least B*Hq*chunk.height*P rows of ``aligned(chunk.width)``; tops: 2 planes of as many rows of
            `tiles_of`.
        restrictions: classes, key_start, key_end.
    """
    query_plane, key_plane = planes
    scale, (meta, edge_meta) = _sums_meta(key_plane, query_plane, queries.element_size(), tile)
    classes, key_start, key_end = restrictions
    proxies = chunk.height * query_plane.proxies
    tiles = -(-chunk.width // tile.block_j)
    args = (
        queries, keys, sums, tops, rows, classes, key_start, key_end, key_plane.blocks, key_plane.length, chunk.row,
        chunk.height, chunk.width, aligned(chunk.width), tiles, batch * query_plane.heads * proxies * tiles,
        rows.stride(0) if rows.shape[0] > 1 else 0, *class_strides, key_plane.stride_p, scale,
    )  # fmt: skip
    programs = batch * query_plane.heads * -(-proxies // tile.block_m) * -(-tiles // tile.span)
    launch(_sums_kernel, programs, args, meta, plan, ("sums", chunk.row))
    launch(_sums_kernel, programs, args, edge_meta, plan, ("edges", chunk.row))
