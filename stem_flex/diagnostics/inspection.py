"""Reading a BlockMask: what its structure allows, what its lists compute, a few rows at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from stem_flex.plumbing.binding import BoundLayout
from stem_flex.plumbing.classes import EMPTY, FULL, PARTIAL, over_tokens
from stem_flex.plumbing.mods import causal_mask


class MaskReader:
    """mask_mod and block lists of a mask, read a few rows at a time.

    What mask_mod does not tell apart (batch rows, heads) is evaluated once.
    """

    def __init__(
        self,
        block_mask: BlockMask | None,
        batch: int,
        heads: int,
        *,
        mask_mod: Any = None,
        lengths: tuple[int, int] | None = None,
        device: torch.device | None = None,
    ):
        self.block_mask = block_mask
        self.batch, self.heads = batch, heads
        self.bound: BoundLayout | None = getattr(block_mask, "structure", None)
        if mask_mod is None:
            known = self.bound or block_mask
            mask_mod = causal_mask if known is None else known.mask_mod
        self.mask_mod = mask_mod
        if block_mask is not None:
            lengths, device = block_mask.seq_lengths, block_mask.kv_num_blocks.device
        assert lengths is not None
        self.q_len, self.k_len = lengths
        self.device = device
        self.by_batch = batch > 1 and _depends(self.mask_mod, 0, device)
        self.by_head = heads > 1 and _depends(self.mask_mod, 1, device)
        self._last: tuple[Any, Tensor] | None = None

    def tokens(self, b: int, h: int, queries: slice) -> Tensor:
        """Allowed token pairs, bool (queries, keys up to the last one that any of the queries may see)."""
        key = (b if self.by_batch else 0, h if self.by_head else 0, queries.start)
        if self._last is None or self._last[0] != key:
            batch, head = (torch.tensor([x], dtype=torch.int64, device=self.device) for x in key[:2])
            rows = torch.arange(queries.start, queries.stop, device=self.device)
            columns = torch.arange(self.k_len, device=self.device)
            mask = over_tokens(self.mask_mod, batch, head, rows, columns)[0, 0]
            seen = mask.any(0).nonzero()
            self._last = (key, mask[:, : int(seen[-1]) + 1 if len(seen) else 1])
        return self._last[1]

    def blocks(self, b: int, h: int, first: int, last: int) -> Tensor:
        """Allowed block pairs of the block rows [first, last), bool (rows, Kb)."""
        assert self.block_mask is not None
        if self.bound is not None:
            classes = self.bound.dense_classes(first, last)
            return classes[min(b, classes.shape[0] - 1), min(h, classes.shape[1] - 1)] != EMPTY
        q_block, k_block = self.block_mask.BLOCK_SIZE
        k_blocks = -(-self.k_len // k_block)
        found = torch.zeros(last - first, k_blocks, dtype=torch.bool, device=self.device)
        for row in range(first, last):
            mask = self.tokens(b, h, slice(row * q_block, min((row + 1) * q_block, self.q_len)))
            columns = mask.any(0)
            padded = torch.nn.functional.pad(columns, (0, k_blocks * k_block - len(columns)))
            found[row - first] = padded.view(k_blocks, k_block).any(-1)
        return found

    def count(self, q_blocks: int) -> int:
        """Allowed block pairs over all batch rows and heads."""
        if self.bound is not None:
            if self.bound.classes is None:
                kept = (self.bound.hi - self.bound.lo).sum(-1)[:, None]
            else:
                kept = (self.bound.classes != EMPTY).sum((-1, -2))
            return int(kept.expand(self.batch, self.heads).sum())
        once = 0
        for b in range(self.batch if self.by_batch else 1):
            for h in range(self.heads if self.by_head else 1):
                once += sum(int(self.blocks(b, h, row, row + 1).sum()) for row in range(q_blocks))
        return once * (1 if self.by_batch else self.batch) * (1 if self.by_head else self.heads)

    def computed(self, b: int, h: int, queries: slice, keys: slice) -> Tensor:
        """Token pairs that stand in a computed block, bool (queries, keys)."""
        if self.block_mask is None:
            return torch.ones((), dtype=torch.bool, device=self.device)
        q_block, k_block = self.block_mask.BLOCK_SIZE
        first = queries.start // q_block
        rows = torch.arange(queries.start, queries.stop, device=self.device) // q_block - first
        columns = torch.arange(keys.start, keys.stop, device=self.device) // k_block
        listed = listed_blocks(self.block_mask, b, h, first, first + int(rows[-1]) + 1)
        return (listed > 0)[rows][:, columns]


def listed_blocks(block_mask: BlockMask, b: int, h: int, first: int, last: int) -> Tensor:
    """What the block lists say of block rows [first, last): int8 (rows, Kb), 0 no, FULL or PARTIAL."""
    k_blocks = -(-block_mask.seq_lengths[1] // block_mask.BLOCK_SIZE[1])
    device = block_mask.kv_num_blocks.device
    out = torch.zeros(last - first, k_blocks + 1, dtype=torch.int8, device=device)
    for counts, indices, kind in (
        (block_mask.kv_num_blocks, block_mask.kv_indices, PARTIAL),
        (block_mask.full_kv_num_blocks, block_mask.full_kv_indices, FULL),
    ):
        if counts is None or indices is None:
            continue
        place = (min(b, counts.shape[0] - 1), min(h, counts.shape[1] - 1), slice(first, last))
        live = torch.arange(indices.shape[-1], device=device) < counts[place][:, None]
        out.scatter_(1, torch.where(live, indices[place], k_blocks).long(), kind)
        out[:, k_blocks] = 0
    return out[:, :k_blocks]


def _depends(mask_mod: Any, argument: int, device: torch.device | None) -> bool:
    """Whether the result of mask_mod varies with its batch (0) or head (1) index: asks vmap."""
    seen: list[bool] = []

    def probe(index: Tensor) -> Tensor:
        arguments = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(4)]
        arguments[argument] = index
        out = mask_mod(*arguments)
        seen.append(torch._C._functorch.is_batchedtensor(out))
        return out

    torch.vmap(probe)(torch.zeros(1, dtype=torch.int64, device=device))
    return seen[0]
