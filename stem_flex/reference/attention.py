"""Dense counterparts of the mask, its composition, its density and the attention under it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask

from stem_flex.config import StemConfig
from stem_flex.reference.selection import block_keep
from stem_flex.reference.structure import (
    FULL,
    PARTIAL,
    block_classes,
    dense_blocks,
    dense_mask,
    pair,
    token_mask,
)


def block_mask_of(mask: Tensor, keep: Tensor, block_size: int | tuple[int, int]) -> BlockMask:
    """BlockMask with full-width tables from a dense token mask and the kept blocks.

    Args:
        mask: (B, H, Lq, Lk) bool, becomes the mask_mod (indices past Lq or Lk are not allowed).
        keep: (B, H, Qb, Kb) bool; kept blocks where the mask allows nothing are left out.
    """
    classes = block_classes(mask, block_size)
    tables = []
    for wanted in (PARTIAL, FULL):
        kept = keep & (classes == wanted)
        order = torch.argsort((~kept).to(torch.int8), dim=-1, stable=True)
        tables += [kept.sum(-1).to(torch.int32), order.to(torch.int32)]
    Lq, Lk = mask.shape[-2:]

    def dense_mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        inside = (q_idx < Lq) & (kv_idx < Lk)
        return mask[b, h, q_idx.clamp(max=Lq - 1), kv_idx.clamp(max=Lk - 1)] & inside

    return BlockMask.from_kv_blocks(
        *tables,
        BLOCK_SIZE=pair(block_size),
        mask_mod=dense_mask_mod,
        seq_lengths=(Lq, Lk),
        compute_q_blocks=False,
    )


def stem_block_mask(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig | None = None,
    *,
    layout: Any = None,
    q_offset: int | Tensor = 0,
    prompt_len: int | Tensor | None = None,
    kv_len: int | Tensor | None = None,
    budget: int | Tensor | None = None,
    impl: str = "auto",
) -> BlockMask:
    """BlockMask of the kept blocks, full-width tables, its mask_mod a lookup in the dense token mask."""
    config = config or StemConfig()
    options = {"layout": layout, "q_offset": q_offset, "kv_len": kv_len}
    keep = block_keep(q, k, v, config, prompt_len=prompt_len, budget=budget, **options)
    mask = token_mask(layout, q.shape[0], q.shape[1], q.shape[2], k.shape[2], q_offset, kv_len)
    return block_mask_of(mask, keep, config.block_size)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float | None = None,
    score_mod: Callable | None = None,
    dtype: torch.dtype | None = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Dense softmax attention under a token mask.

    Args:
        q: (B, Hq, Lq, D). k: (B, Hkv, Lk, D). v: (B, Hkv, Lk, Dv).
        mask: bool, broadcastable to (B, Hq, Lq, Lk).
        dtype: of the computation, None for the inputs'.

    Returns:
        output (B, Hq, Lq, Dv), 0 where a query may attend to nothing, and the natural log-sum-exp
        (B, Hq, Lq), -inf there; both of ``dtype``.
    """
    groups = q.shape[1] // k.shape[1]
    q, k, v = (x if dtype is None else x.to(dtype) for x in (q, k, v))
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    logits = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if score_mod is not None:
        logits = _modified(score_mod, logits)
    logits = logits.masked_fill(~mask, -math.inf)
    lse = logits.logsumexp(dim=-1)
    weights = torch.where(lse.isneginf()[..., None], 0.0, (logits - lse[..., None]).exp())
    return weights @ v, lse


