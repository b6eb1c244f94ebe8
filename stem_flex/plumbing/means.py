"""Mean correction: a block that a row dropped enters its softmax as one pooled token.

The pooled token of a block of B keys has the mean key, the mean value, and the logit ``q k_mean scale + ln B``: what
its B tokens would add if all had the same key; of others' mass a lower bound (Jensen). Only blocks count that a query
may see entirely, and that its row of query blocks did not keep.
Cost: one pooled key for each block of keys, N^2 / B more pairs, and B Hq Qb Kb / 8 bytes for the kept blocks as bits.
FlashPrefill V2 (arXiv 2608.19758) corrects by means alike.

It depends on the model, so it is off by default. Text loss of the second half of a prompt, nats a token over dense, by
`python -m bench.correction` (`bench/results/correction`): the shipped model at 8K and mass thresholds 0.1 and 0.2 (16.5
and 11.9 % of the blocks) falls from 0.036 to 0.023 and from 0.085 to 0.067; at 0.05, and by counts at 39 %, nothing is
told from noise there. SmolLM2-135M gains nowhere and loses at threshold 0.2 (4K, 21 %): from 0.087 to 0.115.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from stem_flex.plumbing.binding import BoundLayout
from stem_flex.plumbing.geometry import Spans
from stem_flex.plumbing.mods import MaskModFn, below
from stem_flex.plumbing.recipes import with_recipe
from stem_flex.plumbing.tables import StemBlockMask, block_classes, compact, kept_bits


class Means(NamedTuple):
    """What flex_attention attends to.

    Attributes:
        k: (B, Hkv, Kb, D) the means alone, or (B, Hkv, Kb block + Kb, D) behind the tokens.
        v: alike, of Dv.
        mask: the BlockMask of these keys.
        score_mod: adds ln B to the means behind tokens; None for the means alone, whose log-sum-exp lacks it.
    """

    k: Tensor
    v: Tensor
    mask: BlockMask
    score_mod: Callable | None


def refuse_correction(block_mask: BlockMask, score_mod: object, needs_grad: bool) -> None:
    """Raise ValueError for what the correction does not serve."""
    if torch.compiler.is_compiling():
        raise ValueError(
            "correction='mean' is not served inside torch.compile, whose CPU kernel takes no keys that the graph made; "
            "call it outside, as the transformers integration does: its kernels are compiled by themselves"
        )
    bound = getattr(block_mask, "structure", None)
    if not isinstance(bound, BoundLayout) or block_mask.mask_mod is not bound.mask_mod:
        raise ValueError(
            "correction='mean' needs a block_mask of stem_block_mask with mask_mod='layout', which knows what its "
            "layout allows; got another, or one whose mask_mod was replaced"
        )
    if bound.intervals() is None:
        raise ValueError(
            "correction='mean' needs a layout of one interval of keys for each query (causal, full, sliding_window, "
            f"prefix, documents, padding), got {type(bound.layout).__name__}, which a mask_mod or a BlockMask says"
        )
    if score_mod is not None:
        raise ValueError("correction='mean' serves no score_mod, which would meet means of keys; leave one out")
    if needs_grad:
        raise ValueError("correction='mean' has no backward; call under torch.no_grad(), or train with correction=None")


def alone(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> Means:
    """The means by themselves, for a second call whose result is merged."""
    bound: BoundLayout = block_mask.structure  # type: ignore[attr-defined]
    block = bound.block_size[1]
    first, last = _listed(bound)
    counts = (last - first)[:, None]
    column = torch.arange(-(-bound.k_blocks // block), dtype=torch.int32, device=k.device)
    indices = torch.minimum(first[..., None] + column, column[-1])[:, None].contiguous()
    mask = StemBlockMask.from_kv_blocks(
        counts,
        indices,
        torch.zeros_like(counts),  # FLASH asks for lists of full blocks, of equal strides
        indices,
        BLOCK_SIZE=bound.block_size,
        mask_mod=_dropped(q, block_mask, bound),
        seq_lengths=(bound.seq_lengths[0], bound.k_blocks),
        compute_q_blocks=False,
    )
    return Means(block_means(k, block), block_means(v, block), mask, None)


def behind(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> Means:
    """The tokens, and the means behind them, for one call: where there is no log-sum-exp to merge by."""
    bound: BoundLayout = block_mask.structure  # type: ignore[attr-defined]
    block, tokens = bound.block_size[1], bound.k_blocks * bound.block_size[1]
    first, last = _listed(bound)
    column = torch.arange(-(-bound.k_blocks // block), dtype=torch.int32, device=k.device)
    listed = ((column >= first[..., None]) & (column < last[..., None])).to(torch.int8)[:, None]
    classes = block_classes(block_mask)
    classes = torch.cat([classes, listed.expand(*classes.shape[:3], -1)], -1)
    width = -(-classes.shape[-1] // 4) * 4
    # which mean a key is, -1 for tokens, as far as blocks are rounded up
    at = torch.arange(tokens + len(column) * block, dtype=torch.int32, device=k.device) - tokens
    at = at.clamp(min=-1, max=bound.k_blocks)
    mod = _tokens_and_means(bound.mask_mod, _dropped(q, block_mask, bound), at)
    lengths = (bound.seq_lengths[0], tokens + bound.k_blocks)
    mask = compact(classes != 0, classes, 2 * width, width).block_mask(mod, lengths, bound.block_size)
    more = [0, 0, 0, tokens - k.shape[2]]
    k, v = (torch.cat([torch.nn.functional.pad(x, more), block_means(x, block)], 2) for x in (k, v))
    return Means(k, v, mask, _heavier((at >= 0).float() * math.log(block)))


def merged(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys together, from the attention over each: outputs and log-sum-exps."""
    share = torch.sigmoid(other_lse - lse).nan_to_num(0.0)  # nan where neither set has a key
    return torch.lerp(out, other, share[..., None].to(out.dtype)), torch.logaddexp(lse, other_lse)


