"""The block sketch's scores, in chunks of rows: proxies, sums, then mean and maximum mass of every pair of blocks.

Over the key blocks J that the layout allows to query block I, with the sums of `sketch_sums`,

    M[a, J] = sums[a, J] * exp2(top[a, tile of J] - normal[a])          normal[a] = log2 sum_tile exp2(log[a, tile])
    score[I, J] = sum_a w_a M[a, J] / sum_a w_a + max_{a: w_a > 0} M[a, J]         w_a: real tokens that a stands for

One program reads one query block: its P normalisers, then mean and maximum over P rows, key tile by key tile, and on
demand the number of scores above a threshold.

Model of the reading: ``f*P*Qb*Kb/2`` bytes in and ``4*Qb*Kb/2`` out a head, causal; ~4 operations a sum.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stem_flex.kernels.launch import Plan, launch
from stem_flex.kernels.pool import _valid_range
from stem_flex.kernels.scores import Chunk, aligned
from stem_flex.kernels.sketch_proxies import Plane, key_plane, query_plane
from stem_flex.kernels.sketch_sums import Tile, sum_tiles, tile_of

KEY_BLOCKS_PER_WARP = 64  # tuning: few warps a program, for a warp reduces over its rows without a barrier


class Sketch(NamedTuple):
    """Proxies of a block: outliers and group means of query blocks, and of key blocks."""

    query_outliers: int
    query_means: int
    key_outliers: int
    key_means: int


class Sizes(NamedTuple):
    """Sizes of one sketch of q (B, Hq, Lq, D) and k (B, Hkv, Lk, D), and the tile that it is summed by."""

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    k_len: int
    head_dim: int
    block_q: int
    block_k: int
    sketch: Sketch
    tile: Tile

    @property
    def q_blocks(self) -> int:
        return -(-self.q_len // self.block_q)

    @property
    def k_blocks(self) -> int:
        return -(-self.k_len // self.block_k)

    @property
    def heads(self) -> int:
        return self.batch * self.q_heads

    @property
    def keys(self) -> Plane:
        """Where the keys' proxies lie."""
        _, _, outliers, means = self.sketch
        return key_plane(self.kv_heads, self.k_len, self.head_dim, self.block_k, outliers, means)

    def queries(self, rows: int) -> Plane:
        """Where the proxies of ``rows`` query blocks lie."""
        outliers, means, _, _ = self.sketch
        return query_plane(self.q_heads, self.q_len, self.head_dim, self.block_q, outliers, means, rows)


def sizes_of(q: Tensor, k: Tensor, block_q: int, block_k: int, sketch: tuple[int, ...]) -> Sizes:
    """The sizes of one sketch."""
    batch, q_heads, q_len, head_dim = q.shape
    return Sizes(
        batch, q_heads, k.shape[1], q_len, k.shape[2], head_dim, block_q, block_k, Sketch(*sketch),
        tile_of(q.element_size(), head_dim),
    )  # fmt: skip


