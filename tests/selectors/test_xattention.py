"""XAttention keeps what loops over cells keep."""

from __future__ import annotations

import json

import pytest
import torch

from stem_flex import StemConfig, selectors, stem_block_mask
from stem_flex.budget import FORCED, Coverage
from stem_flex.plumbing import strips
from stem_flex.plumbing.tables import block_classes
from stem_flex.reference import selectors as loops
from stem_flex.selectors import antidiagonals
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
    monkeypatch.setattr(antidiagonals, "_CELLS_AT_ONCE", 1)
    torch.testing.assert_close(selectors.get("xattention").scores(q, k, v, CONFIG, layout=case[5]), whole)
    counts = Coverage(0.7).counts(None, CONFIG, 1, 2, whole)
    monkeypatch.setattr(strips, "_ENTRIES_AT_ONCE", 1)
    assert torch.equal(Coverage(0.7).counts(None, CONFIG, 1, 2, whole), counts)


def test_threshold_that_covers_the_true_mass():
    """Row by row: the fewest blocks with 90 % of the true mass, the least share among them, the sum from there up."""
    scores = torch.rand(2, 3, 5, 8)
    scores = scores / scores.sum(-1, keepdim=True)
    mass = torch.rand(2, 3, 5, 8)
    expected = [[], [], []]
    for b in range(2):
        for h in range(3):
            for shares, true in zip(scores[b, h].tolist(), mass[b, h].tolist(), strict=True):
                order, held, taken = sorted(range(8), key=lambda j: -true[j]), 0.0, []
                for j in order:
                    if held < 0.9 * sum(true):
                        taken.append(j)
                        held += true[j]
                least = min(shares[j] for j in taken)
                expected[h].append(sum(x for x in shares if x >= least))
    found = antidiagonals.threshold_for(scores + FORCED * (torch.rand(scores.shape) < 0.2), mass, 0.9)
    torch.testing.assert_close(found, torch.tensor(expected).mean(1), atol=2e-6, rtol=0)


def test_calibration_and_its_file(tmp_path):
    """Each head gets the threshold of its own layer."""
    pytest.importorskip("transformers", reason="the benchmark runs transformers models")
    from bench.calibrate_xattention import Calibration

    config = StemConfig(block_size=16, stride=8)
    case = ONE_PROMPT["aligned"]
    seen = Calibration(config, 0.9)
    for layer in (0, 0, 1):
        seen(layer, *(x.float() for x in inputs(case, seed=layer)), 0.25)
    thresholds = seen.thresholds()
    assert len(thresholds) == 2
    assert all(0.3 < x <= 1 for heads in thresholds for x in heads)
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"stride": 8, "thresholds": thresholds}))
    selector = antidiagonals.from_file(path, 1)
    assert selector.budget == Coverage(tuple(thresholds[1]))
    kept = block_classes(stem_block_mask(*inputs(case, seed=1), CONFIG, selector=selector)) > 0
    assert 0.2 < float(kept.float().mean()) <= 0.55
    with pytest.raises(ValueError, match=r"layer must be one of the 2 layers of x.json, got 2"):
        antidiagonals.from_file(path, 2)
