"""VecAttention's selection (AngelSlim): keys within a factor of the best for the mean query, by block.

t[I, j] is the scaled logit of the mean query of block I and key j. A row keeps the blocks that hold a key with
exp(t - largest t of the row) of at least 0.1, and its first and own blocks, which are not scored. The published
kernel takes maxima over groups of 256 keys and keeps single key columns; here the maximum is the row's, and blocks.

Cost: N^2 D / block, 0.4 % of dense attention, in one Triton kernel (:mod:`stem_flex.kernels.cells`): at 128K tokens of
32 heads it takes 3 ms of an H100, the whole selection 5. PyTorch alone goes through Qb N logits, 4 ms.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stem_flex.budget import FORCED
from stem_flex.config import StemConfig
from stem_flex.layout import Layout
from stem_flex.plumbing.binding import BoundLayout
from stem_flex.plumbing.classes import EMPTY
from stem_flex.plumbing.implementation import resolve
from stem_flex.plumbing.strips import strips
from stem_flex.selectors.shared import (
    block_means,
    filled,
    first_and_own,
    hide,
    last_key,
    operand,
    prepare,
    product,
    spans_of,
)

_LOGITS_AT_ONCE = 2**27


def scores(
    q: Tensor, k: Tensor, v: Tensor, config: StemConfig | None = None, *,
    layout: Layout | BoundLayout | None = None, q_offset: int | Tensor = 0, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """exp(best key of the block - best key of the row), in (0, 1]; the first and own blocks are lifted by FORCED.

    Arguments, result and errors as :func:`.antidiagonals.xattention`; a key counts where some query of the row sees it.
    """
    config, bound = prepare(q, k, v, config, layout, q_offset)
    best = block_peaks(q, k, bound, resolve(impl, q))
    kept = first_and_own(bound, config)
    scored = best.masked_fill(kept | (bound.dense_classes() == EMPTY), -math.inf)
    share = (scored - scored.amax(-1, keepdim=True)).exp().nan_to_num(nan=0.0)
    return hide(share + FORCED * kept, bound)


def block_peaks(q: Tensor, k: Tensor, bound: BoundLayout, impl: str = "torch") -> Tensor:
    """Largest logit of the mean query and a key of each block, float32 (float64) (B, Hq, Qb, Kb); -inf for none."""
    q_block, k_block = bound.block_size
    start, end = (x.unflatten(1, (-1, q_block)) for x in spans_of(bound, "vecattention"))
    start, end = torch.where(end > start, start, bound.seq_lengths[1]).amin(-1), end.amax(-1)
    queries, keys = block_means(q, q_block, bound.query_start, bound.query_end), operand(k)
    if impl == "triton":
        from stem_flex.kernels.selector_ops import Cut, Operands, cell_peaks

        scale = q.shape[-1] ** -0.5
        operands = Operands(queries.to(q.dtype), k, (start, end), (None,) * 4, Cut(1, 1, k_block), scale)
        return cell_peaks(operands) * math.log(2)
    start, end = start[:, None, :, None], end[:, None, :, None]
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    best = torch.full((*q.shape[:2], bound.q_blocks, bound.k_blocks), -math.inf, dtype=kind, device=q.device)
    for rows in strips(bound.q_blocks, q.shape[0] * q.shape[1] * k.shape[2], _LOGITS_AT_ONCE):
        seen = last_key(bound, rows.stop * q_block)
        logits = product(queries[:, :, rows], keys[:, :, :seen], q.shape[-1] ** -0.5)
        if not bound.layout.plain_causal:  # else no key beside the own blocks is hidden
            key = torch.arange(seen, dtype=torch.int32, device=q.device)
            logits.masked_fill_((key < start[:, :, rows]) | (key >= end[:, :, rows]), -math.inf)
        found = filled(logits, 3, k_block, -math.inf).unflatten(3, (-1, k_block)).amax(-1)
        best[:, :, rows, : found.shape[-1]] = found.to(kind)
    return best
