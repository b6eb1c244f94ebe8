"""Exact top-k of score rows, written straight into compact ascending index tables.

One program selects one row (b, h, I), held in registers:

1. Candidates are the allowed blocks lo <= J < hi (of class > 0 where a class table is given). Scores become int32 keys
   in score order, -0.0 = 0.0, NaN below -inf.
2. Unless the budget covers every candidate, a search over keys keeps ``count(key >= low) > k > count(key >= high)``
   and stops when a threshold admits exactly k. The first INTERPOLATIONS steps interpolate the logarithm of the count
   by Illinois' method (about 9 steps for 1K-8K smooth scores), the rest bisect the key bits (at most 32): exact
   whatever the scores are. Ties at the threshold go to the lower index by a cumulative count, only where there are any.
3. Forced blocks join. Kept flags are packed into 32-bit words, one warp-wide reduction each; counting bits below a
   flag, and a cumulative sum over the words, gives its place in the list.

A row's work follows its own candidates, not the widest row's: BLOCK halves up to LEVELS-1 times.

Table (one int32 buffer, `width` columns a row): the partial list starts at column 0, the full list at column
``partial_columns``. An interval row with more partial blocks than that has no full ones, so its list may run on.

Model, a row of c candidates, k kept: reads 4*c bytes of scores (1 more with classes) and 32 of ``rows``; ~2*c integer
operations a search step, about 9 steps and at most 48; writes 4*k + 8 bytes. 128K tokens, 32 heads: 67 MB in, 17 MB
out, ~0.3 G operations a step.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from stem_flex.kernels.launch import Plan, launch
from stem_flex.kernels.topk import DROPPED, NO_KEY, ranks_of, to_key, top_k, words_of

# Tuning: rows up to ONE_WARP candidates take one warp (32 keys a thread, no barriers), wider ones a warp for every
# CANDIDATES_PER_WARP, up to MAX_WARPS; halvings + 1; smallest BLOCK compiled; guessed search steps.
ONE_WARP = 1024
CANDIDATES_PER_WARP = 512
MAX_WARPS = 16
LEVELS = 3
REGISTERS_ONE_WARP = 96  # most registers a thread: more rows on a multiprocessor hide each other's waits
REGISTERS = 64
SMALLEST_BLOCK = 256
INTERPOLATIONS = 16

MAX_CANDIDATES = 32768
"""Widest candidate range of one row (key blocks)."""


@triton.jit
def _scatter(table, column, j, mask, BLOCK: tl.constexpr):
    """table[column] = j where ``mask``.

    Flat: of a store in two dimensions whose places it cannot foresee, Triton 3.6 turns the tile over in shared memory,
    so that a warp would write 32 places far from each other.
    """
    column = tl.reshape(column, (BLOCK,))
    tl.store(table + column, tl.reshape(j, (BLOCK,)), mask=tl.reshape(mask, (BLOCK,)))


@triton.jit
def _keep(key, least, j, sink_high, own_low, own_high):
    """The keys that reach the threshold or are forced."""
    forced = (j < sink_high) | ((j >= own_low) & (j < own_high))
    # Raising the forced keys leaves `keep` one comparison away wherever it is needed, with no mask to hold.
    key = tl.where(forced & (key > NO_KEY), 2147483647, key)
    return key >= least


@triton.jit
def _write_classes(
    table, partial_count, full_count, classes, key, least, j, sink_high, own_low, own_high, width, partial_columns,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A row whose full blocks a class table names."""
    keep = _keep(key, least, j, sink_high, own_low, own_high)
    # One list after the other: holding both sets of ranks at once would double the registers.
    is_full = tl.load(classes + j, mask=keep, other=0) == 2
    rank, so_far = ranks_of(words_of(keep & is_full))
    n_full = tl.max(so_far, axis=0)
    _scatter(table + partial_columns, rank, j, keep & is_full & (rank < width - partial_columns), BLOCK)
    rank, so_far = ranks_of(words_of(keep & (is_full == 0)))
    partial_room = tl.where(n_full > 0, partial_columns, width)
    _scatter(table, rank, j, keep & (is_full == 0) & (rank < partial_room), BLOCK)
    tl.store(partial_count, tl.minimum(tl.max(so_far, axis=0), partial_room))
    tl.store(full_count, tl.minimum(n_full, width - partial_columns))


