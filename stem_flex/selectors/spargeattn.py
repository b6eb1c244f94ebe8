"""SpargeAttn (arXiv 2502.18137): block means where a block's tokens are alike, everything where they aren't.

Keys are centred by their mean over the prompt. A block is alike where the mean of all entries of its tokens' cosine
matrix, which is the squared length of the mean unit vector, exceeds ``similarity``. A row's shares are the softmax
of mean query times mean key over the alike blocks it may see. It keeps every block that isn't alike, everything if
it isn't alike itself, and of the others the best until their shares would pass 0.98 (or half of all key blocks).
The published code does not force the diagonal; this one does, with blocks of any size.

Cost: O(N D) and a product of block means.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stem_flex.budget import FORCED
from stem_flex.config import StemConfig
from stem_flex.layout import Layout
from stem_flex.plumbing.binding import BoundLayout
from stem_flex.plumbing.classes import EMPTY
from stem_flex.selectors.shared import block_means, block_sums, hide, operand, prepare, product, real_tokens


def scores(
    q: Tensor, k: Tensor, v: Tensor, config: StemConfig | None = None, *,
    layout: Layout | BoundLayout | None = None, q_offset: int | Tensor = 0, similarity: float = 0.6,
) -> Tensor:  # fmt: skip
    """Share of each alike block in its row; what is not alike has none and is lifted by FORCED.

    Args:
        q: (B, Hq, Lq, D); k: (B, Hkv, Lk, D); v: (B, Hkv, Lk, Dv), not looked at.
        config: its block sizes count; None means ``StemConfig()``.
        layout, q_offset: as in :func:`stem_flex.oam_scores`, of any kind.
        similarity: least mean cosine of a block that is alike, exclusive; -1 or less makes all alike.

    Returns:
        float32 (B, Hq, Qb, Kb), -inf where the layout allows nothing.
    """
    config, bound = prepare(q, k, v, config, layout, q_offset)
    group = q.shape[1] // k.shape[1]
    keys = _centred(k, bound)
    alike_q = alike(q, config.query_block, bound.query_start, bound.query_end, similarity)
    alike_k = alike(keys, config.key_block, bound.key_start, bound.key_end, similarity).repeat_interleave(group, 1)
    queries = block_means(q, config.query_block, bound.query_start, bound.query_end)
    key_means = block_means(keys, config.key_block, bound.key_start, bound.key_end)
    logits = product(queries, key_means, q.shape[-1] ** -0.5)
    out = (bound.dense_classes() == EMPTY) | ~alike_k[:, :, None]
    share = logits.masked_fill(out, -math.inf).float().softmax(-1).nan_to_num(nan=0.0)
    return hide(share + FORCED * ~(alike_k[:, :, None] & alike_q[..., None]), bound)


def alike(x: Tensor, block: int, start: Tensor | None, end: Tensor | None, similarity: float) -> Tensor:
    """Which blocks of x (B, H, L, D) have real tokens of a mean cosine above ``similarity``, (B, H, blocks)."""
    length = operand(x).norm(dim=-1, keepdim=True)
    sums, counts = block_sums(x / length.clamp(min=1e-12), block, start, end)
    mean = sums / counts.clamp(min=1)[:, None, :, None].to(sums.dtype)
    return mean.square().sum(-1) > similarity


def _centred(k: Tensor, bound: BoundLayout) -> Tensor:
    """Keys less their mean over the real tokens of each batch row and head."""
    real = real_tokens(k.shape[2], bound.key_start, bound.key_end, k.device)[:, None, :, None]
    keys = operand(k)
    wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
    mean = torch.where(real, keys, 0).sum(2, keepdim=True, dtype=wide) / real.sum(2, keepdim=True).clamp(min=1)
    return keys - mean.to(keys.dtype)