@triton.jit
def _normal(log, in_p, first, last, P_UP: tl.constexpr, TILES: tl.constexpr):
    """log2 of the sum of a row over its tiles [first, last), for each of the rows that ``log`` points at."""
    top = tl.full((P_UP,), -1.0e30, tl.float32)
    total = tl.zeros((P_UP,), dtype=tl.float32)
    for tile in range(first, last, TILES):
        at = tile + tl.arange(0, TILES)
        x = tl.load(log[:, None] + at[None, :], mask=in_p[:, None] & (at < last)[None, :], other=float("-inf"))
        higher = tl.maximum(top, tl.max(x, axis=1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(x - higher[:, None]), axis=1)
        top = higher
    return top + tl.log2(tl.where(total > 0, total, 1.0))  # finite for proxies that stand for nothing too


@triton.jit
def _weights(p, i, low, high, P: tl.constexpr, OUTLIERS: tl.constexpr, BLOCK: tl.constexpr):
    """Real queries, [low, high), that each proxy of query block ``i`` stands for; 0 past the last proxy."""
    TOKENS: tl.constexpr = BLOCK // (P - OUTLIERS)
    first = i * BLOCK
    real = tl.minimum(high, first + BLOCK) - tl.maximum(low, first)
    begin = first + (p - OUTLIERS) * TOKENS
    group = tl.minimum(high, begin + TOKENS) - tl.maximum(low, begin)
    stood_for = tl.where(p < OUTLIERS, tl.where(p < real, 1, 0), tl.maximum(group, 0))
    return tl.where(p < P, stood_for, 0).to(tl.float32)


@triton.jit(
    do_not_specialize=["q_blocks", "q_len", "row", "count", "width", "columns", "tops_stride", "tops_plane", "least"]
)
def _read_kernel(
    sums, tops, rows, classes, query_start, query_end, out, threshold, counts, least, q_blocks, q_len, row, count,
    width, columns, sums_stride, tops_stride, tops_plane, out_stride_h, out_stride_r, rows_stride_b, class_stride_b,
    class_stride_h, class_stride_r, least_stride_b, least_stride_h, least_stride_r,
    Q_HEADS: tl.constexpr, P: tl.constexpr, P_UP: tl.constexpr, OUTLIERS: tl.constexpr, BLOCK: tl.constexpr,
    FULL: tl.constexpr, BLOCK_J: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One program a query block, last rows first, heads side by side."""
    heads = tl.num_programs(0) // count
    bh = tl.program_id(0) % heads
    local = count - 1 - tl.program_id(0) // heads
    b = (bh // Q_HEADS).to(tl.int64)
    h = (bh % Q_HEADS).to(tl.int64)
    i = row + local
    ranges = rows + b * rows_stride_b + i * 8
    low = tl.maximum(tl.load(ranges), 0)
    high = tl.minimum(tl.load(ranges + 1), width)
    real_low, real_high = _valid_range(query_start, query_end, b, q_len)
    p = tl.arange(0, P_UP)
    weight = _weights(p, i, real_low, real_high, P, OUTLIERS, BLOCK)
    real = weight > 0
    share = weight / tl.maximum(tl.sum(weight, axis=0), 1.0)
    at = (bh.to(tl.int64) * count + local) * P + p
    first = low // BLOCK_J
    last = tl.where(high > low, tl.cdiv(high, BLOCK_J), first)
    normal = _normal(tops + tops_plane + at * tops_stride, real, first, last, P_UP, TILES)
    if threshold is not None:
        least = tl.load(threshold + b * least_stride_b + h * least_stride_h + i.to(tl.int64) * least_stride_r)
    out += bh.to(tl.int64) * out_stride_h + local.to(tl.int64) * out_stride_r
    if classes is not None:
        classes += b * class_stride_b + h * class_stride_h + i.to(tl.int64) * class_stride_r
    found = tl.zeros((BLOCK_J,), dtype=tl.int32)
    for tile in range(0 if FULL else first, tl.cdiv(columns, BLOCK_J) if FULL else last):
        j = tile * BLOCK_J + tl.arange(0, BLOCK_J)
        allowed = (j >= low) & (j < high)
        if classes is not None:
            allowed = allowed & (tl.load(classes + j, mask=allowed, other=0) > 0)
        of_row = tile + p * 0
        inside = real & (of_row >= first) & (of_row < last)
        top = tl.load(tops + at * tops_stride + of_row, mask=inside, other=-1.0e30)
        mass = tl.load(sums + (at * sums_stride)[:, None] + j[None, :],
                       mask=inside[:, None] & allowed[None, :], other=0.0)  # fmt: skip
        mass = mass.to(tl.float32) * tl.exp2(top - normal)[:, None]
        score = tl.sum(mass * share[:, None], axis=0) + tl.max(mass, axis=0)
        found += (allowed & (score > least)).to(tl.int32)
        if FULL:
            tl.store(out + j, tl.where(allowed, score, float("-inf")), mask=j < columns)
        else:
            tl.store(out + j, score, mask=allowed)
    if counts is not None:
        tl.store(counts + bh.to(tl.int64) * q_blocks + i, tl.sum(found, axis=0))


class Room(NamedTuple):
    """What the chunks of one call share: sums and tops, as large as the largest chunk's."""

    sums: Tensor
    tops: Tensor


def room_for(sizes: Sizes, cut: tuple[Chunk, ...], like: Tensor) -> Room:
    """Room for any of the chunks, of inputs as ``like``."""
    rows = sizes.heads * sum(sizes.sketch[:2])
    sums = max((rows * chunk.height * aligned(chunk.width) for chunk in cut), default=0)
    tops = max((2 * rows * chunk.height * -(-chunk.width // sizes.tile.block_j) for chunk in cut), default=0)
    kind = torch.float16 if like.element_size() == 2 else torch.float32
    return Room(
        torch.empty(sums, dtype=kind, device=like.device), torch.empty(tops, dtype=torch.float32, device=like.device)
    )


def score_rows(
    queries: Tensor,
    keys: Tensor,
    rows: Tensor,
    restrictions: tuple[Tensor | None, ...],
    out: Tensor,
    chunk: Chunk,
    head_stride: int,
    row_stride: int,
    sizes: Sizes,
    room: Room,
    plan: Plan,
    *,
    full: bool,
    counts: Tensor | None = None,
    threshold: Tensor | float = 0.0,
) -> None:
    """Score one chunk into float32 ``out``: rows ``row_stride`` elements apart, heads (of B*Hq) ``head_stride``.

    Args:
        queries: proxies of the chunk's rows, as `Sizes.queries` lays them out; keys: of all key blocks,
            as `Sizes.keys` does.
        room: sums and tops, for this chunk or larger ones.
        restrictions: classes (int8, last stride 1), key_start, key_end, query_start, query_end, each may be None.
        full: write every pair of the chunk, -inf where the layout does not allow it; else only the allowed pairs.
        counts: int32 (B, Hq, Qb), contiguous, or None: gets how many allowed pairs of each of the chunk's rows score
            above ``threshold``, a number or a float32 tensor of three dimensions that broadcasts to (B, Hq, Qb).
    """
    planes = sizes.queries(chunk.height), sizes.keys
    classes, key_start, key_end, query_start, query_end = restrictions
    class_strides = broadcast_strides(classes)
    sum_tiles(
        queries, keys, room.sums, room.tops, rows, (classes, key_start, key_end), class_strides, planes, chunk,
        sizes.batch, plan, sizes.tile,
    )  # fmt: skip
    per_row = sum(sizes.sketch[:2])
    tiles = -(-chunk.width // sizes.tile.block_j)
    levels = threshold if isinstance(threshold, Tensor) else None
    args = (
        room.sums, room.tops, rows, classes, query_start, query_end, out, levels, counts,
        0.0 if levels is not None else threshold, sizes.q_blocks, sizes.q_len, chunk.row, chunk.height, chunk.width,
        sizes.k_blocks, aligned(chunk.width), tiles, sizes.heads * chunk.height * per_row * tiles, head_stride,
        row_stride, rows.stride(0) if rows.shape[0] > 1 else 0, *class_strides, *broadcast_strides(levels),
    )  # fmt: skip
    launch(_read_kernel, sizes.heads * chunk.height, args, _read_meta(sizes, full), plan, ("masses", chunk.row))


@lru_cache(maxsize=1024)
def _read_meta(sizes: Sizes, full: bool) -> dict[str, object]:
    proxies_of_row = sum(sizes.sketch[:2])
    return dict(
        Q_HEADS=sizes.q_heads, P=proxies_of_row, P_UP=triton.next_power_of_2(proxies_of_row),
        OUTLIERS=sizes.sketch.query_outliers, BLOCK=sizes.block_q, FULL=full, BLOCK_J=sizes.tile.block_j, TILES=16,
        num_warps=max(1, sizes.tile.block_j // KEY_BLOCKS_PER_WARP),
    )  # fmt: skip


def broadcast_strides(x: Tensor | None) -> tuple[int, int, int]:
    """(batch, head, row) strides of a tensor that broadcasts over them; 0 for sizes of 1 and for None."""
    if x is None:
        return 0, 0, 0
    batch, head, row = (step if size > 1 else 0 for size, step in zip(x.shape[:3], x.stride()[:3], strict=True))
    return batch, head, row