@triton.jit
def _write_interval(
    table, partial_count, full_count, key, least, j, sink_high, own_low, own_high, full_low, full_high, width,
    partial_columns, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row whose full blocks are [full_low, full_high): a run of the kept ones, so one set of ranks serves both."""
    keep = _keep(key, least, j, sink_high, own_low, own_high)
    rank, so_far = ranks_of(words_of(keep))
    is_full = (j >= full_low) & (j < full_high)
    n_full = tl.sum((keep & is_full).to(tl.int32))
    n_before = tl.sum((keep & (j < full_low)).to(tl.int32))
    n_partial = tl.max(so_far, axis=0) - n_full
    partial_room = tl.where(n_full > 0, partial_columns, width)
    shift = tl.where(j < full_low, 0, tl.where(j < full_high, partial_columns - n_before, -n_full))
    column = rank + shift
    _scatter(table, column, j, keep & (column < tl.where(is_full, width, partial_room)), BLOCK)
    tl.store(partial_count, tl.minimum(n_partial, partial_room))
    tl.store(full_count, tl.minimum(n_full, width - partial_columns))


@triton.jit
def _write_run(
    table, partial_count, full_count, key, least, j, sink_high, own_low, full_high, n_partial, width, partial_columns,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A row whose partial blocks are the last n_partial <= 32, all forced (causal rows): they need no ranks."""
    forced = (j < sink_high) | (j >= own_low)
    word = words_of(((key >= least) | forced) & (key > NO_KEY) & (j < full_high))
    rank, so_far = ranks_of(word)
    bit = (1 << tl.arange(0, 32)).to(tl.uint32)
    keep = (word[:, None] & bit[None, :]) != 0
    _scatter(table + partial_columns, rank, j, keep & (rank < width - partial_columns), BLOCK)
    at = tl.arange(0, 32)
    tl.store(table + at, full_high + at, mask=at < n_partial)
    tl.store(partial_count, n_partial)
    # The last word's count is the total: no reduction over the program for it.
    words: tl.constexpr = BLOCK // 32
    of_row = tl.arange(0, words)
    tl.store(full_count + of_row * 0, tl.minimum(so_far, width - partial_columns), mask=of_row == words - 1)


@triton.jit
def _select_row(
    scores, classes, table, partial_count, full_count, low, high, first, full_low, full_high, own_low, own_high,
    k, sink, local, width, partial_columns, INTERPOLATIONS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Select one row whose candidates lie in [first, first + BLOCK)."""
    j = first + tl.arange(0, BLOCK // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    high = tl.minimum(high, first + BLOCK)
    candidate = (j >= low) & (j < high)
    score = tl.load(scores + j, mask=candidate, other=0.0)
    n = high - low
    if classes is not None:
        candidate = candidate & (tl.load(classes + j, mask=candidate, other=0) > 0)
        n = tl.sum(candidate.to(tl.int32))
        low = tl.min(tl.where(candidate, j, 2147483647 - sink))  # sinks start at this head's first candidate
    key = tl.where(candidate, to_key(score), NO_KEY)
    least = n * 0 + DROPPED + 1
    if k < n:
        key, least = top_k(key, n, k, INTERPOLATIONS)
    own_low = tl.minimum(own_low, own_high - local)  # from here to own_high all are forced
    full_high = tl.minimum(tl.maximum(full_high, low), high)
    n_partial = high - full_high
    if classes is not None:
        _write_classes(
            table, partial_count, full_count, classes, key, least, j, low + sink, own_low, own_high, width,
            partial_columns, BLOCK,
        )  # fmt: skip
    elif (
        (full_low <= low) & (own_low <= full_high) & (high <= own_high) & (n_partial <= tl.minimum(partial_columns, 32))
    ):
        _write_run(
            table, partial_count, full_count, key, least, j, low + sink, own_low, full_high, n_partial, width,
            partial_columns, BLOCK,
        )  # fmt: skip
    else:
        _write_interval(
            table, partial_count, full_count, key, least, j, low + sink, own_low, own_high, full_low, full_high, width,
            partial_columns, BLOCK,
        )  # fmt: skip


# Scores' strides are not specialised either: told that rows are aligned, Triton would spread four candidates a thread,
# and reshuffle them all for the store; so a warp reads and writes 32 neighbours, one each.
@triton.jit(
    do_not_specialize=["heads", "q_blocks", "k_blocks", "row", "count", "width", "sink", "local", "partial",
                       "score_stride_b", "score_stride_h", "score_stride_r"],
)  # fmt: skip
def _select_kernel(
    scores, rows, budget, classes, buffer, counts, heads, q_blocks, k_blocks, row, count,
    score_stride_b, score_stride_h, score_stride_r, rows_stride_b,
    budget_stride_b, budget_stride_h, budget_stride_r, class_stride_b, class_stride_h, class_stride_r,
    sink, local, width, partial,
    Q_HEADS: tl.constexpr, INTERPOLATIONS: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row, last (widest, if causal) rows first, heads side by side. ``heads`` is B*Hq."""
    pid = tl.program_id(0)
    bh = pid % heads
    local_row = count - 1 - pid // heads
    i = row + local_row
    b = bh // Q_HEADS
    h = bh % Q_HEADS
    ranges = rows + b.to(tl.int64) * rows_stride_b + i * 8
    low = tl.maximum(tl.load(ranges), 0)
    high = tl.maximum(tl.minimum(tl.load(ranges + 1), k_blocks), low)
    full_low = tl.load(ranges + 2)
    full_high = tl.load(ranges + 3)
    own_low = tl.load(ranges + 4)
    own_high = tl.load(ranges + 5)
    b64 = b.to(tl.int64)
    h64 = h.to(tl.int64)
    i64 = i.to(tl.int64)
    k = tl.maximum(tl.load(budget + b64 * budget_stride_b + h64 * budget_stride_h + i64 * budget_stride_r), 0)
    source = scores + b64 * score_stride_b + h64 * score_stride_h + local_row.to(tl.int64) * score_stride_r
    kinds = classes
    if classes is not None:
        kinds = classes + b64 * class_stride_b + h64 * class_stride_h + i64 * class_stride_r
    at = bh.to(tl.int64) * q_blocks + i
    table = buffer + at * width
    partial_count = counts + at
    full_count = partial_count + heads.to(tl.int64) * q_blocks
    first = low // 32 * 32
    span = high - first
    if LEVELS >= 3:
        if span <= BLOCK // 4:
            _select_row(source, kinds, table, partial_count, full_count, low, high, first, full_low, full_high,
                        own_low, own_high, k, sink, local, width, partial, INTERPOLATIONS, BLOCK // 4)  # fmt: skip
        elif span <= BLOCK // 2:
            _select_row(source, kinds, table, partial_count, full_count, low, high, first, full_low, full_high,
                        own_low, own_high, k, sink, local, width, partial, INTERPOLATIONS, BLOCK // 2)  # fmt: skip
        else:
            _select_row(source, kinds, table, partial_count, full_count, low, high, first, full_low, full_high,
                        own_low, own_high, k, sink, local, width, partial, INTERPOLATIONS, BLOCK)  # fmt: skip
    else:
        _select_row(source, kinds, table, partial_count, full_count, low, high, first, full_low, full_high,
                    own_low, own_high, k, sink, local, width, partial, INTERPOLATIONS, BLOCK)  # fmt: skip


@lru_cache(maxsize=1024)
def _select_meta(q_heads: int, span: int) -> dict[str, object]:
    """Compile-time arguments for rows whose candidates span at most ``span`` key blocks."""
    block = max(SMALLEST_BLOCK, triton.next_power_of_2(span))
    warps = 1 if block <= ONE_WARP else min(MAX_WARPS, block // CANDIDATES_PER_WARP)
    return dict(
        Q_HEADS=q_heads, INTERPOLATIONS=INTERPOLATIONS, LEVELS=LEVELS, BLOCK=block, num_warps=warps,
        maxnreg=REGISTERS_ONE_WARP if warps == 1 else REGISTERS,
    )  # fmt: skip


def empty_tables(batch: int, heads: int, q_blocks: int, k_blocks: int, partial_columns: int, width: int, like: Tensor):
    """Uninitialised (buffer, counts): int32 (B*H*Qb*width + Kb + partial_columns,) and (2, B, H, Qb).

    The Kb + partial_columns trailing ints keep views of logical width Kb inside the buffer.
    """
    size = batch * heads * q_blocks * width + k_blocks + partial_columns
    buffer = torch.empty(size, dtype=torch.int32, device=like.device)
    counts = torch.empty((2, batch, heads, q_blocks), dtype=torch.int32, device=like.device)
    return buffer, counts


def select_rows(
    scores: Tensor,
    score_strides: tuple[int, int, int],
    rows: Tensor,
    budget: Tensor,
    budget_strides: tuple[int, int, int],
    classes: Tensor | None,
    class_strides: tuple[int, int, int],
    buffer: Tensor,
    counts: Tensor,
    plan: Plan,
    *,
    row: int,
    count: int,
    k_blocks: int,
    span: int,
    sink: int,
    local: int,
    partial_columns: int,
    width: int,
) -> None:
    """Select rows [row, row + count) of every head from float32 ``scores`` into ``buffer`` and ``counts``.

    ``score_strides`` are (batch, head, row) strides, row ``row`` of a head lying at its start. ``span`` bounds
    ``hi - lo // 32 * 32`` over the rows.
    """
    _, batch, heads, q_blocks = counts.shape
    args = (
        scores, rows, budget, classes, buffer, counts, batch * heads, q_blocks, k_blocks, row, count,
        *score_strides, rows.stride(0) if rows.shape[0] > 1 else 0, *budget_strides, *class_strides,
        sink, local, width, partial_columns,
    )  # fmt: skip
    launch(_select_kernel, batch * heads * count, args, _select_meta(heads, span), plan, ("select", row))
