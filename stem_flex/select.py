"""Which blocks to keep: exact top-k under a budget, united with the forced ones, as compact tables."""

from __future__ import annotations

import torch
from torch import Tensor

from stem_flex._check import check_config
from stem_flex._impl import resolve
from stem_flex.binding import HI, LO, OWN_HI, OWN_LO, BoundLayout
from stem_flex.budget import largest_budget
from stem_flex.classes import EMPTY
from stem_flex.config import StemConfig
from stem_flex.tables import BlockTables, compact, table_shape


def select_blocks(
    scores: Tensor,
    bound: BoundLayout,
    config: StemConfig | None = None,
    *,
    budget: int | Tensor | None = None,
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
        budget: instead of the schedule's: an int, or an int tensor (Qb,), (Hq, Qb) or (B, Hq, Qb). With a
            tensor on a GPU the tables are Kb wide, since its largest entry can't be read without waiting.
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
    row_budget, most_kept = budget_rows(bound, config, budget, *scores.shape[:2])
    width, partial_columns = table_shape(bound, most_kept)
    if resolve(impl, scores) == "triton":
        from stem_flex.kernels.ops import stem_select

        buffer, counts = stem_select(
            scores.float(),
            bound.rows,
            row_budget,
            bound.classes,
            sink=min(config.sink_blocks, bound.k_blocks),
            local=min(config.local_blocks, bound.k_blocks),
            partial_columns=partial_columns,
            width=width,
        )
        return BlockTables(buffer, counts, width, partial_columns, bound.k_blocks)
    classes = bound.dense_classes()
    allowed = (classes != EMPTY).expand(*scores.shape)
    keep = (top_blocks(scores, allowed, row_budget) | forced_blocks(bound, classes, config)) & allowed
    return compact(keep, classes, width, partial_columns)


def budget_rows(
    bound: BoundLayout, config: StemConfig, budget: int | Tensor | None, batch: int, heads: int
) -> tuple[Tensor, int]:
    """Every row's budget, int32 (1 or B, 1 or Hq, 1 or Qb), and the most blocks a row can keep."""
    if budget is None:
        rows = bound.budget(config)
        most = bound.k_blocks
        if bound.longest_prompt is not None:
            most = largest_budget(bound.longest_prompt, config)
    elif isinstance(budget, Tensor):
        rows = _checked_budget(budget, bound, batch, heads)
        readable = not (budget.is_cuda or torch.compiler.is_compiling())
        most = int(rows.max()) if readable else bound.k_blocks
    else:
        if isinstance(budget, bool) or not isinstance(budget, int):
            raise TypeError(f"budget must be an int or an int tensor, got {budget!r}")
        if budget < 1:
            raise ValueError(f"budget must be at least 1 block, got {budget}")
        budget = min(budget, bound.k_blocks)
        rows = torch.full((1, 1, bound.q_blocks), budget, dtype=torch.int32, device=bound.rows.device)
        most = budget
    own = -(-bound.block_size[0] // bound.block_size[1]) + 1
    return rows, min(bound.k_blocks, most + config.sink_blocks + config.local_blocks + own)


def _checked_budget(budget: Tensor, bound: BoundLayout, batch: int, heads: int) -> Tensor:
    if budget.is_floating_point() or budget.dtype == torch.bool:
        raise TypeError(f"budget must hold integers, got {budget.dtype}")
    rows = budget.reshape((1,) * (3 - budget.dim()) + tuple(budget.shape)) if budget.dim() <= 3 else budget
    fits = (
        rows.dim() == 3
        and rows.shape[0] in (1, batch)
        and rows.shape[1] in (1, heads)
        and rows.shape[2] in (1, bound.q_blocks)
    )
    if not fits:
        raise ValueError(
            f"budget must have shape ({bound.q_blocks},), ({heads}, {bound.q_blocks}) or ({batch}, {heads}, "
            f"{bound.q_blocks}), got {tuple(budget.shape)}"
        )
    if budget.device != bound.rows.device:
        raise ValueError(f"budget must be on q's device {bound.rows.device}, got {budget.device}")
    return rows.clamp(min=1, max=bound.k_blocks).to(torch.int32)


def top_blocks(scores: Tensor, allowed: Tensor, budget: Tensor) -> Tensor:
    """The ``budget`` best allowed blocks of each row, bool (B, H, Qb, Kb), in PyTorch."""
    order = _ordered(scores, allowed).argsort(dim=-1, descending=True, stable=True)
    kept = torch.arange(scores.shape[-1], device=scores.device) < budget[..., None]
    kept = kept.expand(scores.shape).contiguous()
    return torch.zeros_like(kept).scatter_(-1, order, kept) & allowed


def _ordered(scores: Tensor, allowed: Tensor) -> Tensor:
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
    rows = bound.rows[:, None, :, :, None]
    key = torch.arange(bound.k_blocks, dtype=torch.int32, device=rows.device)
    lo = rows[..., LO, :]
    if bound.classes is not None:  # the first allowed block may depend on the head
        some = classes != EMPTY
        lo = torch.where(some, key, bound.k_blocks).amin(-1, keepdim=True)
    sink = (key >= lo) & (key < lo + min(config.sink_blocks, bound.k_blocks))
    own_hi = rows[..., OWN_HI, :]
    local = (key >= own_hi - min(config.local_blocks, bound.k_blocks)) & (key < own_hi)
    own = (key >= rows[..., OWN_LO, :]) & (key < own_hi)
    return (sink | local | own) & (key < rows[..., HI, :])
