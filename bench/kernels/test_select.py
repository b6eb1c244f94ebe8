"""Selection from a score matrix."""

from __future__ import annotations

from stem_flex import StemConfig, oam_scores
from stem_flex.select import select_blocks


def test_select(timed, qkv, bound):
    scores = oam_scores(*qkv)
    assert timed(lambda: select_blocks(scores, bound, StemConfig())).k_blocks == bound.k_blocks
