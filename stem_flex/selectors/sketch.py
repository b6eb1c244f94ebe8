"""The block sketch: attention between a few proxies of each block.

A block is represented, on both sides, by outliers, the tokens farthest from the block's mean (ties to the lower
index), which stand for themselves, and by means of contiguous groups of its tokens, which stand for the real tokens in
them. What stands for no token is not seen. Between proxies a coarse attention is taken: logit q_a k_b / sqrt(D) +
ln(tokens that k_b stands for), softmax over all key proxies of the blocks that the layout allows to a's block. With
M[a, J] the mass of query proxy a on key block J and w_a the tokens that a stands for, the score of a pair of blocks is

    sum_a w_a M[a, J] / sum_a w_a (diffuse heads) + max_a M[a, J] (sharp heads).

Cost: (query proxies x key proxies) / block^2 of dense QK, 1.8 % for 24 x 12 of 128. A mean over a whole block, as the
antidiagonal scores take, averages a single strong token pair away; this doesn't.

With ``config.coarse`` a coarser sketch, the first few of the same outliers and one mean a block, scores every pair so,
and proposes those above the threshold / 32 (`stem_flex.budget.SLACK`), or above the smallest doubling of that which
leaves at most 256 blocks of a row (`stem_flex.budget.PROPOSED`, or the budget's cap). Only their masses are taken by
the finer one. What was not proposed keeps its coarse score, and counts in the softmax's denominator by the coarse
exponentials of a stand-in: the same query proxy, or the query block's mean where the coarse sketch has no such proxy. A
proxy's masses on the proposed blocks add up to

    max(own / (own + unseen), 1 - unseen / all)

with its own exponentials on them and the stand-in's on the others and on all. The cost that is left grows with what
rows keep, and a coarse pair of 5 x 2 proxies costs a thirtieth of one of 24 x 12.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange, reduce
from torch import Tensor

from stem_flex.budget import SLACK, Budget, Mass
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

        rule = Mass(config.threshold, config.floor, config.cap)
        proposes = {} if config.coarse is None else {"coarse": config.coarse, "capacity": rule.proposed(bound)}
        return sketch_scores(
            q, k, bound.rows, *bound.restrictions, levels=rule.levels(bound, config) if proposes else None,
            threshold=float(rule.threshold), block_q=config.query_block, block_k=config.key_block, sketch=sketch,
            causal_offset=bound.causal_offset, **proposes,
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
        coarse=config.coarse,
        capacity=rule.proposed(bound),
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
    if config.coarse is not None and (sketch[0] < config.coarse[0] or sketch[2] < config.coarse[1]):
        raise ValueError(f"sketch must have at least the outliers of coarse={config.coarse}, got {sketch}")
    return sketch


def torch_scores(q: Tensor, k: Tensor, bound: BoundLayout, config: StemConfig, sketch: Sketch) -> Tensor:
    """The scores in PyTorch, some rows at a time; with ``config.coarse`` both sketches look at every pair."""
    fine = _sides(q, k, bound, config, sketch)
    coarse = None if config.coarse is None else _sides(q, k, bound, config, (config.coarse[0], 1, config.coarse[1], 1))
    rows = fine[0].shape[3]
    pairs = q.shape[0] * q.shape[1] * sum(sketch[:2]) * fine[2].shape[3] * fine[2].shape[4]
    step = rows if torch.compiler.is_compiling() else max(1, _PAIRS_AT_ONCE // max(1, pairs))
    found = []
    for first in range(0, rows, step):
        part = slice(first, first + step)
        visible = bound.dense_classes(first, first + step) != EMPTY
        logs, weight = _block_logs(fine, part, visible)
        if coarse is None:
            normal, score = logs.logsumexp(-1, keepdim=True), None
        else:
            coarse_logs, coarse_weight = _block_logs(coarse, part, visible)
            normal = coarse_logs.logsumexp(-1, keepdim=True)
            score = _score(coarse_logs - normal, coarse_weight).masked_fill(~visible, -math.inf)
            proposed = _proposed(score, bound, config, part)
            stand_in = torch.arange(logs.shape[3], device=q.device).clamp(max=coarse_logs.shape[3] - 1)
            hidden = proposed[:, :, :, None]
            unseen = coarse_logs.masked_fill(hidden, -math.inf).logsumexp(-1, keepdim=True)[:, :, :, stand_in]
            seen = coarse_logs.masked_fill(~hidden, -math.inf).logsumexp(-1, keepdim=True)[:, :, :, stand_in]
            logs = logs.masked_fill(~hidden, -math.inf)
            own = logs.logsumexp(-1, keepdim=True)
            share = torch.maximum((own - unseen).sigmoid(), (seen - normal[:, :, :, stand_in]).exp())
            normal = own - share.log()
            score = torch.where(proposed, _score(logs - normal, weight), score)
        score = _score(logs - normal, weight) if score is None else score
        found.append(score.masked_fill(~visible, -math.inf))
    return torch.cat(found, 2)


_Sides = tuple[Tensor, Tensor, Tensor, Tensor]


def _sides(q: Tensor, k: Tensor, bound: BoundLayout, config: StemConfig, sketch: Sketch) -> _Sides:
    """Query proxies (B, Hkv, G, Qb, P, D) over sqrt(D), their tokens (B or 1, Qb, P), and both of the keys,
    (B, Hkv, D, Kb, R) and (B or 1, Kb, R)."""
    queries, q_tokens = proxies(q, config.query_block, *sketch[:2], bound.query_start, bound.query_end)
    keys, k_tokens = proxies(k, config.key_block, *sketch[2:], bound.key_start, bound.key_end)
    queries = rearrange(queries, "b (h g) i a d -> b h g i a d", h=k.shape[1]) / math.sqrt(q.shape[-1])
    return queries, q_tokens, rearrange(keys, "b h j r d -> b h d j r"), k_tokens


def _block_logs(sides: _Sides, part: slice, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Of some rows: ln of the sums of exponentials, (B, Hq, I, P, Kb), -inf outside ``visible``, and the tokens that
    each query proxy stands for, (B or 1, 1, I, P)."""
    queries, q_tokens, keys, k_tokens = sides
    flat = rearrange(keys, "b h d j r -> b h 1 1 d (j r)")
    logits = rearrange(queries[:, :, :, part] @ flat, "b h g i a (j r) -> b (h g) i a j r", r=keys.shape[4])
    logs = (logits + k_tokens.log()[:, None, None, None]).logsumexp(-1)
    return logs.masked_fill_(~visible[:, :, :, None], -math.inf), q_tokens[:, None, part]


def _score(logs: Tensor, weight: Tensor) -> Tensor:
    """Mean and maximum over the query proxies of masses whose logarithms are given."""
    mass = logs.exp()
    mean = (mass * weight[..., None]).sum(3) / weight.sum(-1, keepdim=True)
    return mean + mass.masked_fill((weight == 0)[..., None], 0).amax(3)


def _proposed(score: Tensor, bound: BoundLayout, config: StemConfig, part: slice) -> Tensor:
    """The blocks that coarse scores (B, Hq, I, Kb) propose to look at more closely."""
    rule = Mass(config.threshold, config.floor, config.cap)
    levels, most = rule.levels(bound, config), rule.proposed(bound)
    level = torch.full((1, 1, 1), rule.threshold, dtype=score.dtype, device=score.device)
    level = level if levels is None else levels[:, :, part]
    lowest = level[..., None].to(score.dtype) / SLACK
    for _ in range(math.ceil(math.log2(2 * SLACK / rule.threshold)) + 1):  # no score exceeds 2
        crowded = (score > lowest).sum(-1, keepdim=True) > most
        lowest = torch.where(crowded, 2 * lowest, lowest)
    return score > lowest


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
