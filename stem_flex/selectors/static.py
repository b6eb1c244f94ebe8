"""Patterns that don't look at the prompt: dense, A-shape (StreamingLLM), Tri-shape; random blocks; block means.

A pattern's score is a closeness in (0, 1], so that any budget has an order to take blocks in, lifted by
`rules.PREFERRED` inside the pattern; the rule ``Above(PREFERRED)`` keeps the pattern itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stem_flex.budget import PREFERRED
from stem_flex.config import StemConfig
from stem_flex.layout import Layout
from stem_flex.plumbing.binding import BoundLayout
from stem_flex.selectors.shared import block_means, hide, offsets_between, own_distance, prepare, product


def dense(
    q: Tensor, k: Tensor, v: Tensor, config: StemConfig | None = None, *,
    layout: Layout | BoundLayout | None = None, q_offset: int | Tensor = 0,
) -> Tensor:  # fmt: skip
    """Everything the layout allows, nearest first."""
    config, bound = prepare(q, k, v, config, layout, q_offset)
    return hide((_closeness(bound) + PREFERRED)[:, None].expand(*q.shape[:2], -1, -1), bound)


def a_shape(
    q: Tensor, k: Tensor, v: Tensor, config: StemConfig | None = None, *,
    layout: Layout | BoundLayout | None = None, q_offset: int | Tensor = 0, initial: int = 128, local: int = 3968,
) -> Tensor:  # fmt: skip
    """The first ``initial`` keys and the last ``local`` ones of each query (StreamingLLM, arXiv 2309.17453).

    A block is inside where one of its pairs is. First are the first blocks of the row's own range: a document's,
    a window's.

    Args:
        q, k, v, config, layout, q_offset: as in :func:`stem_flex.oam_scores`; only their sizes count.
        initial, local: tokens.

    Returns:
        float32 (B, Hq, Qb, Kb), at least 2 inside, -inf where the layout allows nothing.
    """
    config, bound = prepare(q, k, v, config, layout, q_offset)
    return _scored(q, bound, _a_shape(bound, config, initial, local))


def tri_shape(
    q: Tensor, k: Tensor, v: Tensor, config: StemConfig | None = None, *,
    layout: Layout | BoundLayout | None = None, q_offset: int | Tensor = 0, initial: int = 128, local: int = 3968,
    last: int = 100,
) -> Tensor:  # fmt: skip
    """Tri-shape (MInference): :func:`a_shape`, and rows with one of the prompt's ``last`` queries keep everything."""
    config, bound = prepare(q, k, v, config, layout, q_offset)
    full = last_rows(bound, last)
    return _scored(q, bound, _a_shape(bound, config, initial, local) | full[..., None])


def scattered(
    q: Tensor, k: Tensor, v: Tensor, config: StemConfig | None = None, *,
    layout: Layout | BoundLayout | None = None, q_offset: int | Tensor = 0,
) -> Tensor:  # fmt: skip
    """Random scores in [0, 1), the same on every call: a hash of the head's first query and the pair's place."""
    config, bound = prepare(q, k, v, config, layout, q_offset)
    bits = q[:, :, 0].float().contiguous().view(torch.int32).long().sum(-1)[..., None, None]
    own = (bound.own_hi - 1).long()[:, None, :, None]
    key = torch.arange(bound.k_blocks, device=q.device)
    mixed = (bits + own * 0x9E3779B1 + key * 0x85EBCA77) & 0xFFFFFFFF
    for multiplier in (0x45D9F3B, 0x45D9F3B, 1):  # an integer hash: shift, multiply, again
        mixed = ((mixed ^ (mixed >> 16)) * multiplier) & 0xFFFFFFFF
    return hide((mixed >> 8).float() / 2**24, bound)


def means(
    q: Tensor, k: Tensor, v: Tensor, config: StemConfig | None = None, *,
    layout: Layout | BoundLayout | None = None, q_offset: int | Tensor = 0,
) -> Tensor:  # fmt: skip
    """Scaled product of the mean query and the mean key of two blocks: the plainest estimate there is."""
    config, bound = prepare(q, k, v, config, layout, q_offset)
    queries = block_means(q, config.query_block, bound.query_start, bound.query_end)
    keys = block_means(k, config.key_block, bound.key_start, bound.key_end)
    return hide(product(queries, keys, q.shape[-1] ** -0.5), bound)


def last_rows(bound: BoundLayout, tokens: int) -> Tensor:
    """Rows that hold one of the last ``tokens`` queries of their prompt, bool (1 or B, Qb)."""
    place = bound.geometry.column(bound.geometry.q_offset)
    row = torch.arange(1, bound.q_blocks + 1, device=bound.rows.device) * bound.block_size[0]
    after = place + row.clamp(max=bound.seq_lengths[0])
    _, end = bound.prompts()
    return torch.minimum(after, end) > end - tokens


def _closeness(bound: BoundLayout) -> Tensor:
    """1 on the row's own last block, then 1/2, 1/3, ...: (1 or B, Qb, Kb); the future is as close."""
    return 1 / (1 + own_distance(bound).abs().float())


def _a_shape(bound: BoundLayout, config: StemConfig, initial: int, local: int) -> Tensor:
    least, _ = offsets_between(bound)
    key = torch.arange(bound.k_blocks, device=bound.rows.device)
    first = key < (bound.lo + -(-initial // config.key_block))[..., None]
    return (least < local) | first


def _scored(q: Tensor, bound: BoundLayout, inside: Tensor) -> Tensor:
    closeness = _closeness(bound)
    first = torch.arange(bound.k_blocks, device=q.device) == bound.lo[..., None]
    scores = torch.where(first, 1.0, closeness) + PREFERRED * inside
    return hide(scores[:, None].expand(*q.shape[:2], -1, -1), bound)
