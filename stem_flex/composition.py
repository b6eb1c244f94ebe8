"""Intersect any BlockMask with another mask, keeping partial and full blocks exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from stem_flex.layout import Interval, Layout, from_block_mask, from_mask_mod
from stem_flex.mask import assemble
from stem_flex.plumbing.binding import BoundLayout
from stem_flex.plumbing.checks import check_block_mask, check_mod
from stem_flex.plumbing.classes import EMPTY
from stem_flex.plumbing.geometry import Geometry
from stem_flex.plumbing.tables import block_classes, compact, table_shape


def compose(block_mask: BlockMask, other: BlockMask | Layout | Callable) -> BlockMask:
    """Keep what both masks keep.

    A block stays if both keep it and some token pair is allowed by both; it is full only if every pair is. The
    block lists of ``block_mask`` count as chosen: nothing it left out comes back.

    Args:
        block_mask: any BlockMask, from :func:`stem_flex.stem_block_mask` or not, of shape (B, H, Lq, Lk).
        other: a BlockMask, a layout, or a mask_mod with local query indices. A mask_mod is evaluated on all
            B H Lq Lk tokens, in chunks; wrap one that does not depend on b or h in
            ``layout.from_mask_mod(f, 1, 1, Lq, Lk)``.

    Returns:
        A BlockMask with exact classes and compact tables. Nothing waits for the device. Memory is a few bytes
        for each pair of blocks of each head.

    Raises:
        TypeError, ValueError: naming the argument, what was expected, what came.

    Masks made here know their layout, so that interval layouts intersect by arithmetic on N tokens. A BlockMask
    from elsewhere, or whose mask_mod was replaced, is evaluated token by token, in chunks of bounded memory. Layouts
    are bound at the q_offset and kv_len of the mask that knows its own; at 0 where none does.
    """
    check_block_mask("block_mask", block_mask)
    keep = block_classes(block_mask) != EMPTY
    if isinstance(other, BlockMask):
        _check_other(block_mask, other)
        if tuple(other.BLOCK_SIZE) == tuple(block_mask.BLOCK_SIZE):
            keep = keep & (block_classes(other) != EMPTY)
    elif not isinstance(other, Layout):
        if not callable(other):
            raise TypeError(f"other must be a BlockMask, a layout or a mask_mod, got {type(other).__name__}")
        check_mod("other", other, "mask_mod")
    bound = _bind(block_mask, other, keep)
    classes = bound.dense_classes()
    keep = keep & (classes != EMPTY)
    width, partial_columns = table_shape(bound, _most_kept(block_mask, bound))
    tables = compact(keep, classes, width, partial_columns)
    return assemble(tables, bound, compute_q_blocks=block_mask.q_indices is not None)


def _bind(block_mask: BlockMask, other: BlockMask | Layout | Callable, keep: Tensor) -> BoundLayout:
    """Both structures at the sizes of ``block_mask``, offsets as the mask that knows its own has them."""
    geometry = _geometry(block_mask) or _geometry(other)
    ours = _layout_of(block_mask, geometry)
    if isinstance(other, Layout):
        theirs = other
    elif isinstance(other, BlockMask):
        # lists of other blocks can't be compared, so they count token by token
        same_blocks = tuple(other.BLOCK_SIZE) == tuple(block_mask.BLOCK_SIZE)
        theirs = _layout_of(other, geometry) if same_blocks else from_block_mask(other)
    else:
        q_len, k_len = block_mask.seq_lengths
        theirs = from_mask_mod(other, keep.shape[0], keep.shape[1], q_len, k_len)
    both = ours & theirs
    return both.bind(
        max(keep.shape[0], *(part.sizes()[0] for part in both.parts())),
        max(keep.shape[1], *(part.sizes()[1] for part in both.parts())),
        block_mask.seq_lengths[0],
        block_mask.seq_lengths[1],
        q_offset=0 if geometry is None else geometry.q_offset,
        kv_len=None if geometry is None else geometry.kv_len,
        block_size=(block_mask.BLOCK_SIZE[0], block_mask.BLOCK_SIZE[1]),
        device=keep.device,
    )


def _geometry(mask: object) -> Geometry | None:
    known = getattr(mask, "structure", None)
    return known.geometry if isinstance(known, BoundLayout) else None


def _layout_of(block_mask: BlockMask, geometry: Geometry | None) -> Layout:
    """The structure that the mask was bound to, by its layout, its intervals, or else its tokens."""
    known = getattr(block_mask, "structure", None)
    if not isinstance(known, BoundLayout) or geometry is None or block_mask.mask_mod is not known.mask_mod:
        return from_block_mask(block_mask)
    intervals = known.intervals()
    if intervals is None:
        return from_block_mask(block_mask)
    own, asked = ((x.q_offset, x.kv_len) for x in (known.geometry, geometry))
    fixed = not any(isinstance(x, Tensor) for x in (*own, *asked)) and known.layout.reads() == ()
    # tensors may hold something else by now; the intervals are what they were
    return known.layout if fixed and own == asked else Interval(intervals)


def _most_kept(block_mask: BlockMask, bound: BoundLayout) -> int:
    if not hasattr(block_mask, "structure") or block_mask.full_kv_indices is None:
        return bound.k_blocks
    # of our own masks both lists share a row, the full one behind the partial one's columns
    partial_columns = block_mask.full_kv_indices.storage_offset() - block_mask.kv_indices.storage_offset()
    return min(bound.k_blocks, cast(int, block_mask.kv_indices.stride(2) - partial_columns))


def _check_other(block_mask: BlockMask, other: BlockMask) -> None:
    check_block_mask("other", other)
    if other.seq_lengths != block_mask.seq_lengths:
        raise ValueError(f"other must have block_mask's lengths {block_mask.seq_lengths}, got {other.seq_lengths}")
    if other.kv_num_blocks.device != block_mask.kv_num_blocks.device:
        raise ValueError(
            f"other must be on block_mask's device {block_mask.kv_num_blocks.device}, got {other.kv_num_blocks.device}"
        )
    for name, ours, theirs in zip("BH", block_mask.kv_num_blocks.shape, other.kv_num_blocks.shape, strict=False):
        if ours != theirs and 1 not in (ours, theirs):
            raise ValueError(f"other must have block_mask's {name}={ours} or 1, got {theirs}")
