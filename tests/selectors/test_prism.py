"""Prism keeps what loops over rows keep."""

from __future__ import annotations

import pytest

from stem_flex import selectors
from stem_flex.reference import estimates
from tests.selectors.cases import CONFIG, EVERY, ONE_PROMPT, agree, inputs


@pytest.mark.parametrize("case", [case for case in EVERY if "padded" not in case])
def test_prism(case):
    qkv = inputs(EVERY[case], sharpness=1.0)
    agree("prism", EVERY[case], estimates.prism, qkv, fast={}, part=0.95)


@pytest.mark.parametrize("case", ["padded left", "padded right"])
def test_prism_of_padded_rows(case):
    """A padded row keeps what the row alone keeps, by blocks of the same cut."""
    given = ONE_PROMPT[case]
    qkv = inputs(given, sharpness=1.0)
    agree("prism", given, estimates.prism, qkv, fast={}, part=0.95)


def test_bands_of_a_head_of_128():
    """64 fast and 96 slow dimensions."""
    fast, slow = estimates.bands(128)
    assert (fast, slow) == ([*range(32), *range(64, 96)], [*range(16, 64), *range(80, 128)])
    q, k, v = inputs((1, 2, 1, 64, 64), dim=12)
    with pytest.raises(ValueError, match="q must have a head dim that is a multiple of 8 for prism, got 12"):
        selectors.get("prism").scores(q, k, v, CONFIG)
