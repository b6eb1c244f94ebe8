"""Output-Aware Metric (OAM): what each key block is worth to each query block."""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor

from stem_flex.config import StemConfig
from stem_flex.layout import Layout, causal
from stem_flex.plumbing.ambient import cast_as_sdpa, without_autocast
from stem_flex.plumbing.binding import BoundLayout
from stem_flex.plumbing.checks import check_config, check_qkv
from stem_flex.plumbing.classes import EMPTY
from stem_flex.plumbing.implementation import resolve

_EPS = 1e-6  # the operator's, inside the logarithm and beside the standard deviation


def oam_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig | None = None,
    *,
    layout: Layout | BoundLayout | None = None,
    q_offset: int | Tensor = 0,
    kv_len: int | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Score of every pair of blocks: routing plus ``value_weight`` times the magnitude of the key block.

    Routing is the mean of the scaled logits q k / sqrt(D) over the pair's strided antidiagonal cells,
    divided by the stride as the published operator does. The mean of a cell over a block is linear, so it is
    computed as one matrix product of phase means, of inner size ``stride * D``; the (N / stride)^2 matrix of
    the published code is never built. Future cells of the diagonal block count, and so do zeros for padding.

    Magnitude of key block J (``config.metric``): ``"zscore"``: the mean over its groups of ``stride`` keys of
    relu(z), z the normalised ln of the group's largest value norm, over the complete groups of that batch row
    and head; ``"log"``: max(0, ln of the block's largest value norm), the paper's Eq. 7.
    A NaN norm counts as 0.

    Args:
        q: (B, Hq, Lq, D), float16, bfloat16, float32 or float64 (PyTorch only), any strides with a unit last one.
        k: (B, Hkv, Lk, D), the same dtype and device; Hq is a multiple of Hkv.
        v: (B, Hkv, Lk, Dv).
        config: None means ``StemConfig()``.
        layout: structure of the mask, None is causal; a bound one brings its offset and lengths with it.
        q_offset: keys before the first query, int or int (B,).
        kv_len: valid keys, int or int (B,); None: all.
        impl: "triton", "torch", or "auto": Triton for CUDA tensors. Nothing falls back silently.

    Returns:
        float32 (float64 for float64 inputs) (B, Hq, Qb, Kb), -inf where the layout allows no pair; under autocast too.

    Raises:
        TypeError, ValueError: naming the argument, what was expected, what came, and the fix.
    """
    config = check_config(config)
    q, k, v = cast_as_sdpa(q, k, v, only_mixed=True)
    check_qkv(q, k, v)
    q, k, v = q.detach(), k.detach(), v.detach()
    bound = bind_to(q, k, layout, q_offset=q_offset, kv_len=kv_len, prompt_len=None, config=config)
    if resolve(impl, q) == "triton":
        from stem_flex.kernels.ops import stem_scores

        return stem_scores(q, k, v, bound.rows, *bound.restrictions, **score_options(config))
    scores = torch_scores(q, k, v, bound, config)
    return scores.masked_fill(bound.dense_classes() == EMPTY, -math.inf)


def bind_to(
    q: Tensor,
    k: Tensor,
    layout: Layout | BoundLayout | None,
    *,
    q_offset: int | Tensor,
    kv_len: int | Tensor | None,
    prompt_len: int | Tensor | None,
    config: StemConfig,
) -> BoundLayout:
    """Bind ``layout`` (None: causal) to the sizes of q and k; what is bound already is returned as it is.

    Raises:
        TypeError: ``layout`` is no layout.
        ValueError: it was bound to other sizes or blocks.
    """
    if isinstance(layout, BoundLayout):
        expected = ((q.shape[2], k.shape[2]), (config.query_block, config.key_block))
        if (layout.seq_lengths, layout.block_size) != expected:
            raise ValueError(
                f"layout must be bound to q's and k's lengths and the config's blocks {expected}, got "
                f"{(layout.seq_lengths, layout.block_size)}; bind it anew"
            )
        return layout
    if layout is None:
        layout = causal()
    if not isinstance(layout, Layout):
        raise TypeError(
            f"layout must come from stem_flex.layout, got {type(layout).__name__}; "
            "wrap a mask_mod with from_mask_mod and a BlockMask with from_block_mask"
        )
    return layout.bind(
        q.shape[0],
        q.shape[1],
        q.shape[2],
        k.shape[2],
        q_offset=q_offset,
        kv_len=kv_len,
        prompt_len=prompt_len,
        block_size=(config.query_block, config.key_block),
        device=q.device,
    )


def score_options(config: StemConfig) -> dict[str, Any]:
    """The configuration's part of the scoring kernels' arguments."""
    return dict(
        block_q=config.query_block,
        block_k=config.key_block,
        stride=config.stride,
        metric=config.metric,
        value_weight=float(config.value_weight),
    )


@without_autocast
def torch_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bound: BoundLayout,
    config: StemConfig,
) -> Tensor:
    """Scores of all pairs, allowed or not, in PyTorch. O(N D + Qb Kb) memory."""
    stride = config.stride
    q_means = _phase_means(_real(q, bound.query_start, bound.query_end), config.query_block, stride)
    k_means = _phase_means(_real(k, bound.key_start, bound.key_end), config.key_block, stride)
    q_flat = rearrange(q_means, "b (h g) i s d -> b h g i (s d)", h=k.shape[1])
    k_flat = rearrange(k_means.flip(3), "b h j s d -> b h 1 (s d) j")
    # in float64: the switches for float32 products (TF32, bfloat16 on some CPUs) would choose other blocks
    routing = rearrange(q_flat.double() @ k_flat.double(), "b h g i j -> b (h g) i j")
    routing = (routing / (math.sqrt(q.shape[-1]) * stride)).to(q_means.dtype)
    if config.value_weight == 0:
        return routing
    magnitude = value_magnitude(v, bound, config)
    group = q.shape[1] // v.shape[1]
    return routing + config.value_weight * magnitude.repeat_interleave(group, 1)[:, :, None]


@without_autocast
def value_magnitude(v: Tensor, bound: BoundLayout, config: StemConfig) -> Tensor:
    """Magnitude of every key block, (B, Hkv, Kb), float32 or float64."""
    norms = _real(v, bound.key_start, bound.key_end).norm(dim=-1)
    norms = torch.where(norms.isnan(), 0.0, norms)
    blocks = bound.k_blocks
    norms = torch.nn.functional.pad(norms, (0, blocks * config.key_block - norms.shape[-1]))
    if config.metric == "log":
        return reduce(norms, "b h (j k) -> b h j", "max", j=blocks).log().clamp(min=0)
    counted = _valid_keys(v, bound)
    counted = torch.nn.functional.pad(counted, (0, blocks * config.key_block - counted.shape[-1]))
    counted = reduce(counted.to(norms.dtype), "b (g s) -> b 1 g", "sum", s=config.stride)
    # statistics in float64: of equal magnitudes the mean is then that very number, and z exactly 0
    logs = (reduce(norms, "b h (g s) -> b h g", "max", s=config.stride) + _EPS).log().double()
    complete = (counted == config.stride).double()
    number = complete.sum(-1, keepdim=True)
    mean = (logs * complete).sum(-1, keepdim=True) / number.clamp(min=1)
    square = ((logs - mean).square() * complete).sum(-1, keepdim=True)
    deviation = (square / (number - 1).clamp(min=1)).sqrt()
    bonus = ((logs - mean) / (deviation + _EPS)).nan_to_num(nan=0.0).relu() * ((counted > 0) & (number >= 2))
    return reduce(bonus, "b h (j g) -> b h j", "mean", j=blocks).to(norms.dtype)


def _phase_means(x: Tensor, block: int, stride: int) -> Tensor:
    """Mean of each block's tokens of each phase, (B, H, L, D) to (B, H, blocks, stride, D); zeros fill up."""
    x = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % block))
    return reduce(x, "b h (i t s) d -> b h i s d", "mean", t=block // stride, s=stride)


def _real(x: Tensor, start: Tensor | None, end: Tensor | None) -> Tensor:
    """x in float32 at least, with zeros in place of tokens outside [start, end) of their batch row."""
    x = x if x.dtype == torch.float64 else x.float()
    if start is None or end is None:
        return x
    token = torch.arange(x.shape[2], device=x.device)
    inside = (token >= start[:, None]) & (token < end[:, None])
    return torch.where(inside[:, None, :, None], x, 0)


def _valid_keys(v: Tensor, bound: BoundLayout) -> Tensor:
    token = torch.arange(v.shape[2], device=v.device)[None]
    if bound.key_start is None or bound.key_end is None:
        return torch.ones_like(token, dtype=torch.bool)
    return (token >= bound.key_start[:, None]) & (token < bound.key_end[:, None])
