"""Any BlockMask as a layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.nn.attention.flex_attention import BlockMask

from stem_flex.layout._base import Layout
from stem_flex.layout._mask_mod import MaskMod
from stem_flex.plumbing.checks import check_block_mask
from stem_flex.plumbing.geometry import Geometry
from stem_flex.plumbing.mods import MaskModFn
from stem_flex.plumbing.tables import block_mask_mod
from stem_flex.plumbing.watched import watched_values


@dataclass(frozen=True, eq=False)
class FromBlockMask(Layout):
    """See :func:`stem_flex.layout.from_block_mask`."""

    block_mask: BlockMask
    mod: MaskModFn = field(repr=False)

    def sizes(self) -> tuple[int, int]:
        batch, heads = self.block_mask.kv_num_blocks.shape[:2]
        return batch, heads

    def reads(self) -> tuple[Any, ...] | None:
        return watched_values(self.mod)

    def token_mask(self, geometry: Geometry) -> MaskModFn:
        Lq, Lk = self.block_mask.seq_lengths
        return MaskMod(self.mod, *self.sizes(), Lq, Lk, "from_block_mask").token_mask(geometry)


def from_block_mask(block_mask: BlockMask) -> Layout:
    """Any BlockMask as a layout: its block lists, as they are now, and its mask_mod, whatever its block size."""
    check_block_mask("block_mask", block_mask)
    return FromBlockMask(block_mask, block_mask_mod(block_mask))
