"""What the Triton kernels' tests compare with: loops over blocks and rows in float64, that share no code with them."""

from __future__ import annotations

import math
import os
import sys

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton", reason="the kernels need Triton")
from stem_flex.kernels import pool as pool_module

if not torch.cuda.is_available() and not pool_module.INTERPRETED:
    pytest.skip("Triton was imported before TRITON_INTERPRET=1 was set, and there is no GPU", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
devices = pytest.mark.parametrize(
    "device",
    [
        pytest.param(
            "cpu",
            marks=pytest.mark.skipif(not pool_module.INTERPRETED, reason="the kernels of this process are compiled"),
        ),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
UNWRITTEN = torch.iinfo(torch.int32).max


def block_means(x: Tensor, start: Tensor, end: Tensor, block: int, stride: int, reverse: bool) -> Tensor:
    """Phase means (B, H, blocks, stride, D) of x (B, H, L, D), tokens outside [start, end) as zeros."""
    B, H, L, D = x.shape
    token = torch.arange(L)
    valid = (token >= start[:, None]) & (token < end[:, None])
    x = torch.where(valid[:, None, :, None], x.double(), 0.0)
    out = torch.zeros(B, H, -(-L // block), stride, D, dtype=torch.float64)
    for i in range(out.shape[2]):
        for g in range(stride):
            phase = x[:, :, i * block + g : min(L, (i + 1) * block) : stride]
            out[:, :, i, stride - 1 - g if reverse else g] = phase.sum(2) / (block // stride)
    return out


def block_magnitudes(v: Tensor, start: Tensor, end: Tensor, block: int, stride: int, metric: str) -> Tensor:
    """mag (B, H, Kb) by the definitions of the two metrics, one group at a time."""
    B, H, L, _ = v.shape
    mag = torch.zeros(B, H, -(-L // block), dtype=torch.float64)
    norms = v.double().norm(dim=-1)
    for b in range(B):
        lo, hi = max(0, int(start[b])), min(L, int(end[b]))
        for h in range(H):
            if metric == "log":
                for j in range(mag.shape[2]):
                    real = norms[b, h, max(lo, j * block) : min(hi, (j + 1) * block)]
                    mag[b, h, j] = max(0.0, math.log(real.max())) if real.numel() and real.max() > 0 else 0.0
                continue
            logs, complete = {}, []
            for g in range(-(-L // stride)):
                real = norms[b, h, max(lo, g * stride) : max(lo, min(hi, (g + 1) * stride))]
                if real.numel():
                    logs[g] = math.log(float(real.max()) + 1e-6)
                if real.numel() == stride:
                    complete.append(logs[g])
            if len(complete) < 2:
                continue
            stats = torch.tensor(complete, dtype=torch.float64)
            for g, log in logs.items():
                z = (log - float(stats.mean())) / (float(stats.std()) + 1e-6)
                mag[b, h, g * stride // block] += max(0.0, z) / (block // stride)
    return mag


def expected_scores(q, k, v, valid, block_q, block_k, stride, metric, weight) -> Tensor:
    """Scores of all block pairs, float64 (B, Hq, Qb, Kb), nothing masked."""
    ks, ke, qs, qe = valid
    group = q.shape[1] // k.shape[1]
    qm = block_means(q, qs, qe, block_q, stride, False).flatten(3)
    km = block_means(k, ks, ke, block_k, stride, True).flatten(3).repeat_interleave(group, 1)
    scores = qm @ km.transpose(-1, -2) / (math.sqrt(q.shape[-1]) * stride)
    mag = block_magnitudes(v, ks, ke, block_k, stride, metric).repeat_interleave(group, 1)
    return scores + weight * mag[:, :, None]


def class_of(rows: Tensor, classes: Tensor | None, b: int, h: int, i: int, j: int) -> int:
    lo, hi, full_lo, full_hi = (int(x) for x in rows[b % rows.shape[0], i, :4])
    if not lo <= j < hi:
        return 0
    if classes is not None:
        return int(classes[b % classes.shape[0], h % classes.shape[1], i, j])
    return 2 if full_lo <= j < full_hi else 1


def key_of(x: float) -> float:
    """Order of scores: NaN below -inf, -0.0 as 0.0."""
    return -math.inf if math.isnan(x) else max(x, -1e300) + 0.0


def chosen(scores: Tensor, rows: Tensor, budget: Tensor, classes: Tensor | None, sink: int, local: int):
    """{(b, h, i): (partial list, full list)} by sorting each row."""
    B, H, Qb, Kb = scores.shape
    budget = budget.expand(B, H, Qb)
    out = {}
    for b in range(B):
        for h in range(H):
            for i in range(Qb):
                kind = [class_of(rows, classes, b, h, i, j) for j in range(Kb)]
                allowed = [j for j in range(Kb) if kind[j] > 0]
                ranked = sorted(allowed, key=lambda j, row=scores[b, h, i]: (-key_of(float(row[j])), j))
                lo, _, _, _, own_lo, own_hi = (int(x) for x in rows[b % rows.shape[0], i, :6])
                if classes is not None and allowed:
                    lo = allowed[0]  # sinks start at this head's first candidate
                keep = set(ranked[: int(budget[b, h, i])])
                forced = {*range(lo, lo + sink), *range(own_hi - local, own_hi), *range(own_lo, own_hi)}
                keep |= forced & set(allowed)
                out[b, h, i] = tuple([j for j in sorted(keep) if kind[j] == c] for c in (1, 2))
    return out


def listed(buffer: Tensor, counts: Tensor, width: int, partial_columns: int, Kb: int):
    """The same dictionary from the kernels' tables; checks that columns past the counts were left alone."""
    _, B, H, Qb = counts.shape
    assert buffer.shape == (B * H * Qb * width + Kb + partial_columns,)
    assert bool((buffer[B * H * Qb * width :] == UNWRITTEN).all())
    table = buffer[: B * H * Qb * width].view(B, H, Qb, width).cpu()
    counts = counts.cpu()
    out = {}
    for b, h, i in torch.cartesian_prod(torch.arange(B), torch.arange(H), torch.arange(Qb)).tolist():
        p, f = int(counts[0, b, h, i]), int(counts[1, b, h, i])
        row = table[b, h, i]
        assert p <= width
        assert f <= width - partial_columns
        written = torch.zeros(width, dtype=torch.bool)
        written[:p] = True
        written[partial_columns : partial_columns + f] = True
        assert bool((row[~written] == UNWRITTEN).all())
        out[b, h, i] = row[:p].tolist(), row[partial_columns : partial_columns + f].tolist()
    return out


def causal_rows(Lq: int, Lk: int, block_q: int, block_k: int, offset: int = 0, window: int | None = None) -> Tensor:
    """rows (1, Qb, 8) of causal attention, optionally within a window, counted token by token."""
    Qb, Kb = -(-Lq // block_q), -(-Lk // block_k)
    rows = torch.zeros(1, Qb, 8, dtype=torch.int32)
    query = torch.arange(Qb * block_q)[:, None] + offset
    key = torch.arange(Kb * block_k)[None]
    mask = (query >= key) & (torch.arange(Qb * block_q) < Lq)[:, None] & (key < Lk)
    if window is not None:
        mask &= query - key < window
    count = mask.view(Qb, block_q, Kb, block_k).sum((1, 3))
    for i in range(Qb):
        some = (count[i] > 0).nonzero().flatten().tolist() or [0, -1]
        full = (count[i] == block_q * block_k).nonzero().flatten().tolist()
        full = [full[0], full[-1] + 1] if full else [0, 0]
        own = [(offset + i * block_q) // block_k, (offset + min(Lq, (i + 1) * block_q) - 1) // block_k + 1]
        own = [min(x, Kb) for x in own]
        rows[0, i] = torch.tensor([some[0], some[-1] + 1, *full, *own, i, Kb])
    return rows


def all_valid(B: int, Lq: int, Lk: int):
    zero = torch.zeros(B, dtype=torch.int32)
    return zero, zero + Lk, zero, zero + Lq


def inputs(B, Hq, Hkv, Lq, Lk, D, Dv, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(B, Hq, Lq, D, generator=g) + 0.3
    k = torch.randn(B, Hkv, Lk, D, generator=g) + 0.2
    v = torch.randn(B, Hkv, Lk, Dv, generator=g) * torch.rand(B, Hkv, Lk, 1, generator=g).mul(3).exp()
    return q.to(dtype), k.to(dtype), v.to(dtype)


def on(device, *tensors):
    return [x if x is None else x.to(device) for x in tensors]


def masked(scores: Tensor, rows: Tensor, classes: Tensor | None = None) -> Tensor:
    out = scores.clone()
    B, H, Qb, Kb = scores.shape
    j = torch.arange(Kb)
    allowed = ((j >= rows[..., 0:1]) & (j < rows[..., 1:2]))[:, None].expand(B, H, Qb, Kb)
    if classes is not None:
        allowed = allowed & (classes > 0)
    return out.masked_fill(~allowed, -math.inf)


def assert_scores(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Scores (0 to 2) within ``tolerance`` of the definition's, and -inf in the same places."""
    allowed = ~expected.isneginf()
    assert got.dtype == torch.float32
    assert torch.equal(~got.isneginf(), allowed)
    assert not got.isnan().any()
    assert (got.double() - expected)[allowed].abs().max() <= tolerance


def assert_nearly_all_scores(got: Tensor, expected: Tensor, dtype: torch.dtype, share: float) -> None:
    """At most ``share`` of the rows are off by more than what ``dtype`` rounds: a token may be outlying by that."""
    allowed = ~expected.isneginf()
    assert torch.equal(~got.isneginf(), allowed)
    off = torch.where(allowed, got - expected, 0).abs().amax(-1) / expected.amax(-1).clamp(min=1e-9)
    assert off.isfinite().all()
    tolerance = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    assert (off > tolerance).float().mean() <= share
