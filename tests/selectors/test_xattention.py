"""XAttention keeps what loops over cells keep."""

from __future__ import annotations

import pytest
import torch

from stem_flex import selectors
from stem_flex.reference import selectors as loops
from stem_flex.selectors import rules, xattention
from stem_flex.selectors.rules import Coverage
from tests.selectors.cases import CONFIG, EVERY, ONE_PROMPT, agree, chosen, inputs


@pytest.mark.parametrize("case", EVERY)
@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_xattention(case, threshold):
    agree("xattention", EVERY[case], loops.xattention, budget=Coverage(threshold), fast={}, threshold=threshold)


def test_xattention_thresholds_by_head():
    case = ONE_PROMPT["ragged, GQA, batch"]
    kept = agree("xattention", case, loops.xattention, budget=Coverage((0.3, 0.6, 0.9, 1.0)), fast={},
                 threshold=[0.3, 0.6, 0.9, 1.0])  # fmt: skip
    share = kept.float().mean((0, 2, 3))
    assert (share.diff() > 0).all()
    with pytest.raises(
        ValueError, match=r"share must be a number or one for each of the 4 query heads, got \(0.3, 0.6\)"
    ):
        chosen("xattention", case, inputs(case), budget=Coverage((0.3, 0.6)))


def test_xattention_in_strips(monkeypatch):
    """Strips of one row of blocks give what one strip gives."""

    case = EVERY["documents"]
    q, k, v = inputs(case)
    whole = selectors.get("xattention").scores(q, k, v, CONFIG, layout=case[5])
    monkeypatch.setattr(xattention, "_CELLS_AT_ONCE", 1)
    torch.testing.assert_close(selectors.get("xattention").scores(q, k, v, CONFIG, layout=case[5]), whole)
    counts = Coverage(0.7).counts(None, CONFIG, 1, 2, whole)
    monkeypatch.setattr(rules, "_ENTRIES_AT_ONCE", 1)
    assert torch.equal(Coverage(0.7).counts(None, CONFIG, 1, 2, whole), counts)
