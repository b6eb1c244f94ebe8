"""Prefix-LM: causal, and the first keys for all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stem_flex.layout._base import Layout
from stem_flex.plumbing.checks import check_int_tensor, check_positive, check_values
from stem_flex.plumbing.geometry import LONGEST, Geometry, Spans, check_rows


@dataclass(frozen=True, eq=False)
class Prefix(Layout):
    """See :func:`stem_flex.layout.prefix`."""

    length: int | Tensor

    def spans(self, geometry: Geometry) -> Spans:
        length = self.length
        if isinstance(length, Tensor):
            check_rows("prefix length", length, geometry)
            check_values("prefix length", length, 0)
            length = length.clamp(max=LONGEST).to(torch.int32)[:, None]
            end = torch.maximum(geometry.positions + 1, length)
        else:
            end = (geometry.positions + 1).clamp(min=min(length, LONGEST))
        return Spans(torch.zeros_like(end), end)

    def reads(self) -> tuple[Tensor, ...]:
        return (self.length,) if isinstance(self.length, Tensor) else ()

    def sizes(self) -> tuple[int, int]:
        return (self.length.shape[0] if isinstance(self.length, Tensor) else 1), 1


def prefix(length: int | Tensor) -> Layout:
    """Prefix-LM: causal, and every query keeps the first ``length`` keys, an int or an int tensor (B,)."""
    if isinstance(length, Tensor):
        check_int_tensor("prefix length", length, 1)
        check_values("prefix length", length, 0)
    else:
        check_positive("prefix length", length)
    return Prefix(length)
