"""The selectors' budget rules, row by row in Python."""

from __future__ import annotations

import math

import pytest
import torch

from stem_flex import StemConfig, layout
from stem_flex.budget import FORCED, PREFERRED, Coverage, share_of
from stem_flex.selectors.rules import Above, Part, Relative

CONFIG = StemConfig(block_size=16, stride=8)


@pytest.fixture
def rows() -> torch.Tensor:
    """Shares (2, 3, 10, 10) of causal rows, the first block forced, one in five others preferred."""
    shares = torch.rand(2, 3, 10, 10).tril()
    shares = shares / shares.sum(-1, keepdim=True)
    scores = shares + PREFERRED * (torch.rand(shares.shape) < 0.2)
    scores[..., 0] = shares[..., 0] + FORCED
    return scores.masked_fill(torch.ones(10, 10).triu(1) > 0, -math.inf)


def bound(Lq: int = 160, Lk: int = 160, **options):
    return layout.causal().bind(2, 3, Lq, Lk, block_size=(16, 16), **options)


def counted(rule, scores):
    return rule.counts(bound(), CONFIG, 2, 3, scores)


def test_the_share_is_what_was_not_lifted(rows):
    torch.testing.assert_close(share_of(rows).sum(-1), torch.ones(2, 3, 10))
    assert share_of(torch.tensor([1.0, 5.0, 9.0, 13.0, -math.inf])).tolist() == [1.0, 1.0, 1.0, 1.0, 0.0]


def test_above(rows):
    assert torch.equal(counted(Above(PREFERRED), rows), (rows >= PREFERRED).sum(-1).int())


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_relative(rows, alpha):
    """Forced, or at least alpha of the best share; the prompt's last rows keep everything."""
    got = counted(Relative(alpha, full_rows=2), rows)
    for row, scores in enumerate(rows[1, 2]):
        seen = [float(x) for x in scores[: row + 1]]
        best = max(x % PREFERRED for x in seen)
        wanted = 10 if row >= 8 else sum(x >= FORCED or x % PREFERRED >= alpha * best for x in seen)
        assert int(got[1, 2, row]) == wanted


def test_the_last_rows_are_the_prompts_not_the_chunks():
    """A chunk that does not end the prompt has no last rows."""
    scores = torch.rand(2, 3, 2, 10)
    whole = bound(32, 160, q_offset=128)
    assert Relative(0.5, full_rows=1).counts(whole, CONFIG, 2, 3, scores)[0, 0, 1] == 10
    early = bound(32, 160, q_offset=128, prompt_len=800)
    assert Relative(PREFERRED, full_rows=1).counts(early, CONFIG, 2, 3, scores)[0, 0].tolist() == [0, 0]


@pytest.mark.parametrize(
    "rule",
    [Coverage(0.5), Coverage(0.9, floor=2), Coverage(0.9, cap=2), Coverage(0.7, crossing=False, floor=1), Coverage(1.0),
     Coverage((0.1, 0.5, 0.9))],
)  # fmt: skip
def test_coverage(rows, rule):
    """Forced blocks, then preferred, then others, while less than the share is held (or until it would be passed)."""
    got = counted(rule, rows)
    for h in range(3):
        part = rule.share[h] if isinstance(rule.share, tuple) else rule.share
        for row in range(10):
            ordered = sorted((float(x) for x in rows[1, h, row, : row + 1]), reverse=True)
            shares = [x % PREFERRED for x in ordered]
            limit = part * math.fsum(shares)
            forced = sum(x >= FORCED for x in ordered)
            if part >= 1:
                taken = 10
            elif rule.crossing:
                taken = sum(math.fsum(shares[:n]) < limit for n in range(len(shares)))
            else:
                taken = sum(math.fsum(shares[: n + 1]) <= limit for n in range(len(shares)))
            free = max(taken - forced, rule.floor)
            assert int(got[1, h, row]) == forced + (free if rule.cap is None else min(free, rule.cap))


def test_part(rows):
    assert torch.equal(counted(Part(0.35), rows), torch.full((2, 3, 10), 4, dtype=torch.int32))
    assert torch.equal(counted(Part(0.01), rows), torch.full((2, 3, 10), 2, dtype=torch.int32))
