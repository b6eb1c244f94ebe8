"""ProxyAttn (arXiv 2509.24745): a few pooled heads rank the blocks by tokens, each head has a budget of its own.

Query heads fall into ``proxies`` groups, whose mean queries and mean keys attend token by token, every
``config.stride``-th query of a block. A block's score is the largest weight that one of its keys gets from a query of
the row. All heads of a group take their blocks in that order. How many: of each head the last queries attend
densely, and the share of blocks that hold ``gamma`` of their mass is the share that the head keeps in every row.

The paper's own sizes of groups, strides and gamma were not at hand: these are ours.
Cost: proxies / heads / stride of dense QK (4 of 32 heads, stride 8: 1.6 %), in two Triton kernels
(:mod:`stem_flex.kernels.cells`), and the last queries' attention; at 128K tokens the kernels take 7 ms of an H100,
the whole selection 9. PyTorch alone writes, reads and reduces some 4 G weights, 20 ms.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stem_flex.budget import PREFERRED, Coverage
from stem_flex.config import StemConfig
from stem_flex.layout import Layout
from stem_flex.plumbing.binding import BoundLayout
from stem_flex.plumbing.implementation import resolve
from stem_flex.plumbing.strips import by_strips, strips
from stem_flex.selectors.minference import block_share
from stem_flex.selectors.shared import (
    Tail,
    clear_keys,
    filled,
    hide,
    last_key,
    operand,
    prepare,
    product,
    spans_of,
    tail_attention,
    tail_of,
)

_WEIGHTS_AT_ONCE = 2**27


def scores(
    q: Tensor, k: Tensor, v: Tensor, config: StemConfig | None = None, *,
    layout: Layout | BoundLayout | None = None, q_offset: int | Tensor = 0, proxies: int = 4, gamma: float = 0.9,
    impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Share of each block in its row of the group's scores, lifted by PREFERRED where the head's budget takes it.

    Args:
        q: (B, Hq, Lq, D); k: (B, Hkv, Lk, D); v: (B, Hkv, Lk, Dv), not looked at.
        config: its stride and block sizes count; None means ``StemConfig()``.
        layout, q_offset: as in :func:`stem_flex.oam_scores`: causal, padding, sliding windows. Of a chunk the last
            queries are the chunk's.
        proxies: groups of heads; fewer where the heads don't divide: the largest common divisor counts.
        gamma: mass of the last queries to cover, in (0, 1].
        impl: "triton", "torch", or "auto": Triton for CUDA tensors. Nothing falls back silently.

    Returns:
        float32 (B, Hq, Qb, Kb), -inf where the layout allows nothing.

    Raises:
        ValueError: a layout of documents, of a mask_mod, or that sees the future.
        TypeError: float64 for Triton.
    """
    config, bound = prepare(q, k, v, config, layout, q_offset)
    tail = tail_of(q, bound, config.query_block, "proxyattn")
    impl = resolve(impl, q)
    mass = _tail_mass(tail, k, bound, config, impl) / tail.real.sum(-1).clamp(min=1)[:, None, None]
    needed = Coverage(gamma).counts(bound, config, 1, q.shape[1], mass[:, :, None])
    some = tail.end > tail.start
    first = torch.where(some, tail.start, bound.seq_lengths[1]).amin(-1) // config.key_block
    last = (torch.where(some, tail.end, 0).amax(-1) - 1) // config.key_block
    part = needed[:, :, 0] / (last - first + 1).clamp(min=1)[:, None]
    shared = _group_scores(q, k, bound, config, math.gcd(proxies, q.shape[1]), impl)
    group = q.shape[1] // shared.shape[1]
    allowed = bound.dense_classes() != 0
    number = (part[..., None] * allowed.sum(-1) - 1e-4).ceil()  # the division's rounding must not add a block
    rank = by_strips(hide(shared, bound), _rank).repeat_interleave(group, 1)
    return hide(shared.repeat_interleave(group, 1) + PREFERRED * (rank < number[..., None]), bound)


