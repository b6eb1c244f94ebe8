"""SpargeAttn keeps what loops with whole cosine matrices keep."""

from __future__ import annotations

import pytest
import torch

from stem_flex import selectors
from stem_flex.budget import Coverage
from stem_flex.reference import estimates
from stem_flex.selectors import spargeattn
from stem_flex.selectors.rules import Part
from tests.selectors.cases import EVERY, ONE_PROMPT, agree, inputs


def topical(case):
    """Inputs of which about half of the blocks have tokens that are alike."""
    q, k, v = inputs(case, sharpness=1.0)
    generator = torch.Generator().manual_seed(5)
    for x, size in ((q, 4.0), (k, 6.0)):
        blocks = -(-x.shape[2] // 16)
        topic = torch.randn(*x.shape[:2], blocks, x.shape[3], generator=generator, dtype=x.dtype)
        strong = torch.rand(*x.shape[:2], blocks, 1, generator=generator) < 0.6
        x += (size * topic * strong).repeat_interleave(16, 2)[:, :, : x.shape[2]]
    return q, k, v


@pytest.mark.parametrize("case", EVERY)
def test_spargeattn(case):
    """By the cumulative softmax and by a part of all blocks; some blocks are not alike and kept whatever they score."""
    qkv = topical(EVERY[case])
    for rule, options in ((Coverage(0.6, floor=1, crossing=False), {"cdf": 0.6, "topk": None}),
                          (Part(0.3), {"cdf": None, "topk": 0.3})):  # fmt: skip
        kept = agree("spargeattn", EVERY[case], estimates.spargeattn, qkv, budget=rule,
                     fast={"similarity": 0.6}, similarity=0.6, **options)  # fmt: skip
        assert kept.any()


def test_published_settings():
    """0.6 and 98 %, -0.1 and half; the mean cosine is that of the whole matrix."""
    assert selectors.get("spargeattn").budget == Coverage(0.98, floor=1, crossing=False)
    case = ONE_PROMPT["ragged, GQA, batch"]
    qkv = topical(case)
    agree("spargeattn", case, estimates.spargeattn, qkv, fast={}, similarity=0.6, cdf=0.98, topk=None)
    agree("spargeattn-topk", case, estimates.spargeattn, qkv, fast={}, similarity=-0.1, cdf=None, topk=0.5)
    alike = [spargeattn.alike(qkv[1], 16, None, None, x)[1, 1, 3] for x in (-1.0, 1.0)]
    assert alike == [True, False]
