"""Causal: a query keeps the keys up to its own position."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stem_flex.layout._base import Layout
from stem_flex.plumbing.geometry import Geometry, Spans


@dataclass(frozen=True)
class Causal(Layout):
    """See :func:`stem_flex.layout.causal`."""

    plain_causal = True

    def forbids_future(self) -> bool:
        return True

    def spans(self, geometry: Geometry) -> Spans:
        return Spans(torch.zeros_like(geometry.positions), geometry.positions + 1)


_CAUSAL = Causal()  # one object, so that every call shares its bindings


def causal() -> Layout:
    """A query keeps the keys up to its own position: j <= p."""
    return _CAUSAL
