"""CoSA keeps what loops over cells keep."""

from __future__ import annotations

import pytest

from stem_flex.budget import Coverage
from stem_flex.reference import estimates
from tests.selectors.cases import EVERY, agree


@pytest.mark.parametrize("case", EVERY)
@pytest.mark.parametrize("top_p", [0.4, 0.8])
def test_cosa(case, top_p):
    agree("cosa", EVERY[case], estimates.cosa, budget=Coverage(top_p), fast={}, top_p=top_p)
