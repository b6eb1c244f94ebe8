"""FlexPrefill (arXiv 2502.20766): each head takes a vertical-slash or a query-aware pattern, as its last queries say.

1. The last ``block`` queries attend densely; their mean mass by key block is the vertical share, by offset (query
   place - key place, in blocks) the slash share.
2. How many blocks: the fewest tokens whose mass passes gamma, sorted by mass, divided by the block, plus one; of
   columns and of diagonals alike, between ``min_budget`` and ``max_budget`` tokens.
3. Query-aware is a head whose estimate from block means is within tau of that vertical share, by the square root
   of the Jensen-Shannon divergence. It keeps the smallest numbers of columns and diagonals and, over all its rows,
   the largest entries of the block-mean attention that together stay within gamma of the rows.

Cost: as many dense rows as a block has (:mod:`stem_flex.kernels.tail`), N^2 D / block^2 for the estimate, and a search
in it without a sort (:mod:`stem_flex.kernels.above`): at 128K tokens of 32 heads 2 and 1 ms of an H100, all of it 8.

Departures from the published code, all of them repairs: diagonals are pooled by offset, so that they stand right for
lengths that are no multiple of the block, and 0 log 0 is 0 in the divergence.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stem_flex.budget import PREFERRED
from stem_flex.config import StemConfig
from stem_flex.layout import Layout
from stem_flex.plumbing.binding import BoundLayout
from stem_flex.plumbing.implementation import resolve
from stem_flex.selectors.minference import block_share
from stem_flex.selectors.shared import Tail, block_means, hide, own_distance, prepare, product, tail_attention, tail_of


def scores(
    q: Tensor, k: Tensor, v: Tensor, config: StemConfig | None = None, *,
    layout: Layout | BoundLayout | None = None, q_offset: int | Tensor = 0,
    gamma: float = 0.9, tau: float = 0.1, min_budget: int = 1024, max_budget: int | None = None,
    impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Lift the blocks of each head's pattern by PREFERRED over their estimated attention.

    Args:
        q: (B, Hq, Lq, D); k: (B, Hkv, Lk, D); v: (B, Hkv, Lk, Dv), not looked at.
        config: its block sizes count; None means ``StemConfig()``.
        layout, q_offset: as in :func:`stem_flex.oam_scores`: causal, padding, sliding windows. Of a chunk the last
            queries are the chunk's.
        gamma: mass to cover. tau: largest distance of a query-aware head; 0 makes all vertical-slash.
        min_budget, max_budget: tokens, for columns and for diagonals; None: no limit. Prompts of up to
            max(256, min_budget) keys are dense.
        impl: how the last queries attend and the largest entries are found: "triton", "torch", or "auto": Triton for
            CUDA tensors. Nothing falls back silently.

    Returns:
        float32 (B, Hq, Qb, Kb): share in [0, 1], lifted inside the pattern, -inf where the layout allows nothing.

    Raises:
        ValueError: a layout of documents, of a mask_mod, or that sees the future.
        TypeError: float64 for Triton.
    """
    config, bound = prepare(q, k, v, config, layout, q_offset)
    impl = resolve(impl, q)
    block = config.key_block
    tail = tail_of(q, bound, config.query_block, "flexprefill")
    rows = tail.real.sum(-1).clamp(min=1)[:, None, None]
    columns, offsets = (x / rows for x in tail_attention(tail, k, impl))
    vertical, slash = block_share(columns, bound), block_share(offsets, bound)
    aware = (_distance(q, k, tail, vertical, bound) < tau)[..., None]
    least = -(-min_budget // block)
    most = bound.k_blocks if max_budget is None else min(-(-max_budget // block), bound.k_blocks)
    number = [torch.where(aware[..., 0], least, _blocks(x, gamma, block, least, most)) for x in (columns, offsets)]
    first = torch.arange(bound.k_blocks, device=q.device) == _first_block(bound)
    nearest = torch.arange(bound.k_blocks, device=q.device) == 0
    column = _best(vertical.masked_fill(first, torch.inf), number[0])
    diagonal = _best(slash.masked_fill(nearest, torch.inf), number[1])
    attention = _block_attention(q, k, bound)
    inside = column[:, :, None] | _by_distance(diagonal, bound)
    inside = inside | (aware[..., None] & largest_within(attention, gamma, impl))
    if bound.seq_lengths[1] <= max(256, least * block):
        inside = torch.ones_like(inside)
    pattern = (vertical[:, :, None] + _by_distance(slash, bound)) / 2
    return hide(torch.where(aware[..., None], attention, pattern).clamp(max=1.0) + PREFERRED * inside, bound)


def largest_within(x: Tensor, part: float, impl: str = "torch") -> Tensor:
    """The largest entries of each head's x (B, H, Qb, Kb), no less than 0, whose sum is at most ``part`` of it.

    Found by narrowing the range of the numbers' bits: no sort of Qb Kb entries. Equal entries go together.
    """
    x = x.float().contiguous()  # as `hide` leaves it
    if impl == "triton":
        from stem_flex.kernels.selector_ops import largest_bound

        return x.view(torch.int32) >= largest_bound(x, part)[..., None, None]
    bits = x.view(torch.int32)
    limit = part * x.sum((2, 3), keepdim=True) * (1 + 1e-6)
    low = torch.zeros(*x.shape[:2], 1, 1, dtype=torch.int32, device=x.device)
    high = torch.full_like(low, 0x7F800000)  # infinity: nothing is kept
    for _ in range(31):
        middle = low + (high - low) // 2
        fits = torch.where(bits >= middle, x, 0).sum((2, 3), keepdim=True) <= limit
        low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
    return bits >= high.clamp(min=1)


def _first_block(bound: BoundLayout) -> Tensor | int:
    return 0 if bound.key_start is None else (bound.key_start // bound.block_size[1])[:, None, None]


def _blocks(mass: Tensor, gamma: float, block: int, least: int, most: int) -> Tensor:
    """Blocks of columns or diagonals that a head keeps, (B, H)."""
    upto = mass.sort(-1, descending=True).values.cumsum(-1)
    tokens = (upto <= gamma).sum(-1) + 1
    return (tokens // block + 1).clamp(min=least).clamp(max=most)


def _best(values: Tensor, number: Tensor) -> Tensor:
    order = values.argsort(dim=-1, descending=True, stable=True)
    taken = torch.arange(values.shape[-1], device=values.device) < number[..., None]
    return torch.zeros_like(taken).scatter_(-1, order, taken)


def _by_distance(values: Tensor, bound: BoundLayout) -> Tensor:
    """A vector by distance in blocks, (B, H, Kb), at every pair: (B, H, Qb, Kb); nothing in the future."""
    distance = own_distance(bound)[:, None].long()
    shape = (*values.shape[:2], *distance.shape[2:])
    found = values.gather(-1, distance.clamp(min=0).expand(*shape).flatten(2)).view(shape)
    return found & (distance >= 0) if found.dtype == torch.bool else found * (distance >= 0)


def _distance(q: Tensor, k: Tensor, tail: Tail, vertical: Tensor, bound: BoundLayout) -> Tensor:
    """Square root of the Jensen-Shannon divergence of the block-mean estimate from the vertical share, (B, H)."""
    block = bound.block_size[1]
    mean = (tail.q * tail.real[:, None, :, None]).sum(2, keepdim=True, dtype=vertical.dtype)
    mean = mean / tail.real.sum(-1).clamp(min=1)[:, None, None, None]
    keys = block_means(k, block, bound.key_start, bound.key_end)
    logits = product(mean.to(keys.dtype), keys, q.shape[-1] ** -0.5)[:, :, 0].to(vertical.dtype)
    some = tail.end > tail.start
    first = torch.where(some, tail.start, bound.seq_lengths[1]).amin(-1, keepdim=True) // block
    last = torch.where(some, tail.end - 1, -1).amax(-1, keepdim=True) // block
    key = torch.arange(bound.k_blocks, device=q.device)
    hidden = ((key < first) | (key > last))[:, None]
    estimate = logits.masked_fill(hidden, -math.inf).softmax(-1).nan_to_num(nan=0.0)
    middle = (estimate + vertical) / 2
    apart = [torch.xlogy(x, x).sum(-1) - torch.xlogy(x, middle).sum(-1) for x in (estimate, vertical)]
    return (sum(apart) / 2).clamp(min=0).sqrt()


def _block_attention(q: Tensor, k: Tensor, bound: BoundLayout) -> Tensor:
    queries = block_means(q, bound.block_size[0], bound.query_start, bound.query_end)
    keys = block_means(k, bound.block_size[1], bound.key_start, bound.key_end)
    logits = product(queries, keys, q.shape[-1] ** -0.5)
    return hide(logits, bound).softmax(-1).nan_to_num(nan=0.0)
