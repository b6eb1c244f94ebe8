"""Logits of cells reduced by block: what the selectors that look at tokens or antidiagonals take."""

from __future__ import annotations

import pytest

from stem_flex import StemConfig
from stem_flex.selectors import get
from stem_flex.selectors.oracle import block_mass


def test_mass(timed, qkv):
    q, k, _ = (x[:, :, :32768] for x in qkv)
    assert timed(lambda: block_mass(q, k, (128, 128)))[0].shape[-1] == 256


@pytest.mark.parametrize("name", ["xattention", "cosa", "vecattention", "flashprefill", "proxyattn"])
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_scores(timed, qkv, bound, name, impl):
    selector = get(name)
    config = selector.configured(StemConfig())
    assert timed(lambda: selector.scores(*qkv, config, layout=bound, impl=impl)).shape[-1] == bound.k_blocks
