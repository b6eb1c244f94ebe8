"""The error oracle is the change of the output when a block is masked out."""

from __future__ import annotations

import pytest
import torch

from stem_flex import StemConfig
from stem_flex.reference import estimates
from stem_flex.reference import selectors as loops
from stem_flex.reference.structure import row_places, token_mask
from stem_flex.selectors import oracle
from tests.selectors.cases import CONFIG, EVERY, inputs


@pytest.mark.parametrize("case", ["ragged, GQA, batch", "chunk off the blocks", "padded left", "documents"])
def test_error_scores(case):
    batch, heads, kv_heads, q_len, k_len, given, offset = EVERY[case]
    q, k, v = inputs(EVERY[case])
    scores = oracle.error_scores(q, k, v, CONFIG, layout=given, q_offset=offset)
    masks = token_mask(given, batch, heads, q_len, k_len, offset)
    places = row_places(given, 0, q_len, k_len, (16, 16), offset)
    for b, h in ((0, 0), (batch - 1, heads - 1)):
        g = h // (heads // kv_heads)
        head = loops.Head(q[b, h], k[b, g], v[b, g], masks[b, h], (16, 16), 8, 0, (0, q_len), (0, k_len), places, h)
        for i in range(0, head.rows, 2):
            for j in head.allowed(i):
                assert scores[b, h, i, j] == pytest.approx(estimates.change_without(head, i, j), abs=1e-5, rel=1e-4)


def test_a_budget_of_it_loses_least():
    """Of single blocks left out, the one that scores lowest changes the output least: that is what the score says."""
    q, k, v = inputs((1, 1, 1, 128, 128))
    config = StemConfig(block_size=32, stride=8, sink_blocks=0, local_blocks=0)
    scores = oracle.error_scores(q, k, v, config)[0, 0, 3]
    out = {}
    for dropped in (int(scores.argmin()), int(scores.argmax())):
        logits = (q[0, 0, 96:] @ k[0, 0].T / 4).masked_fill(torch.ones(32, 128).triu(97) > 0, -torch.inf)
        dense = logits.softmax(-1) @ v[0, 0]
        logits[:, dropped * 32 : dropped * 32 + 32] = -torch.inf
        out[dropped] = float((logits.softmax(-1) @ v[0, 0] - dense).norm())
    low, high = out.values()
    assert low < high
