"""The Triton kernels against small loops: in Triton's interpreter on the CPU, compiled on the GPU."""

from __future__ import annotations

import math
import os
import sys

import pytest
import torch
import torch.utils.deterministic
from torch import Tensor

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton", reason="the kernels need Triton")
from stem_flex.kernels import ops, stem_scores, stem_select, stem_tables
from stem_flex.kernels import pool as pool_module
from stem_flex.kernels import scores as scores_module

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


@pytest.fixture(autouse=True)
def poisoned():
    """PyTorch fills what the launchers allocate with NaN and UNWRITTEN: whatever they forget to write shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


# ---- references: loops over blocks and rows, float64, no shared code ----


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


# ---- pool, magnitude, scores ----

SHAPES = [  # B, Hq, Hkv, Lq, Lk, D, Dv, block_q, block_k, stride
    pytest.param(1, 1, 1, 1, 1, 16, 16, 128, 128, 8, id="one-token"),
    pytest.param(1, 4, 1, 127, 127, 64, 64, 128, 128, 8, id="block-1"),
    pytest.param(1, 2, 2, 128, 128, 128, 128, 128, 128, 16, id="block"),
    pytest.param(3, 4, 2, 129, 129, 40, 24, 128, 128, 8, id="block+1-D40"),
    pytest.param(1, 7, 1, 130, 300, 80, 128, 128, 64, 4, id="gqa7-128x64-D80"),
    pytest.param(2, 2, 1, 300, 520, 16, 40, 256, 128, 32, id="256x128"),
    pytest.param(1, 2, 1, 200, 200, 17, 16, 64, 64, 8, id="64x64-D17"),
]


@devices
@pytest.mark.parametrize(("B", "Hq", "Hkv", "Lq", "Lk", "D", "Dv", "block_q", "block_k", "stride"), SHAPES)
@pytest.mark.parametrize("metric", ["zscore", "log"])
def test_scores_match_loops(device, B, Hq, Hkv, Lq, Lk, D, Dv, block_q, block_k, stride, metric):
    q, k, v = inputs(B, Hq, Hkv, Lq, Lk, D, Dv, torch.float32)
    rows = causal_rows(Lq, Lk, block_q, block_k, offset=Lk - Lq)
    expected = expected_scores(q, k, v, all_valid(B, Lq, Lk), block_q, block_k, stride, metric, 0.7)
    q, k, v, rows_d = on(device, q, k, v, rows)
    got = stem_scores(q, k, v, rows_d, block_q=block_q, block_k=block_k, stride=stride, metric=metric, value_weight=0.7)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.cpu().double(), masked(expected, rows), rtol=1e-5, atol=2e-6)


@devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_scores(device, dtype):
    q, k, v = inputs(1, 2, 1, 300, 300, 64, 64, dtype)
    rows = causal_rows(300, 300, 128, 128)
    expected = expected_scores(q, k, v, all_valid(1, 300, 300), 128, 128, 8, "zscore", 0.2)
    q, k, v, rows_d = on(device, q, k, v, rows)
    got = stem_scores(q, k, v, rows_d, block_q=128, block_k=128, stride=8, metric="zscore", value_weight=0.2)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got.cpu().double(), masked(expected, rows), rtol=tolerance, atol=tolerance)


@devices
@pytest.mark.parametrize("metric", ["zscore", "log"])
def test_nan_values_have_no_magnitude(device, metric):
    q, k, v = inputs(1, 2, 1, 300, 300, 32, 32, torch.float32)
    options = {"block_q": 128, "block_k": 128, "stride": 8, "metric": metric, "value_weight": 0.5}
    zeroed = v.clone()
    zeroed[:, :, 70] = 0.0
    v[:, :, 70, 3] = math.nan
    q, k, v, zeroed, rows = on(device, q, k, v, zeroed, causal_rows(300, 300, 128, 128))
    assert torch.equal(stem_scores(q, k, v, rows, **options), stem_scores(q, k, zeroed, rows, **options))


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("metric", ["zscore", "log"])
def test_pool_honours_valid_ranges(device, dtype, metric):
    """Tokens outside the ranges and tail padding count as zeros, whatever they hold; divisors stay BLOCK/s."""
    B, Hq, Hkv, L, D, Dv, block, stride = 3, 2, 1, 150, 32, 48, 64, 8
    q, k, v = inputs(B, Hq, Hkv, L, L, D, Dv, dtype)
    ks, ke = torch.tensor([0, 13, 130]), torch.tensor([L, 77, 131])
    qs, qe = torch.tensor([5, 0, 64]), torch.tensor([L, 70, 64])
    token = torch.arange(L)
    for x, start, end in ((q, qs, qe), (k, ks, ke), (v, ks, ke)):
        outside = (token < start[:, None]) | (token >= end[:, None])
        x.masked_fill_(outside[:, None, :, None], math.nan)
    qf = block_means(q, qs, qe, block, stride, False).flatten()
    kf = block_means(k, ks, ke, block, stride, True).flatten()
    bias = 0.5 * block_magnitudes(v.nan_to_num(), ks, ke, block, stride, metric).flatten()
    sizes = pool_module.sizes_of(tuple(q.shape), tuple(k.shape), Dv, block, block, stride)
    args = on(device, q, k, v, *(x.int() for x in (ks, ke, qs, qe)))
    flats, stats = ops._pooled(*args, sizes, metric, 0.5, {})
    assert flats.dtype == dtype
    assert sizes.flats == flats.numel() == qf.numel() + kf.numel()
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(flats.cpu().double(), torch.cat([qf, kf]), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(stats[: sizes.key_blocks].cpu().double(), bias, rtol=2e-5, atol=2e-6)


@devices
def test_fewer_than_two_complete_groups_have_no_magnitude(device):
    q, k, v, rows = on(device, *inputs(1, 1, 1, 15, 15, 16, 16, torch.float32), causal_rows(15, 15, 64, 64))
    options = dict(block_q=64, block_k=64, stride=8, metric="zscore")
    with_values = stem_scores(q, k, v, rows, value_weight=0.5, **options)
    without = stem_scores(q, k, v, rows, value_weight=0.0, **options)
    torch.testing.assert_close(with_values, without)


@devices
def test_statistics_of_many_blocks_combine(device, monkeypatch):
    """More blocks than one step combines and than one program normalises."""
    from stem_flex.kernels import magnitude as magnitude_module

    monkeypatch.setattr(magnitude_module, "COMBINE", 4)
    monkeypatch.setattr(magnitude_module, "BLOCKS", 2)
    q, k, v = inputs(1, 2, 2, 16, 300, 16, 16, torch.float32)
    v += 50  # a mean that dwarfs the spread
    rows = causal_rows(16, 300, 16, 32, offset=284)
    expected = expected_scores(q, k, v, all_valid(1, 16, 300), 16, 32, 4, "zscore", 0.5)
    q, k, v, rows_d = on(device, q, k, v, rows)
    got = stem_scores(q, k, v, rows_d, block_q=16, block_k=32, stride=4, metric="zscore", value_weight=0.5)
    torch.testing.assert_close(got.cpu().double(), masked(expected, rows), rtol=1e-3, atol=1e-3)


@devices
def test_strided_views_are_read_in_place(device):
    """A BSHD projection, a slice of a wider tensor and a broadcast batch give what their copies give."""
    g = torch.Generator().manual_seed(3)
    q = torch.randn(2, 150, 4, 32, generator=g).transpose(1, 2)
    k = torch.randn(2, 2, 150, 48, generator=g)[..., 16:]
    v = torch.randn(1, 150, 2, 32, generator=g).transpose(1, 2).expand(2, -1, -1, -1)
    options = dict(block_q=64, block_k=64, stride=8, metric="zscore", value_weight=0.3)
    rows = causal_rows(150, 150, 64, 64)
    views = [x.to(device).as_strided(x.shape, x.stride()) if device == "cpu" else x.to(device) for x in (q, k, v)]
    (rows_d,) = on(device, rows)
    got = stem_scores(*views, rows_d, **options)
    copies = [x.contiguous() for x in views]
    torch.testing.assert_close(got, stem_scores(*copies, rows_d, **options), rtol=0, atol=0)


@devices
def test_class_table_masks_scores(device):
    q, k, v = inputs(2, 2, 1, 200, 200, 16, 16, torch.float32)
    classes = torch.randint(0, 3, (1, 2, 4, 4), dtype=torch.int8)
    rows = torch.tensor([0, 4, 0, 0, 0, 1, 0, 4], dtype=torch.int32).expand(1, 4, 8).contiguous()
    expected = expected_scores(q, k, v, all_valid(2, 200, 200), 64, 64, 8, "log", 0.2)
    q, k, v, rows_d, classes_d = on(device, q, k, v, rows, classes)
    got = stem_scores(q, k, v, rows_d, classes_d, block_q=64, block_k=64, stride=8, metric="log", value_weight=0.2)
    torch.testing.assert_close(got.cpu().double(), masked(expected, rows, classes), rtol=1e-5, atol=2e-6)


# ---- select ----


def check_select(device, scores, rows, budget, classes=None, *, sink=1, local=1, partial_columns=4, width=None):
    Kb = scores.shape[3]
    if classes is not None:
        partial_columns, width = Kb, 2 * Kb
    width = partial_columns + Kb if width is None else width
    expected = chosen(scores, rows, budget, classes, sink, local)
    args = on(device, scores, rows, budget, classes)
    got = stem_select(*args, sink=sink, local=local, partial_columns=partial_columns, width=width)
    assert listed(*got, width, partial_columns, Kb) == expected


@devices
@pytest.mark.parametrize("k", [0, 1, 3, 6, 100])
@pytest.mark.parametrize("forced", [(0, 0), (2, 3)])
def test_budgets(device, k, forced):
    scores = torch.randn(1, 1, 6, 6)
    budget = torch.full((1, 1, 1), k, dtype=torch.int32)
    check_select(device, scores, causal_rows(768, 768, 128, 128), budget, sink=forced[0], local=forced[1])


@devices
def test_every_budget_of_a_row(device):
    scores = torch.randn(1, 1, 1, 20).expand(1, 1, 22, 20).contiguous()
    rows = torch.tensor([0, 20, 0, 19, 19, 20, 0, 20], dtype=torch.int32).expand(1, 22, 8).contiguous()
    check_select(device, scores, rows, torch.arange(22, dtype=torch.int32)[None, None])


@devices
@pytest.mark.parametrize(
    "values",
    [
        pytest.param([1.0], id="all-equal"),
        pytest.param([0.0, -0.0], id="signed-zeros"),
        pytest.param([0.0, -0.0, 1e-45, -1e-45], id="denormals"),
        pytest.param([math.nan, -math.inf, 0.5], id="nan-below-inf"),
        pytest.param([math.nan], id="all-nan"),
        pytest.param([-math.inf], id="all-minus-inf"),
        pytest.param([math.inf, -math.inf, math.nan, 3e38, -3e38], id="extremes"),
        pytest.param([1.0, 1.0 + 2**-23, 1.0 + 2**-22], id="neighbours"),
        pytest.param([-2.0, -2.0 - 2**-22, -1.0], id="negative"),
    ],
)
def test_ties_and_special_values(device, values):
    choice = torch.randint(0, len(values), (1, 1, 5, 21))
    scores = torch.tensor(values)[choice]
    rows = torch.tensor([0, 21, 3, 20, 20, 21, 0, 21], dtype=torch.int32).expand(1, 5, 8).contiguous()
    check_select(device, scores, rows, torch.tensor([1, 3, 8, 13, 20], dtype=torch.int32)[None, None])


@devices
@pytest.mark.parametrize("spread", ["normal", "heavy", "outlier", "exponents"])
def test_score_distributions(device, spread):
    x = torch.randn(1, 1, 4, 150)
    if spread == "heavy":
        x = x**7
    elif spread == "outlier":
        x[..., 5] = 1e30
    elif spread == "exponents":
        x = x.sign() * torch.exp2(x * 40)
    rows = torch.tensor([0, 150, 0, 149, 149, 150, 0, 150], dtype=torch.int32).expand(1, 4, 8).contiguous()
    check_select(device, x, rows, torch.tensor([3, 17, 60, 149], dtype=torch.int32)[None, None])


@devices
def test_rows_differ_in_a_batch(device):
    """Per-batch ranges, empty rows, windows that begin anywhere, per-head budgets."""
    B, H, Qb, Kb = 3, 2, 3, 75
    rows = torch.zeros(B, Qb, 8, dtype=torch.int32)
    g = torch.Generator().manual_seed(1)
    for b in range(B):
        for i in range(Qb):
            lo, hi = sorted(torch.randint(0, Kb + 1, (2,), generator=g).tolist())
            full = [min(lo + 1, hi), max(lo + 1, hi - 2)] if hi - lo > 4 else [0, 0]
            rows[b, i] = torch.tensor([lo, hi, *full, max(lo, hi - 2), hi, i, Kb])
    rows[1, 1] = 0
    budget = torch.randint(1, 20, (B, H, Qb), dtype=torch.int32, generator=g)
    scores = torch.randn(B, H, Qb, Kb, generator=g)
    check_select(device, scores, rows, budget)
    check_select(device, scores[:, :1], rows, budget[:, :1, :1])
    check_select(device, scores.transpose(0, 1).contiguous().transpose(0, 1), rows[:1].contiguous(), budget)


@devices
def test_partial_lists_may_run_over_the_full_columns(device):
    """A row with more partial blocks than partial columns has no full ones."""
    rows = torch.tensor([[2, 30, 0, 0, 29, 30, 0, 0], [0, 30, 3, 29, 29, 30, 0, 0]], dtype=torch.int32)[None]
    budget = torch.full((1, 1, 1), 20, dtype=torch.int32)
    check_select(device, torch.randn(1, 1, 2, 30), rows, budget, width=22 + 4)


@devices
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (2, 2)])
def test_class_tables(device, shape):
    B, H, Qb, Kb = 2, 2, 2, 37
    classes = torch.randint(0, 3, (*shape, Qb, Kb), dtype=torch.int8)
    rows = torch.tensor([1, 36, 0, 0, 30, 33, 0, Kb], dtype=torch.int32).expand(1, Qb, 8).contiguous()
    budget = torch.tensor([3, 12], dtype=torch.int32)[None, None]
    check_select(device, torch.randn(B, H, Qb, Kb), rows, budget, classes, sink=2, local=4)


@devices
@pytest.mark.parametrize("Kb", [255, 256, 257, 600, 1025])
def test_wide_rows_and_every_block_width(device, Kb):
    """Rows of few and of many candidates take different code paths of one launch."""
    rows = torch.zeros(1, 5, 8, dtype=torch.int32)
    for i, hi in enumerate([Kb // 5, Kb // 4 + 1, Kb // 2, Kb // 2 + 1, Kb]):
        rows[0, i] = torch.tensor([0, hi, 0, hi - 1, hi - 1, hi, i, Kb])
    rows[0, 1, 0] = 40
    budget = torch.tensor([5, 30, 60, 90, 170], dtype=torch.int32)[None, None]
    check_select(device, torch.randn(1, 1, 5, Kb), rows, budget, sink=4, local=4)


@devices
def test_narrow_tables_are_never_overrun(device):
    """A width below what the rows keep drops blocks and keeps the counts inside; nothing else is written."""
    rows = torch.tensor([0, 20, 0, 19, 19, 20, 0, 20], dtype=torch.int32).expand(1, 3, 8).contiguous()
    scores, rows_d, budget = on(device, torch.randn(1, 1, 3, 20), rows, torch.full((1, 1, 1), 20, dtype=torch.int32))
    buffer, counts = stem_select(scores, rows_d, budget, sink=0, local=0, partial_columns=4, width=10)
    assert listed(buffer, counts, 10, 4, 20) == {(0, 0, i): ([19], list(range(6))) for i in range(3)}


# ---- tables ----


def check_tables(device, q, k, v, rows, budget, valid=(None,) * 4, *, classes=None, tolerance=3e-6, **options):
    """Compare with the loops; where the choice differs, only scores within rounding of the threshold may."""
    Kb = -(-k.shape[2] // options["block_k"])
    sink, local = 1, 1
    partial_columns, width = (Kb, 2 * Kb) if classes is not None else (4, 4 + Kb)
    everything = all_valid(q.shape[0], q.shape[2], k.shape[2])
    ranges = tuple(b if a is None else a for a, b in zip(valid, everything, strict=True))
    scores = expected_scores(
        q, k, v, ranges, *(options[n] for n in ("block_q", "block_k", "stride", "metric", "value_weight"))
    )
    expected = chosen(scores, rows, budget, classes, sink, local)
    args = on(device, q, k, v, rows, budget, classes, *valid)
    extra = {"max_key_blocks": Kb, **options}
    buffer, counts = stem_tables(*args, **extra, sink=sink, local=local, partial_columns=partial_columns, width=width)
    got = listed(buffer, counts, width, partial_columns, Kb)
    for (b, h, i), (partial, full) in got.items():
        different = {*partial, *full} ^ {*expected[b, h, i][0], *expected[b, h, i][1]}
        values = scores[b, h, i, sorted(different)]
        assert different or (partial, full) == expected[b, h, i]
        assert not different or float(values.max() - values.min()) <= tolerance, (b, h, i, different)
    return buffer, counts


OPTIONS = dict(block_q=64, block_k=64, stride=8, metric="zscore", value_weight=0.2)


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("block_q", "block_k"), [(64, 64), (128, 64), (64, 128)])
def test_tables_match_loops(device, dtype, block_q, block_k):
    q, k, v = inputs(2, 2, 1, 190, 320, 32, 16, dtype)
    rows = causal_rows(190, 320, block_q, block_k, offset=130)
    budget = (torch.arange(rows.shape[1], dtype=torch.int32) // 2 + 1)[None, None]
    options = {**OPTIONS, "block_q": block_q, "block_k": block_k}
    check_tables(device, q, k, v, rows, budget, tolerance=TOLERANCE[dtype] * 2, causal_offset=130, **options)


@devices
@pytest.mark.parametrize("metric", ["zscore", "log"])
def test_tables_with_padding(device, metric):
    q, k, v = inputs(3, 2, 1, 300, 300, 16, 16, torch.float32)
    start = torch.tensor([0, 70, 299], dtype=torch.int32)
    end = torch.tensor([300, 300, 300], dtype=torch.int32)
    rows = causal_rows(300, 300, 64, 64).repeat(3, 1, 1)
    for b in range(3):
        rows[b, :, 0] = start[b] // 64
        rows[b, :, 2] = (start[b] + 63) // 64
        rows[b, rows[b, :, 1] <= rows[b, :, 0]] = 0
        rows[b, :, 3] = torch.maximum(rows[b, :, 2], rows[b, :, 3])
    budget = torch.full((1, 1, 1), 2, dtype=torch.int32)
    check_tables(device, q, k, v, rows, budget, (start, end, start, end), **{**OPTIONS, "metric": metric})


@devices
def test_tables_with_classes(device):
    q, k, v = inputs(1, 4, 2, 300, 300, 16, 16, torch.float32)
    classes = torch.randint(0, 3, (1, 4, 5, 5), dtype=torch.int8)
    rows = torch.tensor([0, 5, 0, 0, 0, 1, 0, 5], dtype=torch.int32).expand(1, 5, 8).contiguous()
    check_tables(device, q, k, v, rows, torch.full((1, 1, 1), 2, dtype=torch.int32), classes=classes, **OPTIONS)


@devices
@pytest.mark.parametrize(("window", "offset"), [(None, 0), (100, None)])
def test_tables_in_chunks(device, window, offset, monkeypatch):
    """A workspace smaller than the scores, with and without the causal bound."""
    q, k, v = inputs(1, 1, 1, 300, 300, 16, 16, torch.float32)
    rows = causal_rows(300, 300, 16, 16, window=window)
    budget = torch.full((1, 1, 1), 5, dtype=torch.int32)
    options = {**OPTIONS, "block_q": 16, "block_k": 16, "max_key_blocks": 19 if window is None else 8}
    monkeypatch.setattr(scores_module, "MOST_WORKSPACE_BYTES", 16 * 32 * 4)
    assert len(scores_module.chunks(1, 19, 19, 16, 16, offset, 16 * 32 * 4)[0]) == 2
    check_tables(device, q, k, v, rows, budget, causal_offset=offset, **options)


@pytest.mark.parametrize("offset", [None, 0, 1000])
@pytest.mark.parametrize("q_blocks", [1, 16, 17, 1024, 8192])
def test_chunks_cover_the_rows_within_the_workspace(offset, q_blocks):
    heads, limit = 32, scores_module.workspace_bytes(32, q_blocks)
    assert scores_module.WORKSPACE_BYTES <= limit <= scores_module.MOST_WORKSPACE_BYTES
    cut, size = scores_module.chunks(heads, q_blocks, q_blocks, 128, 128, offset, limit)
    assert 4 * size <= limit
    row = 0
    for chunk in cut:
        assert chunk.row == row
        row += chunk.height
        assert chunk.width >= min(q_blocks, row if offset is not None else q_blocks)
        assert heads * chunk.height * -(-chunk.width // 16) * 16 <= size
    assert row == q_blocks


# ---- operators ----


@devices
def test_operators_trace_without_breaks(device):
    q, k, v, rows, budget = on(
        device, *inputs(1, 2, 1, 100, 100, 16, 16, torch.float32), causal_rows(100, 100, 64, 64),
        torch.full((1, 1, 1), 1, dtype=torch.int32),
    )  # fmt: skip

    def build(q, k, v):
        scores = stem_scores(q, k, v, rows, **OPTIONS)
        table = dict(sink=1, local=1, partial_columns=4, width=6)
        return (
            *stem_tables(q, k, v, rows, budget, **OPTIONS, **table, max_key_blocks=2),
            *stem_select(scores, rows, budget, **table),
        )

    compiled = torch.compile(build, fullgraph=True, backend="aot_eager")
    got, expected = compiled(q, k, v), build(q, k, v)
    for tables in (slice(0, 2), slice(2, 4)):  # what lies past the counts is nobody's
        assert listed(*got[tables], 6, 4, 2) == listed(*expected[tables], 6, 4, 2)


@devices
def test_fake_implementations_agree(device):
    q, k, v, rows = on(device, *inputs(2, 2, 1, 70, 70, 16, 16, torch.float32), causal_rows(70, 70, 64, 64))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    valid = (None,) * 5
    torch.library.opcheck(torch.ops.stem_flex.scores, (q, k, v, rows, *valid), OPTIONS, test_utils=checks)


def test_operators_carry_no_gradient():
    q, k, v, rows = on(DEVICE, *inputs(1, 1, 1, 64, 64, 16, 16, torch.float32), causal_rows(64, 64, 64, 64))
    assert not stem_scores(q.requires_grad_(), k, v, rows, **OPTIONS).requires_grad


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda q, k, v, o: (q.transpose(2, 3).contiguous().transpose(2, 3), k, v, o), ValueError, "q must have unit"),
        (lambda q, k, v, o: (q, k.half(), v, o), TypeError, "float16 for k"),
        (lambda q, k, v, o: (q.double(), k.double(), v.double(), o), TypeError, "float64 for q"),
        (lambda q, k, v, o: (q, k, v, {**o, "stride": 7}), ValueError, "stride must divide both"),
        (lambda q, k, v, o: (q, k, v, {**o, "metric": "norm"}), ValueError, "metric must be one of"),
    ],
)
def test_wrong_input_is_refused(change, error, match):
    rows = causal_rows(64, 64, 64, 64).to(DEVICE)
    q, k, v, options = change(*on(DEVICE, *inputs(1, 1, 1, 64, 64, 16, 16, torch.float32)), OPTIONS)
    with pytest.raises(error, match=match):
        stem_scores(q, k, v, rows, **options)
