"""ProxyAttn keeps what loops over pooled heads and tokens keep."""

from __future__ import annotations

import pytest
import torch

from stem_flex import layout
from stem_flex.reference import estimates
from stem_flex.reference import selectors as loops
from stem_flex.selectors import flexprefill, minference, proxyattn
from tests.selectors.cases import CONFIG, ONE_PROMPT, agree, chosen, inputs


def pooled(q, k, proxies):
    """Mean queries and keys of each group of heads, batch row 0."""
    group = q.shape[1] // proxies
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return [tuple(x[0, p * group : (p + 1) * group].mean(0) for x in (q, keys)) for p in range(proxies)]


@pytest.mark.parametrize("proxies", [1, 2, 4])
@pytest.mark.parametrize("case", ["aligned", "chunk", "window", "ragged, GQA, batch"])
def test_proxyattn(case, proxies):
    """Groups across key heads, of one key head, and single heads."""
    given = (1, 4, 2, *ONE_PROMPT[case][3:])
    q, k, v = inputs(given)
    agree("proxyattn", given, estimates.proxyattn, (q, k, v), fast={"proxies": proxies, "gamma": 0.6},
          pooled=pooled(q, k, proxies), group=4 // proxies, gamma=0.6)  # fmt: skip


@pytest.mark.parametrize("case", ["padded left", "padded right"])
def test_proxyattn_of_padded_rows(case):
    batch = ONE_PROMPT[case]
    q, k, v = inputs(batch)
    kept, used = chosen("proxyattn", batch, (q, k, v), proxies=2)
    for row in range(2):
        one = layout.padding(batch[5].lengths[row : row + 1], side=batch[5].side)
        qkv = tuple(x[row : row + 1] for x in (q, k, v))
        options = {"pooled": pooled(*qkv[:2], 2), "group": 1, "gamma": 0.9}
        expected = loops.kept(estimates.proxyattn, *qkv, used, layout=one, **options)
        assert torch.equal(kept[row], expected[0])


def test_in_strips(monkeypatch):
    q, k, v = inputs(ONE_PROMPT["ragged, GQA, batch"])
    whole = proxyattn.scores(q, k, v, CONFIG)
    monkeypatch.setattr(proxyattn, "_WEIGHTS_AT_ONCE", 1)
    torch.testing.assert_close(proxyattn.scores(q, k, v, CONFIG), whole)


@pytest.mark.parametrize("module", [proxyattn, minference, flexprefill])
def test_last_queries_that_see_nothing(module):
    """A window whose last queries lie past all keys: their softmax is nobody's."""
    q, k, v = inputs((1, 2, 1, 200, 200))
    options = {"layout": layout.sliding_window(17), "q_offset": 40}
    assert not module.scores(q, k, v, CONFIG, **options).isnan().any()
