"""CoSA's selection (AngelSlim): antidiagonal peaks of each block, blocks with a row's peak first.

From XAttention's scaled antidiagonal sums: e[a, J] = exp(largest in J - largest of the row a), summed over the rows
of a query block. A block is hot where some e is at least 0.999. Blocks are taken in the order first and own block,
hot ones, others, each by mass, while the mass taken before is less than ``top_p`` (0.8) of the row's; the first and
the own block always. Hot blocks are only favoured: they fall out once the mass is held.

Cost: XAttention's products and half of its traffic; at the published stride of 8 some 20 ms of an H100 at 128K tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stem_flex.config import StemConfig
from stem_flex.layout import Layout
from stem_flex.plumbing.binding import BoundLayout
from stem_flex.selectors.rules import FORCED, PREFERRED
from stem_flex.selectors.shared import filled, hide, prepare
from stem_flex.selectors.xattention import cells, first_and_own

HOT = 0.999


def scores(
    q: Tensor, k: Tensor, v: Tensor, config: StemConfig | None = None, *,
    layout: Layout | BoundLayout | None = None, q_offset: int | Tensor = 0,
) -> Tensor:  # fmt: skip
    """Share of each block in its row's mass, hot blocks lifted by 2, the first and the own block by 4.

    Args:
        q: (B, Hq, Lq, D); k: (B, Hkv, Lk, D); v: (B, Hkv, Lk, Dv), not looked at.
        config: its stride and block sizes count; None means ``StemConfig()``.
        layout, q_offset: as in :func:`stem_flex.oam_scores`, of one interval of keys for each query.

    Returns:
        float32 (B, Hq, Qb, Kb), -inf where the layout allows nothing.

    Raises:
        ValueError: a layout from a mask_mod or a BlockMask.
    """
    config, bound = prepare(q, k, v, config, layout, q_offset)
    per_row, per_column = config.query_block // config.stride, config.key_block // config.stride
    mass = torch.zeros(*q.shape[:2], bound.q_blocks, bound.k_blocks, dtype=torch.float32, device=q.device)
    hot = torch.zeros_like(mass, dtype=torch.bool)
    for rows, logits, empty in cells(q, k, bound, config, "cosa"):
        peak = filled(logits, 3, per_column, -torch.inf).unflatten(3, (-1, per_column)).amax(-1)
        wide = peak if peak.dtype == torch.float64 else peak.float()
        relative = (wide - wide.amax(-1, keepdim=True)).exp()
        relative = relative if empty is None else relative.masked_fill(empty, 0.0)
        relative = relative.unflatten(2, (-1, per_row))
        total = relative.sum(3)
        seen = slice(0, total.shape[-1])
        mass[:, :, rows, seen] = total / total.sum(-1, keepdim=True).clamp(min=1e-20)
        hot[:, :, rows, seen] = (relative >= HOT).any(3)
    return hide(mass + PREFERRED * hot + FORCED * first_and_own(bound, config), bound)
