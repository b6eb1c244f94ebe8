"""Prism (arXiv 2602.08426): block means in two bands of rotary frequencies, each with a softmax of its own.

A mean over a block averages the fast rotary components away, so that a common product of means sees the slow ones
alone. Prism takes the softmax over blocks in a band of the fast and in a band of the slow dimensions (of a head of
128: 64 and 96, overlapping), each with a temperature that restores its energy:

    logit_b = q_b k_b / (sqrt(d_b) tau_b),  tau_b = sqrt(d_b / D) * rms(q_b) / rms(q) * rms(k_b) / rms(k)

with root mean squares over all blocks of a head. A row keeps, in each band, its best blocks while those before hold
less than 0.95, and the first and its own block. Rotary halves are taken to be x[i], x[i + D/2], as transformers has
them.

Cost: O(N D), two products of block means and two sorts of rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stem_flex.config import StemConfig
from stem_flex.layout import Layout
from stem_flex.plumbing.binding import BoundLayout
from stem_flex.plumbing.strips import by_strips
from stem_flex.selectors.shared import block_sums, hide, prepare, product

FAST, SLOW = 0.5, 0.75  # of the head's dimensions


def scores(
    q: Tensor, k: Tensor, v: Tensor, config: StemConfig | None = None, *,
    layout: Layout | BoundLayout | None = None, q_offset: int | Tensor = 0,
) -> Tensor:  # fmt: skip
    """1 - what a band's better blocks hold, the larger of both bands: a row keeps what exceeds 1 - 0.95.

    Args:
        q: (B, Hq, Lq, D), D a multiple of 8; k: (B, Hkv, Lk, D); v: (B, Hkv, Lk, Dv), not looked at.
        config: its block sizes count; None means ``StemConfig()``.
        layout, q_offset: as in :func:`stem_flex.oam_scores`, of any kind.

    Returns:
        float32 (B, Hq, Qb, Kb), -inf where the layout allows nothing.

    Raises:
        ValueError: D is no multiple of 8.
    """
    config, bound = prepare(q, k, v, config, layout, q_offset)
    if q.shape[-1] % 8:
        raise ValueError(f"q must have a head dim that is a multiple of 8 for prism, got {q.shape[-1]}")
    queries = _means(q, config.query_block, bound.query_start, bound.query_end)
    keys = _means(k, config.key_block, bound.key_start, bound.key_end)
    best = None
    for index in _bands(q.shape[-1], q.device):
        mass = hide(_logits(queries, keys, index), bound).softmax(-1).nan_to_num(nan=0.0)
        left = by_strips(mass, _left)
        best = left if best is None else torch.maximum(best, left)
    assert best is not None
    return hide(best, bound)


def _means(x: Tensor, block: int, start: Tensor | None, end: Tensor | None) -> Tensor:
    """Block means, float32 (float64): energies are ratios of small numbers."""
    sums, counts = block_sums(x, block, start, end)
    return sums / counts.clamp(min=1)[:, None, :, None].to(sums.dtype)


def _bands(dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Dimensions of the fast and of the slow band."""
    place, half = torch.arange(dim, device=device), dim // 2
    fast, slow = int(FAST * half), int(SLOW * half)
    halves = [torch.arange(fast, device=device), torch.arange(half - slow, half, device=device)]
    return tuple(torch.cat([place[x], place[x + half]]) for x in halves)  # type: ignore[return-value]


def _logits(queries: Tensor, keys: Tensor, index: Tensor) -> Tensor:
    """Products of one band at its temperature, (B, Hq, Qb, Kb)."""
    size, dim = len(index), queries.shape[-1]
    tau = torch.full((), math.sqrt(size / dim), dtype=queries.dtype, device=queries.device)
    for x in (queries, keys):
        part, whole = (y.square().mean((2, 3)).sqrt() for y in (x[..., index], x))
        ratio = part / whole.clamp(min=1e-6)
        tau = tau * ratio.repeat_interleave(queries.shape[1] // x.shape[1], 1)
    logits = product(queries[..., index], keys[..., index], 1 / math.sqrt(size))
    return logits / tau.clamp(min=1e-20)[..., None, None]


def _left(mass: Tensor) -> Tensor:
    """1 - the mass of the better blocks of the row, at every block."""
    ordered, index = mass.sort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(mass).scatter_(-1, index, 1 - (ordered.cumsum(-1) - ordered))
