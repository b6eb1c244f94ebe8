"""Some rows at a time, where all at once would take too much memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_ENTRIES_AT_ONCE = 2**26  # scores sorted at a time: 256 MiB, three times that with the indices


def strips(rows: int, entries: int, most: int | None = None) -> Iterator[slice]:
    """Slices of ``rows`` rows of ``entries`` numbers each, so that one slice holds at most ``most`` of them."""
    step = max(1, (_ENTRIES_AT_ONCE if most is None else most) // max(entries, 1))
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def by_strips(scores: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """``f`` of scores (B, H, Qb, Kb), some rows at a time, put together again along Qb."""
    entries = scores.shape[0] * scores.shape[1] * scores.shape[3]
    return torch.cat([f(scores[:, :, rows]) for rows in strips(scores.shape[2], entries)], 2)
