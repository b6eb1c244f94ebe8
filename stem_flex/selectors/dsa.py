"""DeepSeek sparse attention (DSA) with Stem: a lightning indexer's tokens, a budget that decays, value magnitude.

DSA, as DeepSeek-V3.2 published it, scores every key token for every query token with a small indexer of its own,

    I(t, s) = sum over j of w(t, j) relu(q(t, j) . k(s)),

and lets all attention heads read the 2048 best tokens. The indexer is trained so that softmax(I) is the heads' mean
attention: I is a logarithm of attention up to a constant, so Stem's value magnitude is added to it, and the 2048
decay along the prompt (:mod:`.refine`).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from stem_flex.budget import Mass
from stem_flex.config import StemConfig
from stem_flex.layout import Layout
from stem_flex.plumbing.checks import check_config, check_positive, check_qkv, check_scale
from stem_flex.selectors.refine import bind_rows, key_magnitude, refine

KEEP = 2048  # DeepSeek-V3.2's index_topk
WORKSPACE = 2**28  # bytes that a strip of rows may take
_BYTES_OF_PAIR = 40  # scores, their order, places and masks


class Tokens(NamedTuple):
    """Keys of every query.

    Attributes:
        indices: int32 (B, Lq, W), ascending, then -1.
        counts: int32 (B, Lq).
    """

    indices: Tensor
    counts: Tensor


def lightning_scores(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
    """The indexer's scores of all pairs of a query and a key, one head after the other.

    Args:
        q: (B, Hi, R, Di), after position encoding, any scale.
        k: (B, Lk, Di), one key head for all.
        weights: (B, R, Hi), with whatever scale belongs to q k.

    Returns:
        float32 (float64 for float64) (B, R, Lk); 2 Hi R Lk Di FLOPs, two matrices of its size.
    """
    _check_indexer(q, k, weights)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys = k.detach().to(wide).mT
    q, weights = q.detach(), weights.detach().to(wide)
    scores = torch.zeros(q.shape[0], q.shape[2], k.shape[1], dtype=wide, device=q.device)
    for head in range(q.shape[1]):
        scores.addcmul_((q[:, head].to(wide) @ keys).relu_(), weights[:, :, head, None])
    return scores


def dsa_tokens(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    v: Tensor,
    config: StemConfig | None = None,
    *,
    keep: int = KEEP,
    layout: Layout | None = None,
    q_offset: int | Tensor = 0,
    prompt_len: int | Tensor | None = None,
    kv_len: int | Tensor | None = None,
    budget: Mass | None = None,
    workspace: int = WORKSPACE,
) -> Tokens:
    """Choose the key tokens of every query: DSA's top-k, with Stem's budget and value magnitude.

    Args:
        q, k, weights: the indexer's, see :func:`lightning_scores`, with R = Lq.
        v: (B, Hkv, Lk, Dv) of the attention; looked at only with a ``value_weight``.
        config: see :func:`stem_flex.selectors.refine.refine`; None means ``StemConfig.paper()``, whose decay saves
            15 to 16 % of the tokens of a prompt of 4K to 512K (``StemConfig(mu=1.0, value_weight=0.0)`` is plain DSA).
        keep: DSA's constant budget.
        layout, q_offset, prompt_len, kv_len: as in :func:`~stem_flex.selectors.refine.refine`.
        budget: see :func:`~stem_flex.selectors.refine.refine`; the mass of a key is its share of the softmax of the
            indexer's scores. Give it a floor: an indexer may be sure of too little.
        workspace: bytes for a strip of rows, of which one row at least is taken. Nothing of Lq x Lk is held.

    Returns:
        The choice, W = min(keep, Lk) wide. Nothing waits for the device.

    Raises:
        TypeError, ValueError: naming the argument, what was expected, what came, and the fix.
    """
    config = StemConfig.paper() if config is None else check_config(config)
    _check_indexer(q, k, weights)
    check_positive("keep", keep)
    check_positive("workspace", workspace)
    if v.dim() != 4 or v.shape[0] != k.shape[0] or v.shape[2] != k.shape[1]:
        raise ValueError(f"v must be (B, Hkv, Lk, Dv) of k's {tuple(k.shape[:2])} (B, Lk), got {tuple(v.shape)}")
    batch, _, queries, _ = q.shape
    keys = k.shape[1]
    bind = functools.partial(bind_rows, q[:, :1], v, layout, size=(1, 1), prompt_len=prompt_len, kv_len=kv_len)
    magnitude = None
    if config.value_weight:
        magnitude = key_magnitude(v, config, bind(rows=1, q_offset=q_offset), heads=1)
    width = min(keep, keys)
    indices = torch.empty(batch, queries, width, dtype=torch.int32, device=q.device)
    rows = max(1, workspace // (_BYTES_OF_PAIR * batch * keys))
    for first in range(0, queries, rows):
        strip = slice(first, min(first + rows, queries))
        scores = lightning_scores(q[:, :, strip], k, weights[:, strip])[:, None]
        bound = bind(rows=scores.shape[2], q_offset=q_offset + first)
        refined = refine(scores, v, config, keep=keep, layout=bound, magnitude=magnitude, budget=budget)
        indices[:, strip] = listed(refined.keep(width)[:, 0], width)
    return Tokens(indices, (indices >= 0).sum(-1, dtype=torch.int32))


def listed(keep: Tensor, width: int) -> Tensor:
    """Indices of the true entries of each row, int32 (..., width), ascending, then -1; there are at most ``width``."""
    index = torch.arange(keep.shape[-1], dtype=torch.int32, device=keep.device).expand(keep.shape)
    rows = torch.full((*keep.shape[:-1], width + 1), -1, dtype=torch.int32, device=keep.device)
    place = torch.where(keep, keep.cumsum(-1, dtype=torch.int32) - 1, width).long()
    rows.scatter_(-1, place, torch.where(keep, index, -1))  # the last column takes what is not kept
    return rows[..., :width].contiguous()


def token_attention(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, *, scale: float | None = None, workspace: int = WORKSPACE
) -> Tensor:
    """Exact attention of every query to its own list of keys, by gathering them, some queries at a time.

    For correctness, not for speed: PyTorch reads the W keys and values of each query and key/value head from memory,
    2 Hq Lq W (D + Dv) FLOPs and Hkv Lq W (D + Dv) elements read, and written once more as they are gathered.

    Args:
        q: (B, Hq, Lq, D); k: (B, Hkv, Lk, D); v: (B, Hkv, Lk, Dv), Hq a multiple of Hkv.
        indices: int (B, Lq, W), the same for all heads; -1 stands for no key. No key may come twice.
        scale: of the logits; None means 1 / sqrt(D).
        workspace: bytes for what is gathered at a time.

    Returns:
        (B, Hq, Lq, Dv) in q's dtype, softmax in float32 (float64 for float64); 0 for a query without keys.
    """
    check_qkv(q, k, v)
    check_scale(scale)
    batch, heads, queries, dim = q.shape
    if indices.dim() != 3 or indices.shape[:2] != (batch, queries) or indices.is_floating_point():
        raise ValueError(f"indices must be int ({batch}, {queries}, W), got {indices.dtype} {tuple(indices.shape)}")
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    factor = float(dim**-0.5) if scale is None else scale
    kv_heads, width = k.shape[1], indices.shape[2]
    out = torch.empty(batch, heads, queries, v.shape[3], dtype=q.dtype, device=q.device)
    group = heads // kv_heads
    rows = max(1, workspace // (8 * batch * width * (dim + v.shape[3])))
    for first in range(0, queries, rows):
        strip = slice(first, min(first + rows, queries))
        absent = indices[:, strip] < 0
        index = indices[:, strip].clamp(min=0).flatten(1).long()[..., None]
        for head in range(kv_heads):
            mine = slice(head * group, (head + 1) * group)
            keys, values = (x[:, head].gather(1, index.expand(-1, -1, x.shape[3])).to(wide) for x in (k, v))
            keys, values = (x.unflatten(1, (-1, width)) for x in (keys, values))
            logits = torch.einsum("b g r d, b r w d -> b g r w", q[:, mine, strip].to(wide), keys) * factor
            weights = logits.masked_fill_(absent[:, None], -math.inf).softmax(-1)
            weights = weights.masked_fill(absent[:, None], 0.0)  # of no key at all, softmax gives NaN
            out[:, mine, strip] = torch.einsum("b g r w, b r w d -> b g r d", weights, values).to(q.dtype)
    return out


def _check_indexer(q: Tensor, k: Tensor, weights: Tensor) -> None:
    for name, x, dims in (("q", q, 4), ("k", k, 3), ("weights", weights, 3)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dim() != dims or not x.is_floating_point() or 0 in x.shape:
            raise ValueError(f"{name} must be floats of {dims} dimensions, got {x.dtype} {tuple(x.shape)}")
    batch, heads, queries, dim = q.shape
    if k.shape[0] != batch or k.shape[2] != dim:
        raise ValueError(f"k must be (B, Lk, Di) with q's B={batch} and Di={dim}, got {tuple(k.shape)}")
    if tuple(weights.shape) != (batch, queries, heads):
        raise ValueError(f"weights must be (B, Lq, Hi) = {(batch, queries, heads)}, got {tuple(weights.shape)}")
