"""Exact classes of block pairs of any mask_mod, in bounded memory."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

EMPTY, PARTIAL, FULL = 0, 1, 2

_TOKENS_AT_ONCE = 2**25  # token pairs evaluated at a time: a few hundred MB with mask_mod's temporaries


def classify(
    mask_mod,
    batch: int,
    heads: int,
    q_len: int,
    k_len: int,
    block_size: tuple[int, int],
    device: torch.device | str,
) -> Tensor:
    """Class of every block pair of ``mask_mod``: EMPTY, PARTIAL or FULL.

    As ``torch.nn.attention.flex_attention.create_block_mask`` has it, tokens past a length count as masked, so
    that ragged edge blocks are partial. Evaluates batch * heads * q_len * k_len tokens, never all at once.

    Returns:
        int8 (batch, heads, Qb, Kb).
    """
    q_block, _ = block_size
    at_once = max(1, _TOKENS_AT_ONCE // (batch * q_block * k_len))
    if heads > at_once:
        some = [slice(h, min(h + at_once, heads)) for h in range(0, heads, at_once)]
        tables = [_classify(mask_mod, batch, part, q_len, k_len, block_size, device) for part in some]
        return torch.cat(tables, 1)
    return _classify(mask_mod, batch, slice(0, heads), q_len, k_len, block_size, device)


def _classify(
    mask_mod, batch: int, some_heads: slice, q_len: int, k_len: int, block_size: tuple[int, int], device
) -> Tensor:
    q_block, k_block = block_size
    q_blocks, k_blocks = -(-q_len // q_block), -(-k_len // k_block)
    b, h = torch.arange(batch, device=device), torch.arange(some_heads.start, some_heads.stop, device=device)
    heads = h.numel()
    kv = torch.arange(k_len, device=device)
    rows = max(1, _TOKENS_AT_ONCE // (batch * heads * q_block * k_len))
    classes = torch.empty(batch, heads, q_blocks, k_blocks, dtype=torch.int8, device=device)
    for first in range(0, q_blocks, rows):
        last = min(first + rows, q_blocks)
        q = torch.arange(first * q_block, min(last * q_block, q_len), device=device)
        kept = over_tokens(mask_mod, b, h, q, kv)
        pad = ((last - first) * q_block - q.numel(), k_blocks * k_block - k_len)
        kept = torch.nn.functional.pad(kept, (0, pad[1], 0, pad[0]))
        tiles = rearrange(kept, "b h (i q) (j k) -> b h i j (q k)", q=q_block, k=k_block)
        classes[:, :, first:last] = tiles.any(-1).to(torch.int8) + tiles.all(-1)
    return classes


def over_tokens(mask_mod, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    """``mask_mod`` at every combination of the given indices, bool (b, h, q, kv)."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex  # seconds to import

    mapped = torch.vmap(mask_mod, in_dims=(None, None, None, 0))
    mapped = torch.vmap(mapped, in_dims=(None, None, 0, None))
    mapped = torch.vmap(mapped, in_dims=(None, 0, None, None))
    mapped = torch.vmap(mapped, in_dims=(0, None, None, None))
    with TransformGetItemToIndex():  # lets a mask_mod index captured tensors, as create_block_mask does
        kept = mapped(b, h, q, kv)
    return kept.expand(b.numel(), h.numel(), q.numel(), kv.numel()).to(torch.bool)
