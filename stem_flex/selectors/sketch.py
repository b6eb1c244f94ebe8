"""The block sketch: attention between a few proxies of each block.

A block is represented, on both sides, by outliers, the tokens farthest from the block's mean (ties to the lower
index), which stand for themselves, and by means of contiguous groups of its tokens, which stand for the real tokens in
them. What stands for no token is not seen. Between proxies a coarse attention is taken: logit q_a k_b / sqrt(D) +
ln(tokens that k_b stands for), softmax over all key proxies of the blocks that the layout allows to a's block. With
M[a, J] the mass of query proxy a on key block J and w_a the tokens that a stands for, the score of a pair of blocks is

    sum_a w_a M[a, J] / sum_a w_a (diffuse heads) + max_a M[a, J] (sharp heads).

Cost: (query proxies x key proxies) / block^2 of dense QK, 1.8 % for 24 x 12 of 128. A mean over a whole block, as the
antidiagonal scores take, averages a single strong token pair away; this doesn't.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange, reduce
from torch import Tensor

from stem_flex.budget import Budget, Mass
from stem_flex.config import StemConfig
from stem_flex.layout import Layout
from stem_flex.plumbing.binding import BoundLayout
from stem_flex.plumbing.checks import check_config, check_qkv
from stem_flex.plumbing.classes import EMPTY
from stem_flex.plumbing.implementation import resolve
from stem_flex.plumbing.tables import BlockTables
from stem_flex.score import bind_to
from stem_flex.select import shape_of

Sketch = tuple[int, int, int, int]
"""Query outliers, query means, key outliers, key means of a block."""

_PAIRS_AT_ONCE = 2**25  # pairs of proxies held at a time, 4 bytes each and some copies


def scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig | None = None,
    *,
    layout: Layout | BoundLayout | None = None,
    q_offset: int | Tensor = 0,
    kv_len: int | Tensor | None = None,
    impl: str = "auto",
    sketch: Sketch | None = None,
) -> Tensor:
    """Score every pair of blocks by its sketch; v is not looked at.

    Args:
        q: (B, Hq, Lq, D), float16, bfloat16, float32 or float64 (PyTorch only), any strides with a unit last one.
        k: (B, Hkv, Lk, D), the same dtype and device; Hq is a multiple of Hkv. v: (B, Hkv, Lk, Dv).
        config: its block sizes count; None means ``StemConfig()``.
        layout, q_offset, kv_len, impl: as in :func:`stem_flex.oam_scores`.
        sketch: query outliers, query means, key outliers and key means of a block. None: the config's, (16, 8, 4, 8).

    Returns:
        float32 (float64 for float64 inputs) (B, Hq, Qb, Kb), -inf where the layout allows no pair.

    Raises:
        TypeError, ValueError: naming the argument, what was expected, what came, and the fix.
    """
    config = check_config(config)
    check_qkv(q, k, v)
    q, k, v = q.detach(), k.detach(), v.detach()
    bound = bind_to(q, k, layout, q_offset=q_offset, kv_len=kv_len, prompt_len=None, config=config)
    return score(q, k, v, bound, config, impl=impl, sketch=sketch)


def score(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bound: BoundLayout,
    config: StemConfig,
    *,
    impl: str = "auto",
    sketch: Sketch | None = None,
) -> Tensor:
    """:func:`scores` under a bound layout."""
    sketch = sketch_of(config, sketch)
    if resolve(impl, q) == "triton":
        from stem_flex.kernels.sketch_ops import sketch_scores

        return sketch_scores(
            q, k, bound.rows, *bound.restrictions, block_q=config.query_block, block_k=config.key_block,
            sketch=sketch, causal_offset=bound.causal_offset,
        )  # fmt: skip
    return torch_scores(q, k, bound, config, sketch)


def tables(q: Tensor, k: Tensor, v: Tensor, bound: BoundLayout, config: StemConfig, rule: Budget) -> BlockTables | None:
    """What :func:`score` and :class:`stem_flex.budget.Mass` choose, by `stem_flex.kernels.sketch_tables`."""
    if type(rule) is not Mass:
        return None
    from stem_flex.kernels.sketch_tables import sketch_tables

    width, partial_columns = shape_of(bound, config, rule)
    buffer, counts = sketch_tables(
        q,
        k,
        bound.rows,
        rule.levels(bound, config),
        *bound.restrictions,
        threshold=float(rule.threshold),
        floor=rule.floor,
        cap=rule.most(bound, config),
        block_q=config.query_block,
        block_k=config.key_block,
        sketch=sketch_of(config),
        sink=min(config.sink_blocks, bound.k_blocks),
        local=min(config.local_blocks, bound.k_blocks),
        partial_columns=partial_columns,
        width=width,
        causal_offset=bound.causal_offset,
    )
    return BlockTables(buffer, counts, width, partial_columns, bound.k_blocks)


def sketch_of(config: StemConfig, sketch: Sketch | None = None) -> Sketch:
    """The sizes to use: ``sketch``, or the config's.

    Raises:
        ValueError: the blocks can't be represented so.
    """
    sketch = tuple(config.sketch if sketch is None else sketch)  # type: ignore[assignment]
    assert sketch is not None
    for name, block, outliers, means in (
        ("query", config.query_block, *sketch[:2]),
        ("key", config.key_block, *sketch[2:]),
    ):
        if not 0 <= outliers <= block:
            raise ValueError(f"sketch must have 0 to {block} {name} outliers, got {sketch}")
        if means < 1 or means & (means - 1) or block % means:
            raise ValueError(f"sketch must have a power of two of {name} means that divides {block}, got {sketch}")
    return sketch


def torch_scores(q: Tensor, k: Tensor, bound: BoundLayout, config: StemConfig, sketch: Sketch) -> Tensor:
    """The scores in PyTorch, some rows at a time."""
    queries, q_tokens = proxies(q, config.query_block, *sketch[:2], bound.query_start, bound.query_end)
    keys, k_tokens = proxies(k, config.key_block, *sketch[2:], bound.key_start, bound.key_end)
    queries = rearrange(queries, "b (h g) i a d -> b h g i a d", h=k.shape[1])
    keys = rearrange(keys, "b h j r d -> b h 1 1 d (j r)")
    bias = rearrange(k_tokens.log(), "b j r -> b 1 1 1 (j r)")
    per_block, rows, pairs = k_tokens.shape[2], q_tokens.shape[1], q.shape[0] * q.shape[1] * q_tokens.shape[2]
    step = rows if torch.compiler.is_compiling() else max(1, _PAIRS_AT_ONCE // max(1, pairs * bias.shape[-1]))
    found = []
    for first in range(0, rows, step):
        part = slice(first, first + step)
        visible = bound.dense_classes(first, first + step) != EMPTY
        logits = rearrange(queries[:, :, :, part] @ keys, "b h g i a n -> b (h g) i a n") / math.sqrt(q.shape[-1])
        hidden = ~visible.repeat_interleave(per_block, -1)[:, :, :, None]
        mass = (logits + bias).masked_fill_(hidden, -math.inf).softmax(-1)
        mass = reduce(mass, "b h i a (j r) -> b h i a j", "sum", r=per_block)
        weight = q_tokens[:, None, part]
        mean = (mass * weight[..., None]).sum(3) / weight.sum(-1, keepdim=True)
        peak = mass.masked_fill((weight == 0)[..., None], 0).amax(3)
        found.append((mean + peak).masked_fill(~visible, -math.inf))
    return torch.cat(found, 2)


def proxies(
    x: Tensor, block: int, outliers: int, means: int, start: Tensor | None = None, end: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A few vectors for each block of x (B, H, L, D), and the tokens that each stands for.

    Args:
        start, end: int (B,), the real tokens of each batch row; None: all.

    Returns:
        float32 (float64 of float64) (B, H, blocks, outliers + means, D), outliers first, and how many real tokens each
        stands for, (B or 1, blocks, outliers + means) in the same dtype; 0 for what is not to be seen.
    """
    x = x if x.dtype == torch.float64 else x.float()
    position = torch.arange(-(-x.shape[2] // block) * block, device=x.device)[None]
    real = position < x.shape[2]
    if start is not None and end is not None:
        real = real & (position >= start[:, None]) & (position < end[:, None])
    x = torch.nn.functional.pad(x, (0, 0, 0, position.numel() - x.shape[2])).masked_fill(~real[:, None, :, None], 0)
    tokens, real = rearrange(x, "b h (j t) d -> b h j t d", t=block), rearrange(real, "b (j t) -> b j t", t=block)
    counts = reduce(real.to(x.dtype), "b j (r t) -> b j r", "sum", r=means)
    sums = reduce(tokens, "b h j (r t) d -> b h j r d", "sum", r=means)
    found = sums / counts[:, None, ..., None].clamp(min=1)
    if not outliers:
        return found, counts
    center = sums.sum(3, keepdim=True) / counts.sum(-1).clamp(min=1)[:, None, :, None, None]
    distance = (tokens - center).square().sum(-1).masked_fill(~real[:, None], -1)
    index = distance.sort(dim=-1, descending=True, stable=True).indices[..., :outliers]  # ties to the lower index
    picked = tokens.gather(3, index[..., None].expand(*index.shape, tokens.shape[-1]))
    single = torch.arange(outliers, device=x.device) < real.sum(-1, keepdim=True)
    return torch.cat([picked, found], 3), torch.cat([single.to(x.dtype), counts], -1)
