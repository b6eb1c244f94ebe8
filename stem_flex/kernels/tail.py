"""Attention of a prompt's last queries, summed over them by key and by diagonal: for MInference and FlexPrefill.

With w[r, n] the softmax of query r over the keys, a column is ``sum over r of w[r, n]``, a diagonal the sum of the
w[r, n] whose query and key are as far apart. Two kernels, each over runs of RUN keys of one head:

1. `_normalisers_kernel`: the logarithm of each row's sum of exponentials over the run. PyTorch adds the runs up.
2. `_tail_sums_kernel`: the logits again, exp of them less the row's normaliser; the sum over rows, and, row r of a tile
   turned left by r places, the sum over rows again: what was turned past the tile's start belongs to the tile before
   and goes to a plane of its own. Nothing is added in memory.

Model, a head of R queries: ``4 R N D`` FLOPs, the keys read twice, from L2 for the other heads of the group, and three
planes of ``4 N`` bytes for every ROWS queries (3 GB for 256 queries of 64 heads at 1M keys). 128 queries of 32 heads
and 128K keys of 8 (bfloat16): 0.27 TFLOP, 0.5 G exponentials twice; 1.9 ms of an H100, most of it the turning, which
goes through shared memory: steps of 128 keys take 3.4 ms. PyTorch alone moves the weights, 2.1 GB, some six times, 7.3.
"""

from functools import lru_cache
from math import e, log2

import torch
import triton
import triton.language as tl
from torch import Tensor

from stem_flex.kernels.launch import launch, plan_of
from stem_flex.kernels.ops import _check_inputs, _guard
from stem_flex.kernels.pool import INTERPRETED

# Tuning: keys of a program, keys of a step, at least as many as rows; rows of a program, of 2 bytes and of 4.
RUN = 2048
KEYS = 64
ROWS, FLOAT_ROWS = 64, 32

LOG2_E = tl.constexpr(log2(e))


