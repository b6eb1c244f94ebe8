"""Stem's Triton backend: pool, score and select in one operator, streamed, with no score matrix."""

from __future__ import annotations

from torch import Tensor

from stem_flex.budget import Budget
from stem_flex.config import StemConfig
from stem_flex.plumbing.binding import BoundLayout
from stem_flex.plumbing.tables import BlockTables
from stem_flex.score import score_options
from stem_flex.select import shape_of


def tables(q: Tensor, k: Tensor, v: Tensor, bound: BoundLayout, config: StemConfig, rule: Budget) -> BlockTables | None:
    """What :func:`stem_flex.oam_scores` and :func:`stem_flex.select.select_blocks` choose, by `stem_flex.kernels`."""
    if rule.needs_scores:
        return None
    from stem_flex.kernels.ops import stem_tables

    width, partial_columns = shape_of(bound, config, rule)
    buffer, counts = stem_tables(
        q,
        k,
        v,
        bound.rows,
        rule.counts(bound, config, q.shape[0], q.shape[1]),
        *bound.restrictions,
        **score_options(config),
        sink=min(config.sink_blocks, bound.k_blocks),
        local=min(config.local_blocks, bound.k_blocks),
        partial_columns=partial_columns,
        width=width,
        max_key_blocks=bound.k_blocks,
        causal_offset=bound.causal_offset,
    )
    return BlockTables(buffer, counts, width, partial_columns, bound.k_blocks)
