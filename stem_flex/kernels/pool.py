"""Pool q, k and v in one launch: phase means of every block, magnitudes of every group of values.

Block I of BQ queries splits into s phases; its flat vector is the s phase means one after the other,

    q_flat[I] = [mean_t q[BQ*I + g + t*s]  for g = 0 .. s-1]          n = BQ/s terms each
    k_flat[J] = [mean_t k[BK*J + r + t*s]  for r = s-1 .. 0]          the same, phases reversed

so that ``q_flat[I] . k_flat[J]`` is the sum over antidiagonals of Stem's routing score. Tokens outside the valid range
count as zeros and the divisor stays n. Means are accumulated in float32 and stored in the input's dtype (16-bit inputs)
or float32.

A value group is s consecutive keys, ``m`` its largest L2 norm over valid keys and ``l = ln(m + 1e-6)``.

Outputs, two 1-D tensors (a few large allocations cost less time than many small ones):

* ``flats``, input dtype: q_flat (B, Hq, Qb, s*D') and behind it k_flat (B, Hkv, Kb, s*D'), see `Sizes`.
* ``stats``, float32, planes over G = B*Hkv*Kb key blocks:
  bias [0, G), then for ``"zscore"`` count, mean, M2 of the block's complete groups' l [G, 4G), and l itself
  [4G, 4G + G*n), -inf where a group has no valid key.  ``"log"`` needs no statistics: the bias is written here.

Model (e = bytes an element): reads every valid byte of q, k, v once, ``e*(B*Hq*Lq*D + B*Hkv*Lk*(D+Dv))``; writes
``e*s*D'*(B*Hq*Qb + B*Hkv*Kb) + 4*G*(n+3)`` bytes (s/BQ of what it reads: 1/16 at s=8); ~2 operations an element. It is
bound by memory: 1.6 GB at 128K tokens of 32/8 heads, D=128, 16 bit.
"""

from functools import lru_cache
from os import environ
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stem_flex.kernels.launch import Plan, launch

# Tuning: elements a thread loads at a time, most warps a program, value dims squared at a time.
ELEMENTS_PER_THREAD = 4
MOST_WARPS = 8
VALUE_CHUNK = 64

INTERPRETED = environ.get("TRITON_INTERPRET") == "1"
"""Whether the kernels of this process run in Triton's interpreter, on CPU tensors: settled at import."""

METRICS = ("zscore", "log")


class Sizes(NamedTuple):
    """Sizes of one mask build. ``flat_dim`` is D' (D, or D rounded up to 16 where s*D is not a multiple of 16)."""

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    k_len: int
    head_dim: int
    value_dim: int
    block_q: int
    block_k: int
    stride: int
    q_blocks: int
    k_blocks: int
    flat_dim: int
    inner: int  # s * flat_dim, the GEMM's inner size
    q_flat: int  # elements of q_flat: where k_flat begins in `flats`
    flats: int  # elements of `flats`
    key_blocks: int  # G = B * Hkv * Kb
    groups: int  # value groups a key block, BK / s


