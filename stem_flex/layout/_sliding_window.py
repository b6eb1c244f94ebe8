"""Sliding window: the last keys up to the own position."""

from __future__ import annotations

from dataclasses import dataclass

from stem_flex.layout._base import Layout
from stem_flex.plumbing.checks import check_positive
from stem_flex.plumbing.geometry import LONGEST, Geometry, Spans


@dataclass(frozen=True)
class SlidingWindow(Layout):
    """See :func:`stem_flex.layout.sliding_window`."""

    window: int

    def spans(self, geometry: Geometry) -> Spans:
        reach = min(self.window, LONGEST) - 1
        return Spans(geometry.positions - reach, geometry.positions + 1)

    def forbids_future(self) -> bool:
        return True


def sliding_window(window: int) -> Layout:
    """Causal, of which the last ``window`` keys, the query's own included: p - window < j <= p."""
    check_positive("window", window)
    return SlidingWindow(window)
