"""From q, k, v to the BlockMask that flex_attention runs: score, select, assemble."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from stem_flex import selectors
from stem_flex.budget import Budget, rule_of
from stem_flex.config import StemConfig
from stem_flex.layout import Layout
from stem_flex.plumbing.ambient import cast_as_sdpa, without_autocast
from stem_flex.plumbing.binding import BoundLayout
from stem_flex.plumbing.checks import check_config, check_qkv
from stem_flex.plumbing.implementation import resolve
from stem_flex.plumbing.mods import MaskModFn, of_blocks
from stem_flex.plumbing.recipes import with_recipe
from stem_flex.plumbing.sharded import by_heads
from stem_flex.plumbing.tables import BlockTables, block_classes, compact, table_shape
from stem_flex.score import bind_to
from stem_flex.select import select_blocks
from stem_flex.selectors import Selector


@by_heads
def stem_block_mask(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig | None = None,
    *,
    layout: Layout | BoundLayout | None = None,
    q_offset: int | Tensor = 0,
    prompt_len: int | Tensor | None = None,
    kv_len: int | Tensor | None = None,
    selector: str | Selector | None = None,
    budget: int | Tensor | Budget | None = None,
    impl: str = "auto",
    mask_mod: str = "layout",
    compute_q_blocks: bool = False,
) -> BlockMask:
    """Choose the key blocks that each query block attends to, by Stem.

    Every row of query blocks keeps its TPD budget of best blocks by OAM score (:func:`stem_flex.oam_scores`)
    among those the layout allows, and the forced ones: the first ``sink_blocks`` of its allowed range, the
    ``local_blocks`` up to its diagonal, and the blocks of its own positions. The result is for **compiled**
    flex_attention: eager flex_attention ignores block lists and would attend to everything.

    Args:
        q: (B, Hq, Lq, D), float16, bfloat16 or float32, any strides with a unit last one.
        k: (B, Hkv, Lk, D), the same dtype and device; Hq is a multiple of Hkv.
        v: (B, Hkv, Lk, Dv). DTensors spread by heads, ``Shard(1)``, give the mask of the rank's own heads.
        config: None means ``StemConfig()``.
        layout: structure of the mask (:mod:`stem_flex.layout`), None is causal; a bound one brings its offset and
            lengths with it.
        q_offset: keys before the first query (chunked prefill, prefix cache), int or int (B,), any value.
        prompt_len: tokens of the whole prompt, which sets the budgets; int or int (B,). None: up to the last
            query. Give it in chunked prefill, so that chunks spend what one-shot prefill spends. It is taken as
            given: padded queries may stand past it.
        kv_len: valid keys of a longer buffer, int or int (B,). None: all. Tensors on the CPU are checked as ints are;
            of CUDA tensors, whose check would wait for the device, the values must be right.
        selector: how block pairs are scored, by name or as an object (:mod:`stem_flex.selectors`). None: by Stem, with
            ``config`` to the letter; others bring settings of their own.
        budget: blocks to keep instead of the schedule's: an int, an int tensor (Qb,), (Hq, Qb) or (B, Hq, Qb), or
            any other rule of :mod:`stem_flex.budget`.
        impl: "triton", "torch", or "auto": Triton for CUDA tensors. Nothing falls back silently.
        mask_mod: "layout": the BlockMask's mask_mod is the layout's token mask. "exact": it also encodes the
            selection, B Hq Qb Kb bytes, for eager use, debugging and ``create_block_mask``.
        compute_q_blocks: also the transposed tables, which the backward pass needs.

    Returns:
        A BlockMask of shape (B, Hq, Lq, Lk) with partial and full blocks apart. Its attribute ``structure`` is
        the bound layout. Nothing waits for the device, no gradient flows through the choice. Under autocast the same
        mask comes out; only q, k, v of several dtypes are then cast to its dtype, as SDPA does.

    Raises:
        TypeError, ValueError: naming the argument, what was expected, what came, and the fix.
    """
    config = check_config(config)
    selector = selectors.resolve(selector, config)
    config = selector.configured(config)
    q, k, v = cast_as_sdpa(q, k, v, only_mixed=True)
    check_qkv(q, k, v)
    if mask_mod not in ("layout", "exact"):
        raise ValueError(f"mask_mod must be 'layout' or 'exact', got {mask_mod!r}")
    q, k, v = q.detach(), k.detach(), v.detach()
    bound = bind_to(q, k, layout, q_offset=q_offset, kv_len=kv_len, prompt_len=prompt_len, config=config)
    tables = _chosen(q, k, v, bound, config, selector, budget, resolve(impl, q))
    return assemble(tables, bound, exact=mask_mod == "exact", compute_q_blocks=compute_q_blocks)


def layout_block_mask(
    layout: Layout,
    B: int,
    H: int,
    Lq: int,
    Lk: int,
    *,
    q_offset: int | Tensor = 0,
    kv_len: int | Tensor | None = None,
    block_size: int | tuple[int, int] = 128,
    device: torch.device | str = "cpu",
    compute_q_blocks: bool = False,
) -> BlockMask:
    """The layout itself as a BlockMask: everything it allows, nothing chosen, without N x N.

    Equal to ``create_block_mask`` on the layout's token mask. B and H may be 1 where the layout does not
    depend on them.
    """
    block_size = (block_size, block_size) if isinstance(block_size, int) else block_size
    bound = layout.bind(B, H, Lq, Lk, q_offset=q_offset, kv_len=kv_len, block_size=block_size, device=device)
    classes = bound.dense_classes()
    width, partial_columns = table_shape(bound, bound.k_blocks)
    keep = (classes > 0).expand(B, H, -1, -1)
    return assemble(compact(keep, classes, width, partial_columns), bound, compute_q_blocks=compute_q_blocks)


def assemble(
    tables: BlockTables, bound: BoundLayout, *, exact: bool = False, compute_q_blocks: bool = False
) -> BlockMask:
    """The BlockMask of chosen blocks under a bound layout."""
    mask = tables.block_mask(bound.mask_mod, bound.seq_lengths, bound.block_size, compute_q_blocks)
    if exact:
        kept = of_blocks(block_classes(mask) > 0, bound.seq_lengths, bound.block_size)
        mask.mask_mod = _exact_mod(kept, bound.mask_mod)
    mask.structure = bound  # type: ignore[attr-defined]
    return mask


@without_autocast
def _chosen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bound: BoundLayout,
    config: StemConfig,
    selector: Selector,
    budget: int | Tensor | Budget | None,
    impl: str,
) -> BlockTables:
    """Score, then select. A selector's ``fused`` is the Triton backend of the pair, which holds no score matrix."""
    rule = rule_of(selector.budget if budget is None else budget, config)
    config = rule.configured(config)
    if impl == "triton" and selector.fused is not None:
        tables = selector.fused(q, k, v, bound, config, rule)
        if tables is not None:
            return tables
    given = {"impl": impl} if selector.has_kernels else {}
    scores = selector.scores(q, k, v, config, layout=bound, **given)
    return select_blocks(scores, bound, config, budget=rule, impl=impl)


@with_recipe
def _exact_mod(kept: MaskModFn, inner: MaskModFn) -> MaskModFn:
    def stem_mask(b, h, q, kv):
        return kept(b, h, q, kv) & inner(b, h, q, kv)

    return stem_mask
