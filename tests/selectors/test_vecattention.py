"""VecAttention keeps what loops over keys keep."""

from __future__ import annotations

import pytest
import torch

from stem_flex.reference import estimates
from stem_flex.selectors import vecattention
from stem_flex.selectors.rules import Relative
from tests.selectors.cases import CONFIG, EVERY, agree, inputs


@pytest.mark.parametrize("case", EVERY)
@pytest.mark.parametrize("alpha", [0.1, 0.7])
def test_vecattention(case, alpha):
    agree("vecattention", EVERY[case], estimates.vecattention, budget=Relative(alpha), fast={}, alpha=alpha)


def test_in_strips(monkeypatch):
    q, k, v = inputs(EVERY["documents"])
    whole = vecattention.scores(q, k, v, CONFIG, layout=EVERY["documents"][5])
    monkeypatch.setattr(vecattention, "_LOGITS_AT_ONCE", 1)
    torch.testing.assert_close(vecattention.scores(q, k, v, CONFIG, layout=EVERY["documents"][5]), whole)
