"""A fine sketch of the blocks that a coarse one proposes: score cost that grows with what rows keep, not with Kb.

The coarse sketch, a few of the fine one's outliers and the block's mean on either side, has scored every pair
(`sketch_mass`). Of row I with the threshold t, what scores above t / SLACK is proposed, or above the smallest doubling
of it that leaves at most `Fine.capacity` blocks. The proposed pairs C get the fine sketch's sums, and

    L[a, J]    = log2 sum_{b in J} exp s[a, b]                                     s: logits as in `sketch_sums`
    M[a, J]    = share[a] exp2 L[a, J] / sum_{J in C} exp2 L[a, J]                 score[I, J] as in `sketch_mass`
    share[a]   = max(own / (own + unseen[a']), 1 - unseen[a'] / all[a'])           own = sum_{J in C} exp2 L[a, J]

with all[a'] and unseen[a'] the coarse sums of the stand-in a' = min(a, coarse outliers), the same token where it is one
of the coarse sketch's outliers, else the block's mean, over all blocks and over those not in C. So what was not
proposed is in the denominator as the coarse sketch sees it, by its size or by its share, whichever takes away less: a
proxy whose logits lie far below its stand-in's would drown in the first, a sharp one beside a diffuse stand-in in the
second. Scores of proposed pairs are overwritten, the others stay coarse.

One program a query block, in three passes: over the row's scores, listing what is proposed; over the list, a tile of
blocks at a time, each proxy number of the keys gathered and multiplied in one product, while the coarse sums of the
tile and the next tile's list are on their way; over the list again, from L to scores. The list, `Fine.capacity` a row,
and L, as sums against the largest logit of their tile as in `sketch_sums`, lie in global memory and are read back by
the program that wrote them. A program is one warp: it waits for its gathers, and many of them fit a multiprocessor.
Two or four neighbouring rows a program, gathering the union of what they propose (1.2 times a row's for two), halve
the bytes from L2, and were slower (3.0 to 4.5 ms where one row a program then took 2.5): fewer warps fit.

Model, a head, with C proposed blocks a row of P x R proxies: ``2*D*P_UP*R * C*Qb`` operations, ``P*R * C*Qb`` exp2,
``R*D*e * C*Qb`` bytes of keys from L2 and ``4*P * C*Qb`` of L and coarse sums. 128K tokens of 32 heads, D=128, the
shipped model's q and k, threshold 0.05: 220 of a row's 512 blocks score above 1/SLACK of it on average, and 256 at most
are taken. 16 x 12 proxies and C = 190: 0.3 TFLOP and 19 GB from L2, most of what it can give: 2.25 ms on an H100.
"""

from functools import lru_cache
from math import exp, log2, sqrt
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from stem_flex.budget import SLACK
from stem_flex.kernels.launch import Plan, launch
from stem_flex.kernels.pool import INTERPRETED, _valid_range
from stem_flex.kernels.scores import Chunk, aligned
from stem_flex.kernels.sketch_mass import Sizes, _normal, _weights, broadcast_strides
from stem_flex.kernels.sketch_sums import _log_stood_for

# Tuning: blocks of a product, scores listed and blocks read back (whole products) at a time, warps, stages.
TILE = 32
SCAN = 512
READ = 64
WARPS = 1
STAGES = 3


class Fine(NamedTuple):
    """Sizes of the two sketches of one call, and the most blocks of a row that are proposed."""

    sizes: Sizes
    coarse: Sizes
    capacity: int


