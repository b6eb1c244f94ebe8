"""Padding: batch rows of different lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from stem_flex.layout._base import Layout
from stem_flex.plumbing.checks import as_int_tensor, check_bool, check_values
from stem_flex.plumbing.geometry import Geometry, Spans, check_rows, on_device

Side = Literal["left", "right"]


@dataclass(frozen=True, eq=False)
class Padding(Layout):
    """See :func:`stem_flex.layout.padding`."""

    lengths: Tensor
    side: Side
    causal: bool = True
    longest: int = field(default=0, repr=False)
    from_host: bool = field(default=False, repr=False)

    def spans(self, geometry: Geometry) -> Spans:
        start, end = self.valid(geometry)
        last = geometry.positions + 1 if self.causal else end[:, None]
        return Spans(start[:, None].expand_as(geometry.positions_of(start)), torch.minimum(end[:, None], last))

    def valid(self, geometry: Geometry) -> tuple[Tensor, Tensor]:
        given = on_device(self.lengths, geometry) if self.from_host else self.lengths
        check_rows("padding lengths", given, geometry)
        if self.longest > geometry.k_len:
            raise ValueError(
                f"padding lengths must be at most the {geometry.k_len} keys, got {self.longest}; "
                "count the valid tokens among the keys given"
            )
        check_values("padding lengths", given, 0, geometry.k_len)
        lengths = given.to(torch.int32)
        if self.side == "right":
            return torch.zeros_like(lengths), lengths
        end = geometry.key_end(like=lengths)
        return (end - lengths).clamp(min=0), end

    def prompt(self, geometry: Geometry) -> tuple[Tensor, Tensor]:
        start, end = self.valid(geometry)
        positions = geometry.positions_of(start)
        return start[:, None].expand_as(positions), end[:, None].expand_as(positions)

    def reads(self) -> tuple[Tensor, ...]:
        return () if self.from_host else (self.lengths,)

    def sizes(self) -> tuple[int, int]:
        return self.lengths.shape[0], 1

    def forbids_future(self) -> bool:
        return self.causal


def padding(lengths: Tensor | Sequence[int], side: Side = "left", *, causal: bool = True) -> Layout:
    """Batch rows of different lengths: only ``lengths[b]`` tokens of row b are real, causal among them.

    Args:
        lengths: int (B,) on q's device, or a list: real tokens of each row among the keys given. With
            ``side="left"`` the last ones (up to ``kv_len`` where that is given), with "right" the first.
        side: where the padding stands.
        causal: False keeps every real key.

    Padding stays out of pooling, statistics and selection; a padded query gives zero output, -inf lse.
    Checks its argument once, which waits for the device that holds it.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right', got {side!r}")
    check_bool("causal", causal)
    tensor = as_int_tensor("padding lengths", lengths, 1)
    values = tensor.tolist()
    if min(values, default=0) < 0:
        raise ValueError(f"padding lengths must be 0 or more, got {min(values)}")
    return Padding(tensor, side, causal, max(values, default=0), from_host=not isinstance(lengths, Tensor))
