"""The block sketch and a budget of mass, from q and k to tables."""

from __future__ import annotations

from stem_flex import StemConfig, stem_block_mask


def test_sketch_tables(timed, qkv):
    q, k, v = qkv
    assert timed(lambda: stem_block_mask(q, k, v, StemConfig.mass())).shape[-1] == k.shape[2]
