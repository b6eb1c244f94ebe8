"""FlashPrefill keeps what loops over queries keep."""

from __future__ import annotations

import pytest
import torch

from stem_flex import selectors
from stem_flex.reference import selectors as loops
from stem_flex.selectors import flashprefill
from stem_flex.selectors.rules import Relative
from tests.selectors.cases import CONFIG, EVERY, ONE_PROMPT, agree, inputs


@pytest.mark.parametrize("case", EVERY)
@pytest.mark.parametrize("name", ["flashprefill", "flashprefill-v2"])
def test_flashprefill(case, name):
    """Both versions; the rows that are dense as a whole are the prompt's last, a document's too."""
    rule = selectors.get(name).budget
    agree(name, EVERY[case], loops.flashprefill, fast={}, alpha=rule.alpha, full_rows=rule.full_rows)
    agree(name, EVERY[case], loops.flashprefill, fast={}, budget=Relative(0.6), alpha=0.6, full_rows=0)


def test_flashprefill_in_strips(monkeypatch):

    q, k, v = inputs(ONE_PROMPT["ragged, GQA, batch"])
    whole = flashprefill.scores(q, k, v, CONFIG)
    monkeypatch.setattr(flashprefill, "_LOGITS_AT_ONCE", 1)
    torch.testing.assert_close(flashprefill.scores(q, k, v, CONFIG), whole)
