"""The base of all layouts, their intersection, and the interval that a binding was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stem_flex.plumbing.binding import BoundLayout, bind
from stem_flex.plumbing.geometry import Geometry, Spans
from stem_flex.plumbing.recipes import Picklable
from stem_flex.plumbing.structure import Structure


class Layout(Picklable, Structure):
    """Base of all layouts; the functions of `stem_flex.layout` make one."""

    def __and__(self, other: Layout) -> Layout:
        if not isinstance(other, Layout):
            raise TypeError(f"& needs a layout on both sides, got {type(other).__name__}")
        return And(self, other)

    def bind(
        self,
        batch: int,
        heads: int,
        q_len: int,
        k_len: int,
        *,
        q_offset: int | Tensor = 0,
        kv_len: int | Tensor | None = None,
        prompt_len: int | Tensor | None = None,
        block_size: tuple[int, int] = (128, 128),
        device: torch.device | str = "cpu",
    ) -> BoundLayout:
        """Block-level facts of this layout for q (batch, heads, q_len, D) and k of k_len keys.

        Memoised when everything is host-known or unchanged, so that the layers of a model share it.
        """
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        return bind(self, batch, heads, q_len, k_len, q_offset, kv_len, prompt_len, block_size, device)


@dataclass(frozen=True, eq=False)
class And(Layout):
    """Intersection of two layouts, ``left & right``."""

    left: Layout
    right: Layout

    def parts(self) -> tuple[Layout, ...]:
        return self.left.parts() + self.right.parts()

    def reads(self) -> tuple[Any, ...] | None:
        left, right = self.left.reads(), self.right.reads()
        return None if left is None or right is None else left + right


@dataclass(frozen=True, eq=False)
class Interval(Layout):
    """The keys [start, end) of each local query, as a binding had them, whatever its tensors hold by now."""

    bound: Spans

    def spans(self, geometry: Geometry) -> Spans:
        return self.bound

    def sizes(self) -> tuple[int, int]:
        return self.bound.start.shape[0], 1
