"""What a block-sparse mask computes and what it loses: density, recall, output error, pictures.

The structural mask is what would be dense: of a mask built by :func:`stem_flex.stem_block_mask` its layout
(the mask's attribute ``structure``), of any other BlockMask the pairs that its mask_mod allows. Every measure
goes through the prompt a few hundred queries at a time, so memory stays bounded: 32K tokens take well under
1 GB beyond q, k and v. Computed in float64, which neither autocast nor the switches for float32 products reach.
These functions read results on the host and are not for a hot path.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from stem_flex.diagnostics.inspection import MaskReader
from stem_flex.plumbing.ambient import cast_as_sdpa
from stem_flex.plumbing.checks import check_block_mask, check_qkv

_PAIRS_AT_ONCE = 2**22  # token pairs held at a time: 32 MB a float64 matrix, and a handful of those


def block_density(block_mask: BlockMask) -> float:
    """Computed block pairs as a fraction of those the structural mask allows; 1.0 is dense.

    A block pair is allowed where the structural mask lets at least one of its token pairs through, and
    computed where it stands in the full or the partial list. Stem's masks know what is allowed; for others
    mask_mod is evaluated at every token pair, once per batch row and head that it tells apart.

    Args:
        block_mask: any BlockMask.

    Returns:
        float in [0, 1]; 1.0 where nothing is allowed.

    Raises:
        TypeError: ``block_mask`` is no BlockMask.
    """
    check_block_mask("block_mask", block_mask)
    computed = int(block_mask.kv_num_blocks.sum(dtype=torch.int64))
    if block_mask.full_kv_num_blocks is not None:
        computed += int(block_mask.full_kv_num_blocks.sum(dtype=torch.int64))
    batch, heads, q_blocks = block_mask.kv_num_blocks.shape
    allowed = MaskReader(block_mask, batch, heads).count(q_blocks)
    return computed / allowed if allowed else 1.0


def recall(q: Tensor, k: Tensor, block_mask: BlockMask, *, scale: float | None = None) -> Tensor:
    """Attention mass that falls on the computed blocks, per head: 1.0 where nothing is lost.

    The softmax is taken over all pairs the structural mask allows; the mass on computed blocks is averaged over
    the queries that may attend to anything.

    Args:
        q: (B, Hq, Lq, D).
        k: (B, Hkv, Lk, D).
        block_mask: BlockMask for these lengths, its batch and head sizes B or 1 and Hq or 1.
        scale: factor on the logits, default 1 / sqrt(D).

    Returns:
        float32 (float64) (B, Hq); NaN for a head none of whose queries may attend to anything.

    Raises:
        TypeError, ValueError: naming the argument, what was expected, what came.
    """
    check_block_mask("block_mask", block_mask)
    total = torch.zeros(2, *q.shape[:2], dtype=torch.float64, device=q.device)
    for part in _streamed(q, k, block_mask, scale):
        total[0, part.batch, part.head] += (part.weights * part.computed).sum()
        total[1, part.batch, part.head] += part.weights.sum()  # 1 for a live query, 0 for a masked one
    return (total[0] / total[1]).to(_result_dtype(q))


def output_error(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sparse: BlockMask | Tensor,
    *,
    mask_mod: Any = None,
    scale: float | None = None,
) -> Tensor:
    """Relative L2 error of a sparse output against dense attention, per head: |sparse - dense| / |dense|.

    Args:
        q: (B, Hq, Lq, D).
        k: (B, Hkv, Lk, D).
        v: (B, Hkv, Lk, Dv).
        sparse: a BlockMask, whose exact sparse output is computed here in the same pass (so that the error is
            the selection's alone), or an attention output (B, Hq, Lq, Dv), whose whole error is measured.
        mask_mod: structure of the dense attention; default: the BlockMask's own, or causal for an output.
        scale: factor on the logits, default 1 / sqrt(D).

    Returns:
        float32 (float64) (B, Hq); 0.0 for heads whose two outputs are both zero.

    Raises:
        TypeError, ValueError: naming the argument, what was expected, what came.
    """
    if not isinstance(sparse, (BlockMask, Tensor)):
        raise TypeError(f"sparse must be a BlockMask or an output tensor, got {type(sparse).__name__}")
    q, k, v = cast_as_sdpa(q, k, v, only_mixed=True)
    check_qkv(q, k, v)
    expected = (*q.shape[:3], v.shape[-1])
    if isinstance(sparse, Tensor) and tuple(sparse.shape) != expected:
        raise ValueError(f"sparse must be an output of shape {expected}, got {tuple(sparse.shape)}")
    blocks = sparse if isinstance(sparse, BlockMask) else None
    group = q.shape[1] // k.shape[1]
    squares = torch.zeros(2, *q.shape[:2], dtype=torch.float64, device=q.device)
    for part in _streamed(q, k, blocks, scale, mask_mod):
        values = v[part.batch, part.head // group, part.keys].to(part.weights.dtype)
        dense = part.weights @ values
        if isinstance(sparse, Tensor):
            ours = sparse[part.batch, part.head, part.queries].to(dense.dtype)
        else:
            kept = part.weights * part.computed
            ours = kept @ values / kept.sum(-1, keepdim=True).clamp_min(torch.finfo(kept.dtype).tiny)
        squares[0, part.batch, part.head] += (ours - dense).square().sum()
        squares[1, part.batch, part.head] += dense.square().sum()
    return (squares[0] / squares[1]).sqrt().nan_to_num(nan=0.0).to(_result_dtype(q))


def _result_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class _Part:
    """Some queries of one head: softmax weights, float64 (queries, keys), and which of them are computed."""

    batch: int
    head: int
    queries: slice
    keys: slice
    weights: Tensor
    computed: Tensor


def _streamed(
    q: Tensor, k: Tensor, block_mask: BlockMask | None, scale: float | None, mask_mod: Any = None
) -> Iterator[_Part]:
    _check_inputs(q, k, block_mask)
    batch, heads, q_len, dim = q.shape
    k_len = k.shape[2]
    factor = 1 / math.sqrt(dim) if scale is None else scale
    structure = MaskReader(block_mask, batch, heads, mask_mod=mask_mod, lengths=(q_len, k_len), device=q.device)
    step = max(1, _PAIRS_AT_ONCE // k_len)
    for first in range(0, q_len, step):
        queries = slice(first, min(first + step, q_len))
        for b in range(batch):
            for h in range(heads):
                allowed = structure.tokens(b, h, queries)
                keys = slice(0, allowed.shape[1])
                logits = q[b, h, queries].double() @ k[b, h * k.shape[1] // heads, keys].double().T
                logits = (logits * factor).masked_fill_(~allowed, -torch.inf)
                weights = logits.softmax(-1).masked_fill_(~allowed, 0.0)  # a masked query's NaNs become 0
                yield _Part(b, h, queries, keys, weights, structure.computed(b, h, queries, keys))


def _check_inputs(q: Tensor, k: Tensor, block_mask: BlockMask | None) -> None:
    for name, x in (("q", q), ("k", k)):
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions (B, H, L, D), got shape {tuple(x.shape)}")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k must have q's batch and head size and a divisor of its heads, got q {tuple(q.shape)}, "
            f"k {tuple(k.shape)}"
        )
    if block_mask is None:
        return
    check_block_mask("block_mask", block_mask)
    lengths, sizes = (q.shape[2], k.shape[2]), tuple(block_mask.kv_num_blocks.shape[:2])
    if tuple(block_mask.seq_lengths) != lengths:
        raise ValueError(f"block_mask must be for lengths {lengths}, got {tuple(block_mask.seq_lengths)}")
    if sizes[0] not in (1, q.shape[0]) or sizes[1] not in (1, q.shape[1]):
        raise ValueError(f"block_mask must have 1 or {tuple(q.shape[:2])} batch rows and heads, got {sizes}")
