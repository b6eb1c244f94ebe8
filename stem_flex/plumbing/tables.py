"""Compact index tables and the BlockMask that flex_attention reads them from.

One int32 buffer holds both tables. Row (b, h, i) of query blocks owns ``width`` entries of it: its partial
blocks from column 0, its full blocks from column ``partial_columns``, both ascending. The BlockMask sees two
views of equal strides, as flex_attention's kernels take for granted, and of logical width Kb, as
``BlockMask.to_dense`` and the CPU kernel do; rows of a view overlap beyond their counts, where nothing reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from stem_flex.plumbing.binding import BoundLayout
from stem_flex.plumbing.classes import EMPTY, FULL, PARTIAL
from stem_flex.plumbing.compiled import apart
from stem_flex.plumbing.mods import MaskModFn, below, of_blocks
from stem_flex.plumbing.recipes import Picklable, with_recipe

_PAIRS_AT_ONCE = 2**25  # pairs of blocks compacted at a time, some 30 bytes each


@dataclass(frozen=True, eq=False)
class BlockTables:
    """Kept blocks of every row.

    Attributes:
        buffer: int32 (B * H * Qb * width + Kb + partial_columns,).
        counts: int32 (2, B, H, Qb), partial and full blocks of each row.
        width: entries of a row.
        partial_columns: first entry of a row's full blocks.
        k_blocks: Kb.
    """

    buffer: Tensor
    counts: Tensor
    width: int
    partial_columns: int
    k_blocks: int

    def view(self, offset: int) -> Tensor:
        """The table that starts at column ``offset``, int32 (B, H, Qb, Kb)."""
        _, batch, heads, q_blocks = self.counts.shape
        strides = (heads * q_blocks * self.width, q_blocks * self.width, self.width, 1)
        return self.buffer.as_strided((batch, heads, q_blocks, self.k_blocks), strides, offset)

    def block_mask(
        self,
        mask_mod: MaskModFn,
        seq_lengths: tuple[int, int],
        block_size: tuple[int, int],
        compute_q_blocks: bool = False,
    ) -> StemBlockMask:
        """The BlockMask of these tables; ``compute_q_blocks`` adds what the backward pass needs."""
        partial, full = self.view(0), self.view(self.partial_columns)
        partial_counts, full_counts = self.counts[0], self.counts[1]
        partial, full, partial_counts, full_counts = apart(partial, full, partial_counts, full_counts)
        return StemBlockMask.from_kv_blocks(
            partial_counts,
            partial,
            full_counts,
            full,
            BLOCK_SIZE=block_size,
            mask_mod=mask_mod,
            seq_lengths=seq_lengths,
            compute_q_blocks=compute_q_blocks,
        )


class StemBlockMask(Picklable, BlockMask):
    """A BlockMask whose entries behind a row's counts are arbitrary, and which pickles and copies.

    Attributes:
        structure: the bound layout, of masks that are whole.
    """

    def _adjust(self, new_q_len: int, new_kv_len: int) -> StemBlockMask:
        """The mask of the first queries and keys, as flex_attention's error about lengths proposes.

        A block of which the new lengths cut a part off is partial, even if the mask_mod allows nothing in what is left.

        Raises:
            ValueError: the new lengths are longer.
        """
        if new_q_len > self.seq_lengths[0] or new_kv_len > self.seq_lengths[1]:
            raise ValueError(
                f"_adjust must be given lengths of at most {self.seq_lengths}, got {(new_q_len, new_kv_len)}; "
                "build the mask for these lengths"
            )
        q_block, k_block = self.BLOCK_SIZE
        rows, columns = -(-new_q_len // q_block), -(-new_kv_len // k_block)
        classes = block_classes(self)[..., :rows, :columns].clone()
        classes[..., new_q_len // q_block :, :].clamp_(max=PARTIAL)
        classes[..., new_kv_len // k_block :].clamp_(max=PARTIAL)
        width = -(-columns // 4) * 4
        tables = compact(classes != EMPTY, classes, 2 * width, width)
        return tables.block_mask(
            self.mask_mod, (new_q_len, new_kv_len), (q_block, k_block), compute_q_blocks=self.q_indices is not None
        )


def table_shape(bound: BoundLayout, most_kept: int) -> tuple[int, int]:
    """(width, partial_columns) of rows that keep at most ``most_kept`` blocks, a multiple of 4 each."""
    most_kept = -(-most_kept // 4) * 4
    partial = most_kept if bound.partial_columns is None else bound.partial_columns
    return partial + most_kept, partial


def compact(keep: Tensor, classes: Tensor, width: int, partial_columns: int) -> BlockTables:
    """Tables of the kept blocks, in PyTorch.

    Args:
        keep: bool (B, H, Qb, Kb).
        classes: int8, broadcastable to ``keep``; kept blocks are PARTIAL or FULL.
        width, partial_columns: see :func:`table_shape`.
    """
    batch, heads, q_blocks, k_blocks = keep.shape
    classes = classes.expand(keep.shape)
    tail = k_blocks + partial_columns
    rows = batch * heads * q_blocks
    buffer = torch.zeros(rows * width + tail, dtype=torch.int32, device=keep.device)
    counts = torch.empty(2, batch, heads, q_blocks, dtype=torch.int32, device=keep.device)
    table = buffer[: rows * width].view(batch, heads, q_blocks, width)
    for chunk in _chunks(q_blocks, batch * heads * k_blocks):
        kept, kinds = keep[:, :, chunk], classes[:, :, chunk]
        chosen = torch.stack([kept & (kinds == PARTIAL), kept & (kinds == FULL)])
        counts[:, :, :, chunk] = chosen.sum(-1)
        table[:, :, chunk] = _rows(chosen, width, partial_columns)
    return BlockTables(buffer, counts, width, partial_columns, k_blocks)


def _chunks(rows: int, pairs_of_row: int) -> Sequence[slice]:
    if torch.compiler.is_compiling():
        return (slice(None),)  # a loop over a number of chunks would tie the graph to this length
    at_once = max(1, _PAIRS_AT_ONCE // pairs_of_row)
    return [slice(first, first + at_once) for first in range(0, rows, at_once)]


def _rows(chosen: Tensor, width: int, partial_columns: int) -> Tensor:
    _, *shape, k_blocks = chosen.shape
    key = torch.arange(k_blocks, dtype=torch.int32, device=chosen.device).expand(chosen.shape[1:])
    rows = torch.zeros(*shape, width + 1, dtype=torch.int32, device=chosen.device)
    for blocks, column in zip(chosen, (0, partial_columns), strict=True):
        place = blocks.cumsum(-1) - 1 + column
        rows.scatter_(-1, torch.where(blocks, place, width), key)  # the last column takes what is dropped
    return rows[..., :width]


def block_classes(block_mask: BlockMask) -> Tensor:
    """Classes that the block lists of any BlockMask state, int8 (B, H, Qb, Kb); 0 is not computed."""
    k_blocks = -(-block_mask.seq_lengths[1] // block_mask.BLOCK_SIZE[1])
    classes = _listed(block_mask.kv_num_blocks, block_mask.kv_indices, k_blocks).to(torch.int8) * PARTIAL
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        full = _listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, k_blocks)
        classes = torch.where(full, FULL, classes)
    return classes


def _listed(counts: Tensor, indices: Tensor, k_blocks: int) -> Tensor:
    column = torch.arange(indices.shape[-1], device=indices.device)
    index = torch.where(column < counts[..., None], indices, k_blocks).long()
    found = torch.zeros(*indices.shape[:-1], k_blocks + 1, dtype=torch.bool, device=indices.device)
    return found.scatter_(-1, index, True)[..., :k_blocks]


def kept_bits(block_mask: BlockMask) -> Tensor:
    """Which blocks the lists state, bit j % 32 of word j // 32, int32 (B, H, Qb, ceil(Kb / 32))."""
    words = -(-block_mask.seq_lengths[1] // block_mask.BLOCK_SIZE[1] // 32)
    shape = block_mask.kv_num_blocks.shape
    bits = torch.zeros(*shape, words + 1, dtype=torch.int32, device=block_mask.kv_num_blocks.device)
    one = torch.ones((), dtype=torch.int32, device=bits.device)
    for counts, indices, columns in _narrow(block_mask):
        column = torch.arange(columns, dtype=torch.int32, device=bits.device)
        for chunk in _chunks(shape[2], shape[0] * shape[1] * columns):
            index = indices[:, :, chunk, :columns]
            place = torch.where(column < counts[:, :, chunk, None], index >> 5, words)
            # a block is listed once, so that adding is setting
            bits[:, :, chunk].scatter_add_(-1, place.long(), one << (index & 31))
    return bits[..., :words]


def _narrow(block_mask: BlockMask) -> list[tuple[Tensor, Tensor, int]]:
    """Counts, indices, and columns that hold all of them, of both lists."""
    partial, full = block_mask.kv_indices, block_mask.full_kv_indices
    if full is None or block_mask.full_kv_num_blocks is None:
        return [(block_mask.kv_num_blocks, partial, partial.shape[-1])]
    columns = (partial.shape[-1], full.shape[-1])
    if isinstance(block_mask, StemBlockMask):
        # rows of our own tables hold one list behind the other, or where there is no full block partial ones alone,
        # and overlap behind both
        first, width = full.storage_offset() - partial.storage_offset(), int(partial.stride(2))
        if 0 < first < width:
            columns = (min(width, columns[0]), min(width - int(first), columns[1]))
    return [(block_mask.kv_num_blocks, partial, columns[0]), (block_mask.full_kv_num_blocks, full, columns[1])]


def block_mask_mod(block_mask: BlockMask) -> MaskModFn:
    """The tokens that a BlockMask computes, by its block lists and its mask_mod, as a mask_mod."""
    classes = block_classes(block_mask)
    class_of = of_blocks(classes, block_mask.seq_lengths, block_mask.BLOCK_SIZE)
    real_q, real_k = (below(length, classes.device) for length in block_mask.seq_lengths)
    return _listed_mod(class_of, real_q, real_k, block_mask.mask_mod)


@with_recipe
def _listed_mod(class_of: MaskModFn, real_q: Callable, real_k: Callable, inner: MaskModFn) -> MaskModFn:
    def kept_mask(b, h, q, kv):
        kept = class_of(b, h, q, kv)
        return (kept == FULL) | ((kept == PARTIAL) & inner(b, h, real_q(q), real_k(kv)))

    return kept_mask