def block_means(x: Tensor, block: int) -> Tensor:
    """Mean of each block of tokens of x (B, H, L, D), (B, H, Kb, D), summed in float32.

    Zeros for a ragged last block, which no query may see entirely.
    """
    whole = x[:, :, : x.shape[2] // block * block]
    found = rearrange(whole, "b h (j t) d -> b h j t d", t=block).mean(3, dtype=torch.float32).to(x.dtype)
    return torch.nn.functional.pad(found, (0, 0, 0, 1)) if x.shape[2] % block else found


def _spans(bound: BoundLayout) -> Spans:
    """The blocks [start, end) that each query may see entirely, int32 (1 or B, Qb q_block); end may be below start."""

    def make() -> Spans:
        intervals = bound.intervals()
        assert intervals is not None
        block = bound.block_size[1]
        return Spans((intervals.start + (block - 1)) // block, intervals.end // block)

    return bound.remembered("blocks that queries may see entirely", make)


def _listed(bound: BoundLayout) -> tuple[Tensor, Tensor]:
    """The blocks [first, last) of means that each row's queries may see, int32 (1 or B, Qb) each."""
    start, end = (rearrange(x, "b (i q) -> b i q", q=bound.block_size[0]) for x in _spans(bound))
    some, block = start < end, bound.block_size[1]
    last = torch.where(some, (end - 1) // block + 1, 0).amax(-1)
    first = torch.where(some, start // block, bound.k_blocks).amin(-1)
    return torch.minimum(first, last).int(), last.int()


def _dropped(q: Tensor, block_mask: BlockMask, bound: BoundLayout) -> MaskModFn:
    """Whether a query may see block ``kv`` entirely and its row did not keep it, as a mask_mod over blocks."""
    batch, heads = q.shape[:2]
    start, end = (x.expand(batch, -1) for x in _spans(bound))
    row = below(bound.seq_lengths[0], q.device, bound.block_size[0])
    word = below(bound.k_blocks, q.device, 32)
    return _dropped_mod(start, end, kept_bits(block_mask).expand(batch, heads, -1, -1), row, word)


@with_recipe
def _dropped_mod(start: Tensor, end: Tensor, bits: Tensor, row: Callable, word: Callable) -> MaskModFn:
    def dropped_mask(b, h, q, kv):
        kept = bits[b, h, row(q), word(kv)] >> (kv & 31)
        return (kv >= start[b, q]) & (kv < end[b, q]) & ((kept & 1) == 0)

    return dropped_mask


@with_recipe
def _tokens_and_means(tokens: MaskModFn, means: MaskModFn, at: Tensor) -> MaskModFn:
    def tokens_and_means_mask(b, h, q, kv):
        mean = at[kv]
        return torch.where(mean < 0, tokens(b, h, q, kv), means(b, h, q, mean.clamp(min=0)))

    return tokens_and_means_mask


def _heavier(weight: Tensor) -> Callable:
    def heavier_score(score, b, h, q, kv):
        return score + weight[kv]

    return heavier_score
