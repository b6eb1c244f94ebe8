"""InfLLM-v2 with Stem: blocks by compressed keys for each query token and KV head, with a budget that decays.

InfLLM-v2 (MiniCPM-4.1) is a trained sparse attention. Keys are compressed to means of 32 tokens every 16; a query token
attends to the means that lie wholly before it, and the heads of a GQA group add their attention up. A block of 64 keys
is worth the largest attention on a mean that overlaps it; the first block and the 33 up to the query's own are always
kept, and count in the 96 that are kept in all. Stem makes the 96 decay along the prompt and multiplies a block's
attention by e^(value_weight * magnitude) (:mod:`.refine`). The published kernel approximates the softmax's denominator
from coarser means, and scores in bfloat16; here both are exact.

A choice for each token cannot be said by a BlockMask alone. :func:`infllm_blocks` packs it into bits, ceil(Lk / 2048)
words of 32 blocks for each query and KV head (64 MiB for 131,072 tokens and 2 KV heads; 4 GiB for a million), and its
BlockMask computes the union over 128 queries, with a mask_mod that looks the bits up in blocks that not all chose.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from stem_flex.budget import Mass
from stem_flex.config import StemConfig
from stem_flex.layout import causal
from stem_flex.plumbing.binding import BoundLayout
from stem_flex.plumbing.checks import check_config, check_positive, check_qkv
from stem_flex.plumbing.classes import EMPTY, FULL, PARTIAL
from stem_flex.plumbing.mods import MaskModFn, below
from stem_flex.plumbing.tables import compact
from stem_flex.selectors.refine import best, bind_rows, key_magnitude, refine

WORKSPACE = 2**28  # bytes that a strip of rows may take
QUERIES = 128  # of a BlockMask's block
_WORD = 32  # blocks of a word of bits


@dataclass(frozen=True)
class InfLLM:
    """Sizes of InfLLM-v2; the defaults are MiniCPM-4.1's.

    Args:
        keep: blocks of a query, forced ones included.
        block: tokens of a block, a power of two.
        window, stride: tokens of a mean of keys, and from one mean to the next; both divide ``block`` (window twice
            the stride).
        first, local: forced blocks: at the beginning, and up to and with the query's own.
    """

    keep: int = 96
    block: int = 64
    window: int = 32
    stride: int = 16
    first: int = 1
    local: int = 33

    def __post_init__(self) -> None:
        for name in ("keep", "block", "window", "stride", "local"):
            check_positive(name, getattr(self, name))
        if self.window != 2 * self.stride or self.block % self.window or self.block & (self.block - 1):
            raise ValueError(
                f"block must be a power of two and a multiple of window, which must be twice stride, got "
                f"{self.block}, {self.window} and {self.stride}"
            )
        if isinstance(self.first, bool) or not isinstance(self.first, int) or self.first < 0:
            raise ValueError(f"first must be an int of 0 or more, got {self.first!r}")
        if self.keep < self.forced:
            raise ValueError(f"keep must be at least first + local = {self.forced} blocks, got {self.keep}")

    @property
    def forced(self) -> int:
        """Blocks that every query keeps where it has them."""
        return self.first + self.local


@dataclass(frozen=True, eq=False)
class TokenBlocks:
    """The blocks of every query token and KV head.

    Attributes:
        words: int32 (B, Hkv, Lq, ceil(Kb / 32)), block J is bit J % 32 of word J // 32.
        some, all: bool (B, Hkv, Qb, Kb): any, and every, query of 128 chose the block.
        kept: int32 (B, Hkv, Lq), blocks of each query.
        bound: the layout of the block mask: KV heads count as batch rows.
        sizes: what was chosen by.
    """

    words: Tensor
    some: Tensor
    all: Tensor
    kept: Tensor
    bound: BoundLayout
    sizes: InfLLM

    def dense(self) -> Tensor:
        """The choice as bool (B, Hkv, Lq, Kb), for small sizes."""
        bit = torch.arange(_WORD, dtype=torch.int32, device=self.words.device)
        bits = (self.words[..., None] >> bit) & 1
        return bits.flatten(-2)[..., : self.some.shape[-1]].bool()

    def block_mask(self) -> BlockMask:
        """A BlockMask (B * Hkv, 1, Lq, Lk) of blocks (128, block), for q, k and v that :func:`folded` gives::

            mask = infllm_blocks(q, k, v).block_mask()
            out = compiled_flex_attention(*(folded(x, k.shape[1]) for x in (q, k, v)), mask, enable_gqa=True)
            out = out.view(q.shape[0], q.shape[1], *out.shape[2:])

        A block is full where all its queries chose it and see all of it, partial where some did: there the mask_mod
        reads each query's bit. Every head of a GQA group shares the row, so tables are
        8 B Hkv Qb Kb bytes (32 MiB for 131,072 tokens and 2 KV heads).
        """
        some, whole = (rearrange(x, "b h i j -> (b h) 1 i j") for x in (self.some, self.all))
        classes = self.bound.dense_classes()
        kept = some & (classes != EMPTY)
        classes = torch.where(whole & (classes == FULL), FULL, PARTIAL).to(torch.int8)
        most = -(-kept.shape[-1] // 4) * 4
        mask_mod = _bit_mod(self.words.flatten(0, 1), self.bound)
        tables = compact(kept, classes, 2 * most, most)
        mask = tables.block_mask(mask_mod, self.bound.seq_lengths, self.bound.block_size)
        mask.structure = self.bound  # type: ignore[attr-defined]
        return mask


def infllm_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig | None = None,
    *,
    sizes: InfLLM | None = None,
    q_offset: int | Tensor = 0,
    prompt_len: int | Tensor | None = None,
    kv_len: int | Tensor | None = None,
    scale: float | None = None,
    budget: Mass | None = None,
    workspace: int = WORKSPACE,
) -> TokenBlocks:
    """Choose the blocks of every query token and KV head: InfLLM-v2's top-k, with Stem's budget and value magnitude.

    Args:
        q: (B, Hq, Lq, D); k: (B, Hkv, Lk, D); v: (B, Hkv, Lk, Dv).
        config: see :func:`stem_flex.selectors.refine.refine`. None means ``StemConfig(schedule="paper", mu=0.62)``,
            which saves at least 18 % of the blocks of a prompt of 16K tokens or more;
            ``StemConfig(mu=1.0, value_weight=0.0)`` is plain InfLLM-v2. Forced blocks are kept whatever the budget.
        sizes: None means ``InfLLM()``.
        q_offset: keys before the first query, int or int (B,).
        prompt_len: tokens of the whole prompt, which budgets follow, int or int (B,). None: all valid keys.
        kv_len: valid keys, int or int (B,): batch rows of different lengths end with padding. None: all. Queries past
            their row's length choose among its keys, and mean nothing. Padding at the left is not served: blocks and
            means count from key 0.
        scale: of the logits; None means 1 / sqrt(D).
        budget: see :func:`stem_flex.selectors.refine.refine`; the mass of a block is :func:`block_attention`'s, added
            up over the heads of the group.
        workspace: bytes for a strip of rows, of which 128 at least are taken.

    Raises:
        TypeError, ValueError: naming the argument, what was expected, what came, and the fix.
    """
    config = StemConfig(schedule="paper", mu=0.62) if config is None else check_config(config)
    sizes = InfLLM() if sizes is None else sizes
    if not isinstance(sizes, InfLLM):
        raise TypeError(f"sizes must be an InfLLM or None, got {type(sizes).__name__}")
    check_qkv(q, k, v)
    check_positive("workspace", workspace)
    batch, kv_heads, queries = q.shape[0], k.shape[1], q.shape[2]
    blocks = -(-k.shape[2] // sizes.block)
    bind = functools.partial(bind_rows, k, v, None, size=(1, sizes.block), prompt_len=prompt_len, kv_len=kv_len)
    means = compressed_keys(k, sizes)
    magnitude = None
    if config.value_weight:
        magnitude = key_magnitude(v, config, bind(rows=1, q_offset=q_offset), heads=kv_heads)
    words = torch.zeros(batch, kv_heads, queries, -(-blocks // _WORD), dtype=torch.int32, device=q.device)
    kept = torch.empty(batch, kv_heads, queries, dtype=torch.int32, device=q.device)
    some = torch.empty(batch, kv_heads, -(-queries // QUERIES), blocks, dtype=torch.bool, device=q.device)
    every = torch.empty_like(some)
    pairs = batch * (8 * q.shape[1] * means.shape[2] + 40 * kv_heads * blocks)
    rows = max(1, workspace // (pairs * QUERIES)) * QUERIES
    for first in range(0, queries, rows):
        strip = slice(first, min(first + rows, queries))
        scores = block_attention(q[:, :, strip], means, blocks, sizes, q_offset=q_offset + first, scale=scale)
        bound = bind(rows=scores.shape[2], q_offset=q_offset + first)
        refined = refine(
            scores, v, config, keep=sizes.keep, size=bound.block_size, layout=bound, unit="mass", magnitude=magnitude,
            budget=budget,
        )  # fmt: skip
        counts = refined.counts.clamp(min=sizes.forced)
        chosen = best(refined.scores, refined.allowed, counts, sizes.keep)
        words[:, :, strip], kept[:, :, strip] = _packed(chosen), chosen.sum(-1, dtype=torch.int32)
        groups = slice(first // QUERIES, -(-strip.stop // QUERIES))
        some[:, :, groups], every[:, :, groups] = _by_group(chosen)
    return TokenBlocks(words, some, every, kept, _mask_layout(q, k, q_offset, kv_len, sizes), sizes)


def folded(x: Tensor, kv_heads: int) -> Tensor:
    """q, k or v (B, H, L, D) as the block mask has them, each KV head a batch row: (B * Hkv, H / Hkv, L, D)."""
    return rearrange(x, "b (h g) n d -> (b h) g n d", h=kv_heads)


def compressed_keys(k: Tensor, sizes: InfLLM) -> Tensor:
    """Means of ``window`` keys, every ``stride``: float32 (float64 for float64) (B, Hkv, C, D), C may be 0."""
    k = k.detach() if k.dtype == torch.float64 else k.detach().float()
    if k.shape[2] < sizes.window:
        return k[:, :, :0]
    halves = k[:, :, : k.shape[2] // sizes.stride * sizes.stride]
    halves = reduce(halves, "b h (c t) d -> b h c d", "mean", t=sizes.stride)
    return (halves[:, :, :-1] + halves[:, :, 1:]) / 2


def block_attention(
    q: Tensor,
    means: Tensor,
    blocks: int,
    sizes: InfLLM,
    *,
    q_offset: int | Tensor = 0,
    scale: float | None = None,
) -> Tensor:
    """Attention that each query gives each block, added up over its GQA group; +inf for forced blocks.

    Args:
        q: (B, Hq, R, D); means: (B, Hkv, C, D) of :func:`compressed_keys`.
        blocks: Kb.

    Returns:
        float32 (float64) (B, Hkv, R, Kb). Blocks after the query's own have 0 or what a mean before it gives.
    """
    groups = rearrange(q.detach().to(means.dtype), "b (h g) r d -> b h g r d", h=means.shape[1])
    factor = float(q.shape[-1] ** -0.5) if scale is None else scale
    logits = torch.einsum("b h g r d, b h c d -> b h g r c", groups, means) * factor
    row = torch.arange(q.shape[2], device=q.device)
    position = row[None] + (q_offset.reshape(-1, 1) if isinstance(q_offset, Tensor) else q_offset)
    last = torch.arange(means.shape[2], device=q.device) * sizes.stride + sizes.window - 1
    hidden = last > position[:, None, None, :, None]
    # where no mean lies before the query yet, softmax gives NaN
    mass = logits.masked_fill_(hidden, -math.inf).softmax(-1).nan_to_num_(nan=0.0).sum(2)
    per_block = sizes.block // sizes.stride  # means that begin in a block; one more reaches into it
    room = blocks * per_block
    mass = torch.nn.functional.pad(mass, (1, 0))[..., : room + 1]
    mass = torch.nn.functional.pad(mass, (0, room + 1 - mass.shape[-1]))
    worth = mass.unfold(-1, per_block + 1, per_block).amax(-1)
    own = position[:, None, :, None] // sizes.block
    block = torch.arange(blocks, device=q.device)
    forced = (block < sizes.first) | ((block > own - sizes.local) & (block <= own))
    return worth.masked_fill(forced, math.inf)


def _packed(chosen: Tensor) -> Tensor:
    chosen = torch.nn.functional.pad(chosen, (0, -chosen.shape[-1] % _WORD)).unflatten(-1, (-1, _WORD))
    bit = torch.ones((), dtype=torch.int64, device=chosen.device) << torch.arange(_WORD, device=chosen.device)
    word = (chosen * bit).sum(-1)
    return torch.where(word >= 2 ** (_WORD - 1), word - 2**_WORD, word).int()  # the last bit is an int32's sign


def _by_group(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Any and all of 128 rows; rows that are missing at the end take no part."""
    missing = -chosen.shape[2] % QUERIES
    padded = [torch.nn.functional.pad(chosen, (0, 0, 0, missing), value=value) for value in (False, True)]
    some, every = (x.unflatten(2, (-1, QUERIES)) for x in padded)
    return some.any(3), every.all(3)


def _mask_layout(q: Tensor, k: Tensor, q_offset, kv_len, sizes: InfLLM) -> BoundLayout:
    def of_heads(x):
        repeats = isinstance(x, Tensor) and x.numel() > 1
        return x.reshape(-1).repeat_interleave(k.shape[1]) if repeats else x

    return causal().bind(
        q.shape[0] * k.shape[1],
        1,
        q.shape[2],
        k.shape[2],
        q_offset=of_heads(q_offset),
        kv_len=of_heads(kv_len),
        block_size=(QUERIES, sizes.block),
        device=q.device,
    )


def _bit_mod(words: Tensor, bound: BoundLayout) -> MaskModFn:
    """mask_mod that keeps the blocks of each query by its bits, (B * Hkv, Lq, words)."""
    (q_len, k_len), block = bound.seq_lengths, bound.block_size[1]
    row = below(q_len, words.device)
    word, column = below(k_len, words.device, block * _WORD), below(k_len, words.device, block)
    inner = bound.mask_mod

    def chosen_mask(b, h, q, kv):
        bits = words[b, row(q), word(kv)] >> (column(kv) & (_WORD - 1))
        return ((bits & 1) == 1) & inner(b, h, q, kv)

    return chosen_mask