@triton.jit
def _logits(queries, k, key, k_row, k_len, start, end, scale, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
            PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """(rows, keys) logits to the base of 2, -inf outside each row's span."""
    dim = tl.arange(0, BLOCK_D)
    inside = (key < k_len)[:, None] & (dim < DIM)[None, :]
    keys = tl.load(k + key.to(tl.int64)[:, None] * k_row + dim[None, :], mask=inside, other=0.0)
    keys = keys.to(tl.float32) if UPCAST else keys
    s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
    return tl.where((key[None, :] >= start[:, None]) & (key[None, :] < end[:, None]), s, float("-inf"))


@triton.jit
def _place(pid, runs, chunks, KV_HEADS: tl.constexpr, GROUP: tl.constexpr):
    """Batch row, KV head, query head, run and chunk of rows of a program; those that share keys are neighbours."""
    chunk = pid % chunks
    pid = pid // chunks
    member = pid % GROUP
    pid = pid // GROUP
    run = pid % runs
    pid = pid // runs
    kv_head = pid % KV_HEADS
    return pid // KV_HEADS, kv_head, kv_head * GROUP + member, run, chunk


@triton.jit
def _operands(q, k, starts, ends, b, h, kv_head, row, rows, span_batch, q_batch, q_head, q_row, k_batch, k_head,
              DIM: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """The queries of a program, where its keys begin, and each row's span, empty beyond the last."""
    dim = tl.arange(0, BLOCK_D)
    in_rows = row < rows
    at = q + b.to(tl.int64) * q_batch + h.to(tl.int64) * q_head + row.to(tl.int64)[:, None] * q_row + dim[None, :]
    queries = tl.load(at, mask=in_rows[:, None] & (dim < DIM)[None, :], other=0.0)
    queries = queries.to(tl.float32) if UPCAST else queries
    start = tl.load(starts + b * span_batch + row, mask=in_rows, other=0)
    end = tl.load(ends + b * span_batch + row, mask=in_rows, other=0)
    return queries, k + b.to(tl.int64) * k_batch + kv_head.to(tl.int64) * k_head, start, end


@triton.jit(do_not_specialize=["runs", "rows", "chunks"])
def _normalisers_kernel(
    q, k, starts, ends, logs, runs, chunks, rows, k_len, span_batch, q_batch, q_head, q_row, k_batch, k_head, k_row,
    scale, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, RUN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``logs`` (B * Hq, chunks, runs, BLOCK_R)."""
    b, kv_head, h, run, chunk = _place(tl.program_id(0), runs, chunks, KV_HEADS, GROUP)
    row = chunk * BLOCK_R + tl.arange(0, BLOCK_R)
    queries, k, start, end = _operands(q, k, starts, ends, b, h, kv_head, row, rows, span_batch, q_batch, q_head, q_row,
                                       k_batch, k_head, DIM, BLOCK_D, UPCAST)  # fmt: skip
    top = tl.full((BLOCK_R,), -1.0e30, tl.float32)
    upto = tl.zeros((BLOCK_R,), tl.float32)
    for first in range(run * RUN, tl.minimum((run + 1) * RUN, k_len), BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        s = _logits(queries, k, key, k_row, k_len, start, end, scale, DIM, BLOCK_D, PRECISION, UPCAST)
        higher = tl.maximum(top, tl.max(s, 1))
        upto = upto * tl.exp2(top - higher) + tl.sum(tl.exp2(s - higher[:, None]), 1)
        top = higher
    found = tl.where(upto == 0, float("-inf"), (top + tl.log2(upto)) / LOG2_E)  # NaN stays
    at = (((b * KV_HEADS * GROUP + h) * chunks + chunk) * runs + run).to(tl.int64) * BLOCK_R
    tl.store(logs + at + tl.arange(0, BLOCK_R), found)


@triton.jit(do_not_specialize=["runs", "rows", "chunks"])
def _tail_sums_kernel(
    q, k, starts, ends, normalisers, columns, diagonals, before, runs, chunks, rows, k_len, span_batch, q_batch, q_head,
    q_row, k_batch, k_head, k_row, scale, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, RUN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """``columns``, ``diagonals`` and ``before`` (B * Hq, chunks, runs * RUN); the last two by key place less row."""
    b, kv_head, h, run, chunk = _place(tl.program_id(0), runs, chunks, KV_HEADS, GROUP)
    local = tl.arange(0, BLOCK_R)
    queries, k, start, end = _operands(q, k, starts, ends, b, h, kv_head, chunk * BLOCK_R + local, rows, span_batch,
                                       q_batch, q_head, q_row, k_batch, k_head, DIM, BLOCK_D, UPCAST)  # fmt: skip
    head = ((b * KV_HEADS * GROUP + h) * chunks + chunk).to(tl.int64)
    normaliser = tl.load(normalisers + head * BLOCK_R + local) * LOG2_E
    normaliser = tl.where(normaliser == float("-inf"), float("inf"), normaliser)  # a row that sees nothing
    at = head * runs * RUN
    place = tl.arange(0, BLOCK_N)
    turned = place[None, :] + local[:, None]
    for first in range(run * RUN, tl.minimum((run + 1) * RUN, k_len), BLOCK_N):
        key = first + place
        s = _logits(queries, k, key, k_row, k_len, start, end, scale, DIM, BLOCK_D, PRECISION, UPCAST)
        weight = tl.exp2(s - normaliser[:, None])
        tl.store(columns + at + key, tl.sum(weight, 0))
        weight = tl.gather(weight, turned % BLOCK_N, 1)
        tl.store(diagonals + at + key, tl.sum(tl.where(turned < BLOCK_N, weight, 0.0), 0))
        tl.store(before + at + key, tl.sum(tl.where(turned < BLOCK_N, 0.0, weight), 0))


@lru_cache(maxsize=64)
def _meta(heads: tuple[int, int], rows: int, dim: int, size: int) -> tuple[dict[str, object], int]:
    """Compile-time arguments and options, and the rows of a program."""
    block_d = max(16, triton.next_power_of_2(dim))
    most = FLOAT_ROWS if size == 4 else ROWS
    block_r = min(most, max(16, 1 << (rows - 1).bit_length()))
    return dict(
        KV_HEADS=heads[1], GROUP=heads[0] // heads[1], DIM=dim, BLOCK_D=block_d, RUN=RUN, BLOCK_R=block_r, BLOCK_N=KEYS,
        PRECISION="ieee" if size == 4 else "tf32", UPCAST=INTERPRETED, num_warps=4, num_stages=2,
    ), block_r  # fmt: skip


def tail_sums(q: Tensor, k: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the softmax of a few queries over key columns and over diagonals.

    Args:
        q: (B, Hq, R, D); k: (B, Hkv, Lk, D), one dtype of float16, bfloat16, float32.
        start, end: int32 (1 or B, R), the keys of each query; none where they are equal.

    Returns:
        float32 (B, Hq, Lk) by key, and (B, Hq, R + Lk) by key place less row: entry i for ``n - r = i - R``.

    Raises:
        TypeError: another dtype.
    """
    q, k = (x.detach() if x.stride(-1) == 1 else x.detach().contiguous() for x in (q, k))
    _check_inputs("q and k", q=q, k=k)
    batch, heads, rows, dim = q.shape
    length = k.shape[2]
    start, end = (x.expand(max(start.shape[0], end.shape[0]), rows).contiguous() for x in (start, end))
    meta, block = _meta((heads, k.shape[1]), rows, dim, q.element_size())
    chunks, runs = -(-rows // block), -(-length // RUN)
    logs = q.new_empty(batch * heads, chunks, runs, block, dtype=torch.float32)
    planes = q.new_zeros(3, batch, heads, chunks, runs * RUN, dtype=torch.float32)
    sizes = (runs, chunks, rows, length, rows if start.shape[0] > 1 else 0)
    given = (*sizes, *q.stride()[:3], *k.stride()[:3], dim**-0.5 * log2(e))
    aligned = tuple(x.data_ptr() % 16 for x in (q, k, start, end))
    plan = plan_of((_tail_sums_kernel, q.device, q.dtype, given, aligned, *meta.items()))
    with _guard(q):
        programs = batch * heads * runs * chunks
        launch(_normalisers_kernel, programs, (q, k, start, end, logs, *given), meta, plan, "normalisers")
        normalisers = logs.logsumexp(2)
        launch(_tail_sums_kernel, programs, (q, k, start, end, normalisers, *planes, *given), meta, plan, "sums")
    columns, own, before = planes.unbind(0)
    diagonals = planes.new_zeros(batch, heads, rows + length)
    for chunk in range(chunks):
        shift = rows - chunk * block
        _add(diagonals, own[:, :, chunk], shift)
        _add(diagonals, before[:, :, chunk], shift - KEYS)
    return columns[..., :length].sum(2), diagonals


def _add(whole: Tensor, part: Tensor, shift: int) -> None:
    """``part`` (B, H, N) onto ``whole`` from its ``shift``-th entry on; what falls outside is zero."""
    part = part[..., max(0, -shift) :][..., : whole.shape[-1] - max(0, shift)]
    whole[..., max(0, shift) :][..., : part.shape[-1]] += part