def places(capacity: int) -> int:
    """Places that a row's sums have, whole reads."""
    return -(-capacity // READ) * READ


@triton.jit
def _propose(
    scores, listed, kinds, low, high, bound, least, CAPACITY: tl.constexpr, SCAN: tl.constexpr
):  # fmt: skip
    """List the blocks of [low, high) that score above ``bound``; returns their number and that of those above
    ``least``. No more than CAPACITY are written."""
    found = low * 0
    above = low * 0
    for start in range(low // SCAN * SCAN, high, SCAN):
        j = start + tl.arange(0, SCAN)
        allowed = (j >= low) & (j < high)
        if kinds is not None:
            allowed = allowed & (tl.load(kinds + j, mask=allowed, other=0) > 0)
        score = tl.load(scores + j, mask=allowed, other=-1.0)
        proposed = (allowed & (score > bound)).to(tl.int32)
        place = found + tl.cumsum(proposed, axis=0) - 1
        tl.store(listed + place, j, mask=(proposed > 0) & (place < CAPACITY))
        found += tl.sum(proposed, axis=0)
        above += tl.sum((allowed & (score > least)).to(tl.int32), axis=0)
    return found, above


@triton.jit
def _sums(
    q, keys, plane, j, real_low, real_high, scale, OUTLIERS: tl.constexpr, MEANS: tl.constexpr, BLOCK: tl.constexpr,
    LOG_TOKENS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(sums, top): of every query proxy, sums * exp2(top) over the proxies of each of the key blocks ``j``."""
    top = tl.full((q.shape[0],), -1.0e30, tl.float32)
    sums = tl.zeros((q.shape[0], j.shape[0]), dtype=tl.float32)
    d = tl.arange(0, WIDTH)
    edge = (tl.min(j, axis=0) * BLOCK < real_low) | ((tl.max(j, axis=0) + 1) * BLOCK > real_high)
    for p in range(0, OUTLIERS + MEANS):
        k = tl.load(keys + p * plane + j[:, None] * WIDTH + d[None, :])
        if UPCAST:  # the interpreter's dot product takes bfloat16 for integers
            k = k.to(tl.float32)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        log_tokens = tl.where(p < OUTLIERS, 0.0, LOG_TOKENS)
        if edge:
            stood_for = _log_stood_for(p, j, real_low, real_high, OUTLIERS, MEANS, BLOCK)
            s += ((stood_for - log_tokens) / scale)[None, :]
        higher = tl.maximum(top, tl.max(s, axis=1) * scale + log_tokens)
        sums = sums * tl.exp2(top - higher)[:, None] + tl.exp2(s * scale + (log_tokens - higher)[:, None])
        top = higher
    return sums, top


@triton.jit
def _coarse_sums(sums, tops, at, sums_stride, tops_stride, j, real, exists, BLOCK_J: tl.constexpr):
    """(sums, top) of every proxy of the coarse sketch over each of the key blocks ``j``."""
    mask = exists[:, None] & real[None, :]
    value = tl.load(sums + (at * sums_stride)[:, None] + j[None, :], mask=mask, other=0.0)
    return value, tl.load(tops + (at * tops_stride)[:, None] + (j // BLOCK_J)[None, :], mask=mask, other=-1.0e30)


@triton.jit
def _of_stand_in(x, p, a, COARSE: tl.constexpr):
    """For every query proxy ``p`` its stand-in's element of ``x``, one for each proxy ``a`` of the coarse sketch."""
    return tl.sum(tl.where(tl.minimum(p, COARSE)[:, None] == a[None, :], x[None, :], 0.0), axis=1)


@triton.jit(
    do_not_specialize=["q_blocks", "q_len", "k_len", "row", "count", "width", "tops_stride", "tops_plane", "least"]
)
def _fine_kernel(
    queries, keys, sums, tops, rows, classes, key_start, key_end, query_start, query_end, scores, listed, found_sums,
    found_tops, threshold, counts, least, q_blocks, q_len, k_len, row, count, width, sums_stride, tops_stride,
    tops_plane, scores_stride_h, scores_stride_r, rows_stride_b, class_stride_b, class_stride_h, class_stride_r,
    least_stride_b, least_stride_h, least_stride_r, plane, scale,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, P_UP: tl.constexpr,
    OUTLIERS: tl.constexpr, K_OUTLIERS: tl.constexpr, K_MEANS: tl.constexpr, COARSE: tl.constexpr, A_UP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK: tl.constexpr, LOG_TOKENS: tl.constexpr, BLOCK_J: tl.constexpr, TILES: tl.constexpr,
    CAPACITY: tl.constexpr, PLACES: tl.constexpr, SLACK: tl.constexpr, SCAN: tl.constexpr, TILE: tl.constexpr,
    READ: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(b, kv head) slowest, then rows, last first, then the heads of the group: they gather from the same keys."""
    GROUP: tl.constexpr = Q_HEADS // KV_HEADS
    pid = tl.program_id(0)
    bkv = pid // (count * GROUP)
    b = (bkv // KV_HEADS).to(tl.int64)
    h = ((bkv % KV_HEADS) * GROUP + pid % GROUP).to(tl.int64)
    local = (count - 1 - pid // GROUP % count).to(tl.int64)
    i = row + local
    of_row = (b * Q_HEADS + h) * count + local
    ranges = rows + b * rows_stride_b + i * 8
    low = tl.maximum(tl.load(ranges), 0)
    high = tl.maximum(tl.minimum(tl.load(ranges + 1), width), low)
    if threshold is not None:
        least = tl.load(threshold + b * least_stride_b + h * least_stride_h + i * least_stride_r)
    kinds = classes
    if classes is not None:
        kinds = classes + (b * class_stride_b + h * class_stride_h + i * class_stride_r)
    scores += (b * Q_HEADS + h) * scores_stride_h + local * scores_stride_r
    listed += of_row * CAPACITY
    bound = least / (2 * SLACK)
    found = low * 0 + CAPACITY + 1
    above = low * 0
    while found > CAPACITY:
        bound = bound * 2
        found, above = _propose(scores, listed, kinds, low, high, bound, least, CAPACITY, SCAN)
    tl.debug_barrier()  # the list was written by other threads than those that read it

    p = tl.arange(0, P_UP)
    in_p = p < P
    query_low, query_high = _valid_range(query_start, query_end, b, q_len)
    real_low, real_high = _valid_range(key_start, key_end, b, k_len)
    q = tl.load(queries + of_row * (P * WIDTH) + p[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :],
                mask=in_p[:, None], other=0.0)  # fmt: skip
    if UPCAST:
        q = q.to(tl.float32)
    a = tl.arange(0, A_UP)
    exists = a <= COARSE
    at = of_row * (COARSE + 1) + tl.minimum(a, COARSE)
    first = low // BLOCK_J
    last = tl.where(high > low, tl.cdiv(high, BLOCK_J), first)
    normal = _normal(tops + tops_plane + at * tops_stride, exists, first, last, A_UP, TILES)
    keys += bkv.to(tl.int64) * (K_OUTLIERS + K_MEANS) * plane
    found_sums += of_row * (P * PLACES)
    found_tops += of_row * (P * (PLACES // TILE))
    seen = tl.zeros((A_UP,), dtype=tl.float32)
    top = tl.full((P_UP,), -1.0e30, tl.float32)
    total = tl.zeros((P_UP,), dtype=tl.float32)
    place = tl.arange(0, TILE)
    j = tl.load(listed + tl.minimum(place, tl.maximum(found, 1) - 1))  # past the end the last block, again
    for start in range(0, found, TILE):
        real = place < found
        coarse, coarse_top = _coarse_sums(sums, tops, at, sums_stride, tops_stride, j, real, exists, BLOCK_J)
        following = tl.load(listed + tl.minimum(place + TILE, found - 1))  # this and the coarse sums arrive meanwhile
        fine, fine_top = _sums(q, keys, plane, j, real_low, real_high, scale, K_OUTLIERS, K_MEANS, BLOCK, LOG_TOKENS,
                               WIDTH, PRECISION, UPCAST)  # fmt: skip
        fine = tl.where(real[None, :], fine, 0.0)
        tl.store(found_sums + p[:, None] * PLACES + place[None, :], fine.to(found_sums.dtype.element_ty),
                 mask=in_p[:, None])  # fmt: skip
        tl.store(found_tops + start // TILE * P + p, fine_top, mask=in_p)
        higher = tl.maximum(top, fine_top)
        total = total * tl.exp2(top - higher) + tl.sum(fine, axis=1) * tl.exp2(fine_top - higher)
        top = higher
        seen += tl.sum(coarse.to(tl.float32) * tl.exp2(coarse_top - normal[:, None]), axis=1)
        place += TILE
        j = following
    tl.debug_barrier()

    # where next to nothing was left unseen, what 1 - seen leaves of it is rounding: then ``seen`` is the larger share
    own = top + tl.log2(tl.where(total > 0, total, 1.0))
    unseen = normal + tl.log2(tl.maximum(1.0 - seen, 1.0e-30))
    seen = _of_stand_in(seen, p, a, COARSE)
    unseen = _of_stand_in(unseen, p, a, COARSE)
    share = tl.maximum(1.0 / (1.0 + tl.exp2(tl.minimum(unseen - own, 126.0))), seen)
    normal = own - tl.log2(tl.where(share > 0, share, 1.0))
    weight = _weights(p, i.to(tl.int32), query_low, query_high, P, OUTLIERS, BLOCK_Q)
    part = weight / tl.maximum(tl.sum(weight, axis=0), 1.0)
    kept = tl.where(bound >= least, above - found, 0)  # coarse scores above the threshold, where that many are
    tile, place = tl.arange(0, READ // TILE), tl.arange(0, TILE)
    for start in range(0, found, READ):
        c = start + tile[:, None] * TILE + place[None, :]
        real = c < found
        block = tl.load(listed + c, mask=real, other=0)
        # past the end of the list too, to read whole lines
        fine = tl.load(found_sums + p[:, None, None] * PLACES + c[None, :, :], mask=(weight > 0)[:, None, None],
                       other=0.0)  # fmt: skip
        fine_top = tl.load(found_tops + (start // TILE + tile)[None, :] * P + p[:, None], mask=(weight > 0)[:, None],
                           other=-1.0e30)  # fmt: skip
        mass = fine.to(tl.float32) * tl.exp2(fine_top - normal[:, None])[:, :, None]
        score = tl.sum(mass * part[:, None, None], axis=0) + tl.max(mass, axis=0)
        tl.store(scores + block, score, mask=real)
        kept += tl.sum(tl.sum((real & (score > least)).to(tl.int32), axis=1), axis=0)
    if counts is not None:
        tl.store(counts + (b * Q_HEADS + h) * q_blocks + i, kept)


@lru_cache(maxsize=1024)
def _fine_meta(fine: Fine, item_size: int) -> tuple[float, dict[str, object]]:
    """scale in base 2, and the compile-time arguments."""
    sizes, proxies = fine.sizes, sum(fine.sizes.sketch[:2])
    _, _, key_outliers, key_means = sizes.sketch
    return log2(exp(1)) / sqrt(sizes.head_dim), dict(
        Q_HEADS=sizes.q_heads, KV_HEADS=sizes.kv_heads, WIDTH=sizes.keys.width, P=proxies,
        P_UP=max(16, triton.next_power_of_2(proxies)), OUTLIERS=sizes.sketch.query_outliers, K_OUTLIERS=key_outliers,
        K_MEANS=key_means, COARSE=fine.coarse.sketch.query_outliers,
        A_UP=triton.next_power_of_2(fine.coarse.sketch.query_outliers + 1), BLOCK_Q=sizes.block_q, BLOCK=sizes.block_k,
        LOG_TOKENS=log2(sizes.block_k / key_means), BLOCK_J=sizes.tile.block_j, TILES=16, CAPACITY=fine.capacity,
        PLACES=places(fine.capacity), SLACK=SLACK, SCAN=SCAN, TILE=TILE, READ=READ,
        PRECISION="ieee" if item_size == 4 else "tf32", UPCAST=INTERPRETED, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip


def decide(
    queries: Tensor,
    keys: Tensor,
    sums: Tensor,
    tops: Tensor,
    rows: Tensor,
    restrictions: tuple[Tensor | None, ...],
    scores: Tensor,
    listed: Tensor,
    found_sums: Tensor,
    found_tops: Tensor,
    chunk: Chunk,
    head_stride: int,
    row_stride: int,
    fine: Fine,
    plan: Plan,
    *,
    counts: Tensor | None,
    threshold: Tensor | float,
) -> None:
    """Overwrite the coarse scores of what they propose, see the module.

    Args:
        queries, keys: the fine sketch's proxies, of the chunk's rows and of all key blocks.
        sums, tops: of the coarse sketch, as `sketch_mass.score_rows` left them for this chunk.
        restrictions: classes (int8, last stride 1), key_start, key_end, query_start, query_end, each may be None.
        scores: float32, the chunk's coarse scores, rows ``row_stride`` elements apart, heads ``head_stride``.
        listed: int32, ``fine.capacity`` a row of the chunk.
        found_sums: ``sums``' dtype, `places` for each query proxy; found_tops: float32, one for TILE of them.
        counts: int32 (B, Hq, Qb), contiguous, or None: gets how many pairs of each row score above the threshold.
        threshold: a number, or a float32 tensor of three dimensions that broadcasts to (B, Hq, Qb).
    """
    scale, meta = _fine_meta(fine, queries.element_size())
    sizes, coarse = fine.sizes, fine.coarse
    classes, key_start, key_end, query_start, query_end = restrictions
    levels = threshold if isinstance(threshold, Tensor) else None
    columns = -(-chunk.width // sizes.tile.block_j)
    args = (
        queries, keys, sums, tops, rows, classes, key_start, key_end, query_start, query_end, scores, listed,
        found_sums, found_tops, levels, counts, 0.0 if levels is not None else threshold, sizes.q_blocks, sizes.q_len,
        sizes.k_len, chunk.row, chunk.height, chunk.width, aligned(chunk.width), columns,
        sizes.heads * chunk.height * sum(coarse.sketch[:2]) * columns, head_stride, row_stride,
        rows.stride(0) if rows.shape[0] > 1 else 0, *broadcast_strides(classes), *broadcast_strides(levels),
        sizes.keys.stride_p, scale,
    )  # fmt: skip
    launch(_fine_kernel, sizes.heads * chunk.height, args, meta, plan, ("fine", chunk.row))