@lru_cache(maxsize=4096)
def sizes_of(
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    value_dim: int,
    block_q: int,
    block_k: int,
    stride: int,
) -> Sizes:
    """Derive the sizes from the shapes of q (B, Hq, Lq, D) and k (B, Hkv, Lk, D)."""
    batch, q_heads, q_len, head_dim = q_shape
    kv_heads, k_len = k_shape[1], k_shape[2]
    q_blocks, k_blocks = -(-q_len // block_q), -(-k_len // block_k)
    flat_dim = head_dim if stride * head_dim % 16 == 0 else -(-head_dim // 16) * 16
    inner = stride * flat_dim
    q_flat = batch * q_heads * q_blocks * inner
    key_blocks = batch * kv_heads * k_blocks
    return Sizes(
        batch, q_heads, kv_heads, q_len, k_len, head_dim, value_dim, block_q, block_k, stride,
        q_blocks, k_blocks, flat_dim, inner, q_flat, q_flat + key_blocks * inner, key_blocks, block_k // stride,
    )  # fmt: skip


def stats_size(sizes: Sizes, metric: str, value_weight: float) -> int:
    """Elements of ``stats``; 1 where no bias is needed."""
    if value_weight == 0:
        return 1
    return sizes.key_blocks * (4 + sizes.groups) if metric == "zscore" else sizes.key_blocks


@triton.jit
def _locate(pid, heads, blocks, head_inner):
    """Program -> (batch, head, block), running along whichever of head and token lies closer in memory."""
    inner = tl.where(head_inner, heads, blocks)
    outer = tl.where(head_inner, blocks, heads)
    first = pid % inner
    second = (pid // inner) % outer
    batch = pid // (heads * blocks)
    head = tl.where(head_inner, first, second)
    block = tl.where(head_inner, second, first)
    return batch, head, block


@triton.jit
def _valid_range(start, end, batch, length):
    """Half-open range of the valid tokens of one batch row, cut to the tensor."""
    low = 0
    high = length
    if start is not None:
        low = tl.maximum(tl.load(start + batch), 0)
    if end is not None:
        high = tl.minimum(tl.load(end + batch), length)
    return low, high


@triton.jit
def _phase_means(
    x, first, low, high, stride_t, out, D: tl.constexpr, DP: tl.constexpr, FLAT_D: tl.constexpr,
    BLOCK: tl.constexpr, S: tl.constexpr, REVERSED: tl.constexpr,
):  # fmt: skip
    """Mean of each phase of the block at ``x`` (its first token is number ``first``) into ``out`` (S, FLAT_D).

    Each step adds S neighbouring tokens elementwise, so that no thread waits for another; unrolled, the loads of a
    whole block are in flight at once. Only edge blocks pay for masks.
    """
    r = tl.arange(0, S)
    d = tl.arange(0, DP)
    at = r.to(tl.int64)[:, None] * stride_t + d[None, :]
    step = S * stride_t.to(tl.int64)
    in_dim = (d < D)[None, :] & (r < S)[:, None]
    total = tl.zeros((S, DP), dtype=tl.float32)
    if (first >= low) & (first + BLOCK <= high):
        for t in tl.static_range(0, BLOCK // S):
            if D == DP:
                tile = tl.load(x + t * step + at)
            else:
                tile = tl.load(x + t * step + at, mask=in_dim, other=0.0)
            total += tile.to(tl.float32)
    else:
        for t in range(0, BLOCK // S):
            token = first + t * S + r
            keep = ((token >= low) & (token < high))[:, None] & in_dim
            total += tl.load(x + t * step + at, mask=keep, other=0.0).to(tl.float32)
    row = r
    if REVERSED:
        row = S - 1 - r
    mean = total * (S / BLOCK)
    tl.store(out + row[:, None] * FLAT_D + d[None, :], mean.to(out.dtype.element_ty), mask=(d < FLAT_D)[None, :])


@triton.jit
def _value_groups(
    x, first, low, high, stride_t, stats, block, G, value_weight, DV: tl.constexpr, DVP: tl.constexpr,
    DVC: tl.constexpr, BLOCK: tl.constexpr, S: tl.constexpr, ZSCORE: tl.constexpr,
):  # fmt: skip
    """Magnitudes of the value groups of the block at ``x``, number ``block`` of G, into the planes of ``stats``."""
    N: tl.constexpr = BLOCK // S
    token = tl.arange(0, BLOCK)
    keep = (first + token >= low) & (first + token < high)
    square = tl.zeros((BLOCK,), dtype=tl.float32)
    for d0 in tl.static_range(0, DVP, DVC):
        d = d0 + tl.arange(0, DVC)
        mask = keep[:, None] & (d < DV)[None, :]
        tile = tl.load(x + token.to(tl.int64)[:, None] * stride_t + d[None, :], mask=mask, other=0.0)
        tile = tile.to(tl.float32)
        square += tl.sum(tile * tile, axis=1)
    square = tl.where(square == square, square, 0.0)  # NaN values have no magnitude
    largest = tl.max(tl.reshape(square, (N, S)), axis=1)
    if ZSCORE:
        log = tl.log(tl.sqrt(largest) + 1e-6)
        g = tl.arange(0, N)
        begin = first + g * S
        some = (begin + S > low) & (begin < high)
        complete = (begin >= low) & (begin + S <= high)
        count = tl.sum(complete.to(tl.float32), axis=0)
        # Means are taken from the largest value on: of equal magnitudes the mean is that very number, z exactly 0.
        top = tl.max(tl.where(complete, log, float("-inf")), axis=0)
        top = tl.where(count > 0, top, 0.0)
        mean = top + tl.sum(tl.where(complete, log - top, 0.0), axis=0) / tl.maximum(count, 1.0)
        diff = tl.where(complete, log - mean, 0.0)
        tl.store(stats + G + block, count)
        tl.store(stats + 2 * G + block, mean)
        tl.store(stats + 3 * G + block, tl.sum(diff * diff, axis=0))
        tl.store(stats + 4 * G + block * N + g, tl.where(some, log, float("-inf")))
    else:
        norm = tl.sqrt(tl.max(largest, axis=0))
        tl.store(stats + block, value_weight * tl.log(tl.maximum(norm, 1.0)))


@triton.jit(do_not_specialize=["batch", "q_len", "k_len", "q_blocks", "k_blocks"])
def _pool_kernel(
    q, k, v, flats, stats, query_start, query_end, key_start, key_end,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_t, v_stride_b, v_stride_h, v_stride_t,
    batch, q_len, k_len, q_blocks, k_blocks, value_weight,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, FLAT_D: tl.constexpr,
    DV: tl.constexpr, DVP: tl.constexpr, DVC: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    S: tl.constexpr, ZSCORE: tl.constexpr,
):  # fmt: skip
    """One program a block of q, then one a block of k, then one a block of v."""
    pid = tl.program_id(0)
    q_programs = batch * Q_HEADS * q_blocks
    k_programs = batch * KV_HEADS * k_blocks
    if pid < q_programs:
        b, h, i = _locate(pid, Q_HEADS, q_blocks, q_stride_h < q_stride_t)
        low, high = _valid_range(query_start, query_end, b, q_len)
        first = i * BLOCK_Q
        x = q + b.to(tl.int64) * q_stride_b + h.to(tl.int64) * q_stride_h + first.to(tl.int64) * q_stride_t
        out = flats + ((b * Q_HEADS + h).to(tl.int64) * q_blocks + i) * (S * FLAT_D)
        _phase_means(x, first, low, high, q_stride_t, out, D, DP, FLAT_D, BLOCK_Q, S, False)
    elif pid < q_programs + k_programs:
        b, h, i = _locate(pid - q_programs, KV_HEADS, k_blocks, k_stride_h < k_stride_t)
        low, high = _valid_range(key_start, key_end, b, k_len)
        first = i * BLOCK_K
        x = k + b.to(tl.int64) * k_stride_b + h.to(tl.int64) * k_stride_h + first.to(tl.int64) * k_stride_t
        block = (b * KV_HEADS + h).to(tl.int64) * k_blocks + i
        out = flats + (q_programs.to(tl.int64) + block) * (S * FLAT_D)
        _phase_means(x, first, low, high, k_stride_t, out, D, DP, FLAT_D, BLOCK_K, S, True)
    else:
        b, h, i = _locate(pid - q_programs - k_programs, KV_HEADS, k_blocks, v_stride_h < v_stride_t)
        low, high = _valid_range(key_start, key_end, b, k_len)
        first = i * BLOCK_K
        x = v + b.to(tl.int64) * v_stride_b + h.to(tl.int64) * v_stride_h + first.to(tl.int64) * v_stride_t
        block = (b * KV_HEADS + h).to(tl.int64) * k_blocks + i
        _value_groups(x, first, low, high, v_stride_t, stats, block, k_programs.to(tl.int64), value_weight,
                      DV, DVP, DVC, BLOCK_K, S, ZSCORE)  # fmt: skip


@lru_cache(maxsize=1024)
def pool_meta(sizes: Sizes, metric: str) -> dict[str, object]:
    """Compile-time arguments and options of the pool kernel."""
    power = triton.next_power_of_2
    flat_dim, value_dim = power(sizes.flat_dim), power(sizes.value_dim)
    warps = sizes.stride * flat_dim // (32 * ELEMENTS_PER_THREAD)
    return dict(
        Q_HEADS=sizes.q_heads, KV_HEADS=sizes.kv_heads, D=sizes.head_dim, DP=flat_dim, FLAT_D=sizes.flat_dim,
        DV=sizes.value_dim, DVP=value_dim, DVC=min(value_dim, VALUE_CHUNK), BLOCK_Q=sizes.block_q,
        BLOCK_K=sizes.block_k, S=sizes.stride, ZSCORE=metric == "zscore", num_warps=max(1, min(MOST_WARPS, warps)),
    )  # fmt: skip


def pool(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_start: Tensor | None,
    key_end: Tensor | None,
    query_start: Tensor | None,
    query_end: Tensor | None,
    sizes: Sizes,
    metric: str,
    value_weight: float,
    plan: Plan,
) -> tuple[Tensor, Tensor]:
    """Pool q (B, Hq, Lq, D), k (B, Hkv, Lk, D), v (B, Hkv, Lk, Dv) into ``flats`` and ``stats`` (module docstring).

    The last stride of q, k and v is 1, the others are free. The optional int32 (B,) tensors bound the valid tokens,
    ``start <= token < end``; None means from the first, to the last. ``value_weight=0`` skips v and leaves ``stats``
    unwritten.
    """
    flats = torch.empty(sizes.flats, dtype=q.dtype, device=q.device)
    stats = torch.empty(stats_size(sizes, metric, value_weight), dtype=torch.float32, device=q.device)
    programs = sizes.batch * sizes.q_heads * sizes.q_blocks + sizes.key_blocks * (2 if value_weight != 0 else 1)
    q_stride, k_stride, v_stride = q.stride(), k.stride(), v.stride()
    args = (
        q, k, v, flats, stats, query_start, query_end, key_start, key_end,
        *q_stride[:3], *k_stride[:3], *v_stride[:3],
        sizes.batch, sizes.q_len, sizes.k_len, sizes.q_blocks, sizes.k_blocks, value_weight,
    )  # fmt: skip
    launch(_pool_kernel, programs, args, pool_meta(sizes, metric), plan, "pool")
    return flats, stats
