"""Which blocks to keep: exact top-k under a budget, united with the forced ones, as compact tables."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stem_flex.budget import Budget, rule_of
from stem_flex.config import StemConfig
from stem_flex.plumbing.binding import BoundLayout
from stem_flex.plumbing.checks import check_config
from stem_flex.plumbing.classes import EMPTY
from stem_flex.plumbing.implementation import resolve
from stem_flex.plumbing.tables import BlockTables, compact, table_shape


def select_blocks(
    scores: Tensor,
    bound: BoundLayout,
    config: StemConfig | None = None,
    *,
    budget: int | Tensor | Budget | None = None,
    impl: str = "auto",
) -> BlockTables:
    """Keep the best blocks of every row by any scores.

    A row's candidates are its allowed blocks. Its ``budget`` best are kept, forced blocks ranked like the
    others, then the forced ones are united with them. Equal scores go to the lower index, -0.0 equals 0.0,
    NaN ranks below -inf, and a budget of at least all candidates keeps all.

    Args:
        scores: float (B, Hq, Qb, Kb); what stands outside the allowed pairs is ignored.
        bound: a bound layout, see :meth:`stem_flex.layout.Layout.bind`.
        config: sink and local blocks, and the budget's schedule; None means ``StemConfig()``.
        budget: instead of the schedule's: an int, an int tensor (Qb,), (Hq, Qb) or (B, Hq, Qb), see
            :class:`stem_flex.budget.Blocks`, or any other rule of `stem_flex.budget`.
        impl: "triton", "torch", or "auto": Triton for CUDA tensors.

    Raises:
        TypeError, ValueError: naming the argument, what was expected, what came.
    """
    config = check_config(config)
    expected = (bound.q_blocks, bound.k_blocks)
    if scores.dim() != 4 or tuple(scores.shape[2:]) != expected:
        raise ValueError(f"scores must have shape (B, Hq, {expected[0]}, {expected[1]}), got {tuple(scores.shape)}")
    for name, size, held in zip("BH", scores.shape, (bound.rows.shape[0], 1), strict=False):
        if held not in (1, size):
            raise ValueError(f"scores must have {name}={held}, as the bound layout, got {size}")
    rule = rule_of(budget, config)
    if rule.needs_scores:
        scores = scores.float().masked_fill(bound.dense_classes() == EMPTY, -math.inf)
    counts = rule.counts(bound, config, scores.shape[0], scores.shape[1], scores)
    width, partial_columns = shape_of(bound, config, rule)
    if resolve(impl, scores) == "triton":
        from stem_flex.kernels.ops import stem_select

        buffer, kept = stem_select(
            scores.float(),
            bound.rows,
            counts,
            bound.classes,
            sink=min(config.sink_blocks, bound.k_blocks),
            local=min(config.local_blocks, bound.k_blocks),
            partial_columns=partial_columns,
            width=width,
        )
        return BlockTables(buffer, kept, width, partial_columns, bound.k_blocks)
    classes = bound.dense_classes()
    allowed = (classes != EMPTY).expand(*scores.shape)
    keep = (top_blocks(scores, allowed, counts) | forced_blocks(bound, classes, config)) & allowed
    return compact(keep, classes, width, partial_columns)


def shape_of(bound: BoundLayout, config: StemConfig, rule: Budget) -> tuple[int, int]:
    """(width, partial_columns) of tables that hold what ``rule`` keeps and the forced blocks."""
    own = -(-bound.block_size[0] // bound.block_size[1]) + 1
    most = rule.most(bound, config) + config.sink_blocks + config.local_blocks + own
    return table_shape(bound, min(bound.k_blocks, most))


def top_blocks(scores: Tensor, allowed: Tensor, budget: Tensor) -> Tensor:
    """The ``budget`` best allowed blocks of each row, bool (B, H, Qb, Kb), in PyTorch."""
    order = order_of(scores, allowed).argsort(dim=-1, descending=True, stable=True)
    kept = torch.arange(scores.shape[-1], device=scores.device) < budget[..., None]
    kept = kept.expand(scores.shape).contiguous()
    return torch.zeros_like(kept).scatter_(-1, order, kept) & allowed


def order_of(scores: Tensor, allowed: Tensor) -> Tensor:
    """Integers in the order of the scores: forbidden < NaN < -inf < ... < -0.0 = 0.0 < ... < inf."""
    wide = scores.dtype == torch.float64
    kind = torch.int64 if wide else torch.int32
    bits = (scores if wide else scores.float()).add(0.0).view(kind)  # -0.0 + 0.0 is 0.0
    lowest = torch.iinfo(kind).min
    order = torch.where(bits < 0, bits ^ torch.iinfo(kind).max, bits)
    order = torch.where(scores.isnan(), lowest + 1, order)
    return torch.where(allowed, order, lowest)


def forced_blocks(bound: BoundLayout, classes: Tensor, config: StemConfig) -> Tensor:
    """Sink, local and own blocks of each row, bool (1 or B, 1 or H, Qb, Kb), before the mask's own limits."""
    lo, hi, own_lo, own_hi = (x[:, None, :, None] for x in (bound.lo, bound.hi, bound.own_lo, bound.own_hi))
    key = torch.arange(bound.k_blocks, dtype=torch.int32, device=bound.rows.device)
    if bound.classes is not None:  # the first allowed block may depend on the head
        some = classes != EMPTY
        lo = torch.where(some, key, bound.k_blocks).amin(-1, keepdim=True)
    sink = (key >= lo) & (key < lo + min(config.sink_blocks, bound.k_blocks))
    local = (key >= own_hi - min(config.local_blocks, bound.k_blocks)) & (key < own_hi)
    own = (key >= own_lo) & (key < own_hi)
    return (sink | local | own) & (key < hi)
