"""Selection by Triton against small loops: in Triton's interpreter on the CPU, compiled on the GPU."""

from __future__ import annotations

import math

import pytest
import torch

from stem_flex.kernels import stem_select
from tests.kernels.loops import (
    causal_rows,
    chosen,
    devices,
    listed,
    on,
)

pytestmark = pytest.mark.usefixtures("poisoned")


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