def mean_corrected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    keep: Tensor,
    block_size: int | tuple[int, int],
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense softmax attention over the kept blocks' tokens and one pooled token for each dropped block.

    A pooled token has the mean key and the mean value of a whole block of B tokens, and ln B on its logit. A query has
    one for each block that its row of blocks did not keep and that it may see entirely.

    Args:
        q: (B, Hq, Lq, D). k: (B, Hkv, Lk, D). v: (B, Hkv, Lk, Dv).
        mask: bool (B, Hq, Lq, Lk), which tokens are allowed. keep: bool (B, Hq, Qb, Kb), which blocks are kept.

    Returns:
        output (B, Hq, Lq, Dv), 0 where a query may attend to nothing, and the natural log-sum-exp (B, Hq, Lq), -inf
        there; float64.
    """
    q_block, k_block = pair(block_size)
    groups, queries, keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    q, k, v = q.double(), k.double().repeat_interleave(groups, 1), v.double().repeat_interleave(groups, 1)
    row = torch.arange(queries, device=q.device) // q_block
    seen = mask & keep[:, :, row].repeat_interleave(k_block, -1)[..., :keys]
    bias = torch.zeros(keys, dtype=torch.float64, device=q.device)
    for block in range(keys // k_block):
        tokens = slice(block * k_block, (block + 1) * k_block)
        dropped = mask[..., tokens].all(-1) & ~keep[:, :, row, block]
        seen = torch.cat([seen, dropped[..., None]], -1)
        k = torch.cat([k, k[:, :, tokens].mean(2, keepdim=True)], 2)
        v = torch.cat([v, v[:, :, tokens].mean(2, keepdim=True)], 2)
        bias = torch.cat([bias, torch.full((1,), math.log(k_block), dtype=torch.float64, device=q.device)])
    return masked_attention(q, k, v, seen, scale=scale, score_mod=lambda score, b, h, i, j: score + bias[j])


def _modified(score_mod: Callable, logits: Tensor) -> Tensor:
    mod = score_mod
    for axis in (4, 3, 2, 1):  # keys first: innermost, as flex_attention traces it
        mod = torch.vmap(mod, in_dims=tuple(0 if arg in (0, axis) else None for arg in range(5)))
    return mod(logits, *(torch.arange(size, device=logits.device) for size in logits.shape))


def stem_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig | None = None,
    *,
    layout: Any = None,
    q_offset: int | Tensor = 0,
    prompt_len: int | Tensor | None = None,
    kv_len: int | Tensor | None = None,
    budget: int | Tensor | None = None,
    scale: float | None = None,
    score_mod: Callable | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Stem attention, dense, in float64 of the given values.

    Returns:
        (B, Hq, Lq, Dv) float64, 0 for queries that may attend to nothing; with ``return_lse`` also their
        natural log-sum-exp (B, Hq, Lq), -inf there.
    """
    block_mask = stem_block_mask(
        q, k, v, config, layout=layout, q_offset=q_offset, prompt_len=prompt_len, kv_len=kv_len, budget=budget
    )
    if config is not None and config.correction == "mean":
        if score_mod is not None:
            raise ValueError("correction='mean' serves no score_mod; leave one out")
        mask = token_mask(layout, q.shape[0], q.shape[1], q.shape[2], k.shape[2], q_offset, kv_len)
        partial, full = dense_blocks(block_mask)
        out, lse = mean_corrected_attention(q, k, v, mask, partial | full, config.block_size, scale=scale)
        return (out, lse) if return_lse else out
    out, lse = masked_attention(q, k, v, dense_mask(block_mask), scale=scale, score_mod=score_mod)
    return (out, lse) if return_lse else out


def compose(block_mask: BlockMask, other: Any) -> BlockMask:
    """Intersection with a BlockMask, a layout or a mask_mod, through the dense token masks of both."""
    left = dense_mask(block_mask)
    Lq, Lk = block_mask.seq_lengths
    B, H = left.shape[:2]
    if isinstance(other, BlockMask):
        right = dense_mask(other)
    elif callable(other):
        mask_mod: Any = other
        right = create_mask(mask_mod, B, H, Lq, Lk, device="cpu")
    else:
        right = token_mask(other, B, H, Lq, Lk)
    mask = left & right
    keep = block_classes(mask, block_mask.BLOCK_SIZE) > 0
    return block_mask_of(mask, keep, block_mask.BLOCK_SIZE)


def block_density(block_mask: BlockMask) -> float:
    """Computed block pairs / block pairs in which the structural mask (the mask_mod) allows anything."""
    partial, full = dense_blocks(block_mask)
    B, H = partial.shape[:2]
    device = block_mask.kv_indices.device
    mask = create_mask(block_mask.mask_mod, B, H, *block_mask.seq_lengths, device=device)
    allowed = int((block_classes(mask.cpu(), block_mask.BLOCK_SIZE) > 0).sum())
    return int((partial | full).sum()) / allowed if allowed else 1.0
