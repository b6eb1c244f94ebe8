"""Static patterns, random blocks and block means keep what loops over rows keep."""

from __future__ import annotations

import pytest
import torch

from stem_flex import layout, selectors, stem_block_mask
from stem_flex.plumbing.tables import block_classes
from stem_flex.reference import selectors as loops
from tests.selectors.cases import CONFIG, EVERY, ONE_PROMPT, agree, chosen, inputs


@pytest.mark.parametrize("case", EVERY)
def test_a_shape(case):
    agree("a-shape", EVERY[case], loops.a_shape, initial=20, local=50)


@pytest.mark.parametrize("case", [case for case in ONE_PROMPT if case != "offsets by batch row"])
def test_tri_shape(case):
    agree("tri-shape", ONE_PROMPT[case], loops.a_shape, initial=16, local=40, last=23)


def test_a_shape_of_the_published_sizes():
    """128 first and 3,968 last keys are the first block and the 32 up to the diagonal, of 128 (SELECTORS' reading)."""
    q = torch.zeros(1, 1, 5120, 16)
    bound = layout.causal().bind(1, 1, 5120, 5120)
    inside = selectors.get("a-shape").scores(q, q, q, layout=bound)[0, 0] >= 2
    expected = [{0, *range(max(0, row - 31), row + 1)} for row in range(40)]
    assert [set(row.nonzero().flatten().tolist()) for row in inside] == expected
    full = selectors.get("tri-shape").scores(q, q, q, layout=bound)[0, 0] >= 2
    assert full[39].all()
    assert torch.equal(full[:39], inside[:39])


@pytest.mark.parametrize("case", EVERY)
def test_dense(case):
    qkv = inputs(EVERY[case])
    kept, _ = chosen("dense", EVERY[case], qkv)
    assert torch.equal(kept, stem_block_mask(*qkv, CONFIG, layout=EVERY[case][5], q_offset=EVERY[case][6],
                                             budget=10**6) .structure.allowed().expand_as(kept))  # fmt: skip


def test_any_budget_of_a_pattern_takes_the_nearest():
    """Given fewer blocks than the pattern has, it keeps the first and the nearest."""
    q, k, v = inputs(ONE_PROMPT["aligned"])
    mask = stem_block_mask(q, k, v, CONFIG, selector="a-shape", budget=3)
    kept = (block_classes(mask) > 0)[0, 0]
    assert [row.nonzero().flatten().tolist() for row in kept[4:]] == [[0, i - 1, i] for i in range(4, 12)]


def test_random_blocks_are_spread_and_repeat():
    """The same again, other heads differ, and every rank is as likely: the mean of uniform numbers is 1/2."""
    q, k, v = inputs((2, 4, 2, 1024, 1024), dim=16)
    scores = selectors.get("random").scores(q, k, v, CONFIG, layout=layout.full())
    assert torch.equal(scores, selectors.get("random").scores(q, k, v, CONFIG, layout=layout.full()))
    assert abs(scores.mean() - 0.5) < 0.01
    assert abs(scores.std() - 12**-0.5) < 0.01
    flat = scores.flatten(2).flatten(0, 1)
    assert (torch.corrcoef(flat) - torch.eye(8)).abs().max() < 0.07
    assert (torch.corrcoef(scores[0, 0]) - torch.eye(64)).abs().max() < 0.6


def test_uniform_is_the_product_of_means():
    case = ONE_PROMPT["padded left"]
    q, k, v = inputs(case)
    scores = selectors.get("uniform").scores(q, k, v, CONFIG, layout=case[5])
    for b, h, i, j in ((0, 0, 5, 4), (0, 1, 9, 3), (1, 1, 9, 9), (0, 0, 9, 9)):
        first = max(0, 49 * (b == 0))
        queries, keys = (x[max(first, n * 16) : n * 16 + 16] for x, n in ((q[b, h], i), (k[b, 0], j)))
        assert scores[b, h, i, j] == pytest.approx(float(queries.mean(0) @ keys.mean(0)) / 4, abs=1e-6)
