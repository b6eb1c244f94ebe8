"""The Triton kernels against small loops: in Triton's interpreter on the CPU, compiled on the GPU."""

from __future__ import annotations

import math

import pytest
import torch

from stem_flex.kernels import ops, stem_scores, stem_select
from stem_flex.kernels import pool as pool_module
from tests.kernel_loops import (
    TOLERANCE,
    all_valid,
    block_magnitudes,
    block_means,
    causal_rows,
    chosen,
    devices,
    expected_scores,
    inputs,
    listed,
    masked,
    on,
)

pytestmark = pytest.mark.usefixtures("poisoned")

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
