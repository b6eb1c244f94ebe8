"""Budget rules of the published selectors: how many blocks a row keeps by what its scores say.

The selectors that come with rules of their own write each block's **share** of its row, a number in [0, 1], into
the score, and lift blocks that stand above any share: a *preferred* block by PREFERRED, a *forced* one by FORCED.
Sorting a row then puts forced blocks first, preferred ones next, and the share is still there to be summed
(:func:`stem_flex.budget.share_of`). Rules that sum shares are :class:`stem_flex.budget.Coverage`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stem_flex.budget import FORCED, PREFERRED, Budget


@dataclass(frozen=True)
class Above(Budget):
    """A row keeps the blocks that score at least ``threshold``.

    Args:
        threshold: PREFERRED keeps what a pattern holds (:mod:`.static`).
    """

    threshold: float
    needs_scores = True

    def counts(self, bound, config, batch, heads, scores=None):
        assert scores is not None
        return (scores >= self.threshold).sum(-1, dtype=torch.int32)


@dataclass(frozen=True)
class Relative(Budget):
    """A row keeps its forced blocks and those whose share is at least ``alpha`` times its best block's.

    Args:
        alpha: 0 or less keeps everything.
        full_rows: so many last rows of the prompt keep everything.
    """

    alpha: float
    full_rows: int = 0
    needs_scores = True

    def counts(self, bound, config, batch, heads, scores=None):
        assert scores is not None
        shares = torch.where(scores.isfinite(), scores.remainder(PREFERRED), -1.0)
        wanted = (shares >= self.alpha * shares.amax(-1, keepdim=True).clamp(min=0)) & (shares >= 0)
        wanted = wanted | (scores >= FORCED)
        counts = wanted.sum(-1, dtype=torch.int32)
        full = bound.position >= bound.prompt_blocks - self.full_rows
        return torch.where(full[:, None], bound.k_blocks, counts) if self.full_rows else counts


@dataclass(frozen=True)
class Part(Budget):
    """A row keeps its forced blocks and ``int(fraction * Kb)`` best others, at least one.

    Args:
        fraction: of all key blocks, whether the row may see them or not, as SpargeAttn counts.
    """

    fraction: float
    needs_scores = True

    def counts(self, bound, config, batch, heads, scores=None):
        assert scores is not None
        forced = (scores >= FORCED).sum(-1, dtype=torch.int32)
        return forced + max(1, int(self.fraction * bound.k_blocks))
