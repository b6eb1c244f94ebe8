"""Block scores from q, k, v."""

from __future__ import annotations

from stem_flex.kernels import stem_scores

OPTIONS = dict(block_q=128, block_k=128, stride=8, metric="zscore", value_weight=0.2)


def test_scores(timed, qkv, bound):
    assert timed(lambda: stem_scores(*qkv, bound.rows, **OPTIONS)).shape[-1] == bound.k_blocks
