"""Budget rules of the published selectors: how many blocks a row keeps by what its scores say.

The selectors that come with rules of their own write each block's **share** of its row, a number in [0, 1], into
the score, and lift blocks that stand above any share: a *preferred* block by 2, a *forced* one by 4. Sorting a row
then puts forced blocks first, preferred ones next, and the share is still there to be summed: :func:`share`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stem_flex.budget import Budget

PREFERRED, FORCED = 2.0, 4.0
_ENTRIES_AT_ONCE = 2**26  # scores sorted at a time: 256 MiB, three times that with the indices


def share(scores: Tensor) -> Tensor:
    """Share of each block without its lift, 0 where the layout allows nothing."""
    return torch.where(scores.isfinite(), scores.remainder(PREFERRED), 0.0)


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
class Coverage(Budget):
    """A row keeps its forced blocks, and the fewest best others with which the shares reach ``share`` of their sum.

    Blocks are taken by score: forced, preferred, the rest. What is forced counts in the sum.

    Args:
        share: of the row's sum; one number, or one for each query head. 1 keeps everything.
        floor, cap: least and most blocks beside the forced ones.
        crossing: False leaves out the block that reaches the share, as SpargeAttn does.
    """

    share: float | tuple[float, ...]
    floor: int = 0
    cap: int | None = None
    crossing: bool = True
    needs_scores = True

    def counts(self, bound, config, batch, heads, scores=None):
        assert scores is not None
        if isinstance(self.share, tuple) and len(self.share) != heads:
            raise ValueError(f"share must be a number or one for each of the {heads} query heads, got {self.share}")
        wanted = self.share if isinstance(self.share, float | int) else _on(self.share, scores.device)[:, None]
        return by_strips(scores, functools.partial(self._counts, wanted=wanted))

    def _counts(self, scores: Tensor, wanted: float | Tensor) -> Tensor:
        ordered = scores.sort(-1, descending=True).values
        shares = share(ordered)
        upto = shares.cumsum(-1)
        limit = wanted * upto[..., -1]
        reached = upto - shares < limit[..., None] if self.crossing else upto <= limit[..., None]
        taken = reached.sum(-1, dtype=torch.int32)
        everything = wanted >= 1
        number = scores.shape[-1]
        taken = torch.where(everything, number, taken) if isinstance(everything, Tensor) else taken
        if everything is True:
            taken = torch.full_like(taken, number)
        forced = (scores >= FORCED).sum(-1, dtype=torch.int32)
        return forced + (taken - forced).clamp(min=self.floor, max=self.cap)


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


@functools.lru_cache(maxsize=256)
def _on(values: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what is kept serves every mode
        return torch.tensor(values, dtype=torch.float32, device=device)


def strips(rows: int, entries: int, most: int = _ENTRIES_AT_ONCE) -> Iterator[slice]:
    """Slices of ``rows`` rows of ``entries`` numbers each, so that one slice holds at most ``most`` of them."""
    step = max(1, most // max(entries, 1))
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def by_strips(scores: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """``f`` of scores (B, H, Qb, Kb), some rows at a time, put together again along Qb."""
    entries = scores.shape[0] * scores.shape[1] * scores.shape[3]
    return torch.cat([f(scores[:, :, rows]) for rows in strips(scores.shape[2], entries)], 2)
