"""The block sketch (experimental): attention between a few proxies of each block.

A block is represented, on both sides, by means of contiguous groups of its tokens and, optionally, by outliers,
the tokens farthest from the block's mean, which stand for themselves. Between proxies a coarse attention is
taken: logit q_a k_b / sqrt(D) + ln(tokens that k_b stands for), softmax over all key proxies the layout allows by
block. With M[a, J] the mass of query proxy a on key block J, the score of a pair of blocks is

    mean of M[a, J] over the block's tokens (diffuse heads) + max over a of M[a, J] (sharp heads).

Cost: (proxies / block)^2 of dense QK, 1.6 % for 16 + 16 of 128. A mean over a whole block, as the antidiagonal
scores take, averages a single strong token pair away; this doesn't.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange, reduce
from torch import Tensor

from stem_flex.config import StemConfig
from stem_flex.layout import Layout
from stem_flex.plumbing.binding import BoundLayout
from stem_flex.plumbing.checks import check_qkv
from stem_flex.plumbing.classes import EMPTY
from stem_flex.score import bind_to

_PAIRS_AT_ONCE = 2**27  # proxy pairs held at a time, 4 bytes each and some copies


def scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig | None = None,
    *,
    layout: Layout | BoundLayout | None = None,
    q_offset: int | Tensor = 0,
    means: int = 16,
    query_outliers: int = 0,
    key_outliers: int = 0,
) -> Tensor:
    """Score every pair of blocks by its sketch; v is not looked at.

    Args:
        q: (B, Hq, Lq, D); k: (B, Hkv, Lk, D); v: (B, Hkv, Lk, Dv).
        config: its block sizes count; None means ``StemConfig()``.
        layout, q_offset: as in :func:`stem_flex.oam_scores`. Padding tokens are not told apart.
        means: group means per block, on both sides; divides both block sizes.
        query_outliers, key_outliers: further proxies of each block.

    Returns:
        float32 (B, Hq, Qb, Kb), -inf where the layout allows no pair.

    Raises:
        ValueError: ``means`` does not divide the blocks.
    """
    config = config or StemConfig()
    check_qkv(q, k, v)
    if means < 1 or config.query_block % means or config.key_block % means:
        raise ValueError(f"means must divide both block sizes {config.block_size}, got {means}")
    bound = bind_to(q, k, layout, q_offset=q_offset, kv_len=None, prompt_len=None, config=config)
    allowed = bound.dense_classes() != EMPTY
    queries, q_tokens = proxies(q, config.query_block, means, query_outliers)
    keys, k_tokens = proxies(k, config.key_block, means, key_outliers)
    group = q.shape[1] // k.shape[1]
    keys = rearrange(keys, "b h j r d -> b h 1 d (j r)").repeat_interleave(group, 1)
    bias = rearrange(k_tokens.log(), "j r -> (j r)")
    share = q_tokens / q_tokens.sum(-1, keepdim=True)
    per_block, rows = k_tokens.shape[1], allowed.shape[2]
    step = max(1, _PAIRS_AT_ONCE // (q.shape[0] * q.shape[1] * q_tokens.shape[1] * bias.numel()))
    found = []
    for first in range(0, rows, step):
        part = slice(first, first + step)
        visible = allowed[:, :, part]
        logits = queries[:, :, part] @ keys / math.sqrt(q.shape[-1]) + bias
        hidden = ~visible.repeat_interleave(per_block, -1)[:, :, :, None]
        mass = logits.masked_fill_(hidden, -math.inf).softmax(-1)
        mass = reduce(mass, "b h i a (j r) -> b h i a j", "sum", r=per_block)
        score = torch.einsum("b h i a j, i a -> b h i j", mass, share[part]) + mass.amax(3)
        found.append(score.masked_fill(~visible, -math.inf))
    return torch.cat(found, 2)


def outlier_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig | None = None,
    *,
    layout: Layout | BoundLayout | None = None,
    q_offset: int | Tensor = 0,
) -> Tensor:
    """:func:`scores` with 8 means, 16 outlier queries and 4 outlier keys of a block."""
    return scores(q, k, v, config, layout=layout, q_offset=q_offset, means=8, query_outliers=16, key_outliers=4)


def proxies(x: Tensor, block: int, means: int, outliers: int) -> tuple[Tensor, Tensor]:
    """A few vectors for each block of x (B, H, L, D), and the tokens that each stands for.

    Returns:
        float32 (B, H, blocks, outliers + means, D), outliers first, and float32 (blocks, outliers + means), 0 for
        groups past the end of x.
    """
    length = x.shape[2]
    tokens = rearrange(
        torch.nn.functional.pad(x.float(), (0, 0, 0, -length % block)), "b h (j t) d -> b h j t d", t=block
    )
    real = (torch.arange(tokens.shape[2] * block, device=x.device) < length).view(-1, block).float()
    counts = reduce(real, "j (r t) -> j r", "sum", r=means)
    sums = reduce(tokens, "b h j (r t) d -> b h j r d", "sum", r=means)
    found, weights = sums / counts.clamp(min=1)[..., None], counts
    if outliers:
        center = sums.sum(3, keepdim=True) / real.sum(-1).view(-1, 1, 1)
        distance = (tokens - center).norm(dim=-1).masked_fill(real == 0, -1.0)
        index = distance.topk(outliers, dim=-1).indices
        picked = tokens.gather(3, index[..., None].expand(*index.shape, tokens.shape[-1]))
        found = torch.cat([picked, found], 3)
        single = torch.arange(outliers, device=x.device) < real.sum(-1, keepdim=True)
        weights = torch.cat([single.float(), counts], 1)
    return found, weights
