"""FlexPrefill keeps what loops over rows and entries keep."""

from __future__ import annotations

import pytest
import torch

from stem_flex import layout, selectors
from stem_flex.reference import selectors as loops
from stem_flex.selectors import flexprefill, shared
from tests.selectors.cases import CONFIG, ONE_PROMPT, agree, inputs, longer


@pytest.mark.parametrize("tau", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("case", ["aligned", "ragged, GQA, batch", "padded left", "chunk"])
def test_flexprefill(case, tau):
    """Vertical-slash heads (tau 0), query-aware ones (tau 2) and a mixture, against loops; longer than 256 keys."""
    case = longer(case)
    options = {"gamma": 0.4, "tau": tau, "min_budget": 32, "max_budget": None}
    agree("flexprefill", case, loops.flexprefill, inputs(case, sharpness=1.0), **options)


def test_flexprefill_budgets_bound_the_columns():
    """max_budget in tokens caps what gamma asks for; a short prompt is dense."""
    case = (1, 2, 1, 320, 320, None, 0)
    for options in (
        {"gamma": 0.9, "max_budget": 64, "min_budget": 16},
        {"gamma": 0.1, "max_budget": None, "min_budget": 96},
    ):
        agree("flexprefill", case, loops.flexprefill, inputs(case), tau=0.0, **options)
    short = ONE_PROMPT["aligned"]
    assert (
        agree("flexprefill", short, loops.flexprefill, gamma=0.1, tau=0.1, min_budget=16, max_budget=None)[0, 0].sum()
        == 78
    )


def test_largest_entries_within_a_part():
    """Sorting and summing gives the same entries as halving the range of thresholds."""
    x = torch.rand(2, 3, 20, 20).softmax(-1).tril()
    for part in (0.0, 0.3, 0.9, 1.0):
        got = flexprefill.largest_within(x, part)
        for one, kept in zip(x.flatten(0, 1), got.flatten(0, 1), strict=True):
            ordered = one.flatten().sort(descending=True).values.double()
            number = int((ordered.cumsum(0) <= part * one.sum() * (1 + 1e-6)).logical_and(ordered > 0).sum())
            assert int(kept.sum()) == number
            assert (
                torch.equal(kept.flatten(), (one > 0).flatten() & (one.flatten() >= ordered[max(number - 1, 0)]))
                or not number
            )


@pytest.mark.parametrize("shape", [(1, 1, 1, 6), (2, 3, 5, 17), (1, 2, 8, 9)])
def test_sums_along_diagonals(shape):
    """Each one entry by entry; the room before the first key holds zeros."""
    weights = torch.rand(*shape, dtype=torch.float64)
    rows, columns = shape[2:]
    weights[..., :rows] = 0
    expected = weights.new_zeros(*shape[:2], columns + 1)
    for row in range(rows):
        for column in range(rows, columns):
            expected[..., column - row] += weights[..., row, column]
    torch.testing.assert_close(shared.diagonal_sums(weights), expected)


@pytest.mark.parametrize("name", ["minference", "flexprefill"])
@pytest.mark.parametrize("given", [layout.documents([0, 50, 120]), layout.full(), layout.prefix(20)])
def test_patterns_of_the_last_queries_need_one_causal_prompt(name, given):
    q, k, v = inputs((1, 2, 1, 120, 120))
    with pytest.raises(ValueError, match=rf"layout must be causal and of one prompt for {name}, .* selector='stem'"):
        selectors.get(name).scores(q, k, v, CONFIG, layout=given)