def _tail_mass(tail: Tail, k: Tensor, bound: BoundLayout, config: StemConfig, impl: str) -> Tensor:
    """Attention of the last queries on each block, summed over them: (B, Hq, Kb)."""
    if impl == "torch":
        return block_share(tail_attention(tail, k)[0], bound)
    from stem_flex.kernels.selector_ops import Cut, Operands, cell_mass

    more = config.query_block - tail.q.shape[2]  # of prompts shorter than a block
    q, start, end = (
        torch.nn.functional.pad(x, pad)
        for x, pad in ((tail.q, (0, 0, 0, more)), (tail.start, (0, more)), (tail.end, (0, more)))
    )
    cut = Cut(1, config.query_block, config.key_block)
    operands = Operands(q, k, (start, end), (None,) * 4, cut, q.shape[-1] ** -0.5)
    total, _ = cell_mass(operands)
    return total[:, :, 0]


def _rank(scores: Tensor) -> Tensor:
    """Place of each block among its row's, the best first: 0, 1, ..."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
    return torch.zeros_like(order).scatter_(-1, order, place)


def _group_scores(q: Tensor, k: Tensor, bound: BoundLayout, config: StemConfig, proxies: int, impl: str) -> Tensor:
    """Largest weight of each block's keys from the pooled queries of the row, rows summing to 1: (B, P, Qb, Kb)."""
    stride = config.stride
    queries = operand(q[:, :, ::stride]).unflatten(1, (proxies, -1)).mean(2)
    owner = torch.arange(q.shape[1], device=q.device) // (q.shape[1] // k.shape[1])
    owned = owner[:, None] == torch.arange(k.shape[1], device=q.device)
    weight = owned.to(queries.dtype).unflatten(0, (proxies, -1)).mean(1)
    keys = torch.einsum("bhjd, ph -> bpjd", operand(k), weight)
    if impl == "triton":
        from stem_flex.kernels.selector_ops import Cut, Operands, cell_mass

        start, end = spans_of(bound, "proxyattn")
        cut = Cut(1, config.query_block // stride, config.key_block)
        spans = start[:, ::stride], end[:, ::stride]
        operands = Operands(queries.to(q.dtype), keys.to(q.dtype), spans, (None,) * 4, cut, q.shape[-1] ** -0.5)
        _, best = cell_mass(operands, bound.causal_offset, stride, peaks=True)
    else:
        best = largest_weights(queries, keys, bound, stride)
    return best / best.sum(-1, keepdim=True).clamp(min=1e-20)


def largest_weights(queries: Tensor, keys: Tensor, bound: BoundLayout, stride: int) -> Tensor:
    """Largest entry in each block of the softmax of every ``stride``-th query, float32 (B, P, Qb, Kb)."""
    (q_block, k_block), length = bound.block_size, bound.seq_lengths[0]
    start, end = (x[:, None, ::stride, None] for x in spans_of(bound, "proxyattn"))
    per_row, (batch, proxies, tokens, dim) = q_block // stride, keys.shape
    found = torch.zeros(batch, proxies, bound.q_blocks, bound.k_blocks, dtype=torch.float32, device=keys.device)
    for rows in strips(bound.q_blocks, batch * proxies * per_row * tokens, _WEIGHTS_AT_ONCE):
        part = slice(rows.start * per_row, rows.stop * per_row)
        seen = last_key(bound, min(rows.stop * q_block, length))
        logits = product(queries[:, :, part], keys[:, :, :seen], dim**-0.5)
        logits = filled(logits, 2, part.stop - part.start)
        clear = clear_keys(bound, rows.start * q_block)
        key = torch.arange(clear, seen, dtype=torch.int32, device=keys.device)
        logits[..., clear:].masked_fill_((key < start[:, :, part]) | (key >= end[:, :, part]), -math.inf)
        weights = logits.softmax(-1)
        if not bound.layout.plain_causal or length % q_block:  # else every query sees a key
            weights = weights.masked_fill_(end[:, :, part] <= start[:, :, part], 0.0)
        best = filled(weights.unflatten(2, (-1, per_row)).amax(3), 3, k_block)
        found[:, :, rows, : -(-seen // k_block)] = best.unflatten(3, (-1, k_block)).amax(-1)
    return found
