"""Full: every query keeps every key."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stem_flex.layout._base import Layout
from stem_flex.plumbing.geometry import Geometry, Spans


@dataclass(frozen=True)
class Full(Layout):
    """See :func:`stem_flex.layout.full`."""

    def spans(self, geometry: Geometry) -> Spans:
        zeros = torch.zeros_like(geometry.positions)
        return Spans(zeros, zeros + geometry.k_len)


_FULL = Full()  # one object, so that every call shares its bindings


def full() -> Layout:
    """Every query keeps every key: the non-causal base to intersect others with."""
    return _FULL
