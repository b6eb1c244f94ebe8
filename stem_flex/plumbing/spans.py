"""Where each packed document starts and ends."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def spans_of_lengths(bounds: Tensor) -> tuple[Tensor, Tensor]:
    """[start, end) of the document of each token from cumulative lengths, int32 (1, tokens) each."""
    values = bounds.tolist()
    if not values or values[0] != 0 or any(b < a for a, b in itertools.pairwise(values)):
        raise ValueError(f"cu_seqlens must start at 0 and never fall, got {_shown(values)}")
    bounds = bounds.to(torch.int32)
    lengths = bounds.diff().long()
    starts = bounds[:-1].repeat_interleave(lengths, output_size=values[-1])
    ends = bounds[1:].repeat_interleave(lengths, output_size=values[-1])
    return starts[None], ends[None]


def spans_of_ids(ids: Tensor) -> tuple[Tensor, Tensor]:
    """[start, end) of the document of each token from its document's number, int32 (1 or B, tokens) each."""
    if ids.dim() == 1:
        ids = ids[None]
    tokens = ids.shape[1]
    place = torch.arange(tokens, dtype=torch.int32, device=ids.device).expand_as(ids)
    changes = torch.ones_like(ids, dtype=torch.bool)
    changes[:, 1:] = ids[:, 1:] != ids[:, :-1]
    for row, starts in zip(ids, changes, strict=True):
        runs, distinct = int(starts.sum()), row.unique().numel()
        if runs != distinct:
            raise ValueError(f"ids must come in contiguous runs, got {runs} runs of {distinct} documents")
    starts = torch.where(changes, place, 0).cummax(1).values
    lasts = torch.ones_like(changes)
    lasts[:, :-1] = changes[:, 1:]
    ends = torch.where(lasts, place + 1, tokens).flip(1).cummin(1).values.flip(1)
    return starts.int(), ends.int()


def _shown(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"{values[:8]} and {len(values) - 8} more"
