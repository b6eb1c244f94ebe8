"""Some rows of query blocks of a bound layout, as a binding of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stem_flex.plumbing.binding import BoundLayout
from stem_flex.plumbing.geometry import Spans
from stem_flex.plumbing.mods import MaskModFn, causal_mask, interval_mod, shifted


def rows_of(bound: BoundLayout, first: int, last: int) -> BoundLayout:
    """The query blocks [first, last) of ``bound`` against all of its keys, remembered as long as it is.

    What a row may attend to, where it stands and what it may keep are the whole's, so that rows chosen apart are
    the rows of one choice. The mask_mod counts queries from the slice's first.
    """
    with torch.inference_mode(False), torch.no_grad():  # what is remembered serves every mode
        return bound.remembered(("rows", first, last), lambda: _rows_of(bound, first, last))


def _rows_of(bound: BoundLayout, first: int, last: int) -> BoundLayout:
    geometry = bound.geometry
    start = first * geometry.q_block
    length = min(last * geometry.q_block, geometry.q_len) - start
    cut = replace(geometry, q_len=length, q_offset=geometry.q_offset + start)
    classes = None if bound.classes is None else bound.classes[:, :, first:last]
    spans = mask_mod = None
    if bound.mask_mod is not causal_mask and bound.spans is not None:
        columns = slice(start, last * geometry.q_block)
        spans = Spans(*(x if x.shape[1] == 1 else x[:, columns] for x in bound.spans))
        mask_mod = interval_mod(False, cut, spans)
    part: dict[str, Any] = dict(
        rows=bound.rows[:, first:last].contiguous(),
        classes=classes,
        query_start=_counted(bound.query_start, start, length),
        query_end=_counted(bound.query_end, start, length),
        mask_mod=mask_mod or _from(bound, start, length),
        seq_lengths=(length, bound.seq_lengths[1]),
        geometry=cut,
        spans=spans,
        memo=None if bound.memo is None else {},
    )
    return replace(bound, **part)


def _from(bound: BoundLayout, start: int, length: int) -> MaskModFn:
    if start == 0:
        return bound.mask_mod
    return shifted(bound.mask_mod, start, length, bound.seq_lengths[0], bound.rows.device)


def _counted(end: Tensor | None, start: int, length: int) -> Tensor | None:
    return None if end is None else (end - start).clamp(min=0, max=length).to(torch.int32)
