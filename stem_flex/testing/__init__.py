"""Property tests of sparse prefill, for your masks as much as for ours.

Hypothesis strategies that draw inputs, configurations, layouts and mask_mods, and assertions that say of any
BlockMask whether it is well formed, whether compiled flex_attention computes what it means, and whether a
selection is the best its budget allows. The strategies need hypothesis (``pip install stem-flex[test]``), the
assertions do not. Every check reads results back to the host: keep them out of hot paths.

A test to paste::

    from hypothesis import given, strategies as st
    from stem_flex import StemConfig, stem_block_mask, testing

    @given(st.data())
    def test_my_prompts(data):
        q, k, v = data.draw(testing.qkv())
        config = data.draw(testing.stem_configs())
        layout = data.draw(testing.layouts(q, k))
        mask = stem_block_mask(q, k, v, config, layout=layout)
        testing.assert_valid_block_mask(mask)
        assert testing.block_mask_to_dense(mask).any(-1).shape == q.shape[:3]
"""

from stem_flex.testing.assertions import (
    assert_matches_dense,
    assert_selection_optimal,
    assert_valid_block_mask,
    block_mask_to_dense,
)
from stem_flex.testing.strategies import layouts, mask_mods, qkv, stem_configs

__all__ = [
    "assert_matches_dense",
    "assert_selection_optimal",
    "assert_valid_block_mask",
    "block_mask_to_dense",
    "layouts",
    "mask_mods",
    "qkv",
    "stem_configs",
]
