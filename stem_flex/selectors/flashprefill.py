"""FlashPrefill (arXiv 2603.06199, V2 2608.19758): every query against the mean key of each block.

With t[i, J] the scaled logit of query i and the mean key of block J, visible to i once i sees all of J, a row's score
is the sum over its queries of exp(t[i, J]), divided by the row's sum. A row keeps blocks from ``alpha`` of its best
one's score (0.2; V2: 0.1), its first two and last four blocks, and everything in the prompt's last rows (2; V2: 8).
No sort. V2 also corrects the output by what the dropped blocks' means would give; that is the attention's part, not
the selection's.

Cost: N^2 D / block, 0.4 % of dense attention, in one Triton kernel; PyTorch alone would move some 40 bytes a logit,
30 ms of an H100 at 128K tokens of 32 heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stem_flex.config import StemConfig
from stem_flex.layout import Layout
from stem_flex.plumbing.binding import BoundLayout
from stem_flex.plumbing.geometry import Spans
from stem_flex.plumbing.implementation import resolve
from stem_flex.plumbing.strips import strips
from stem_flex.selectors.shared import block_means, filled, hide, last_key, operand, prepare, product, spans_of

_LOGITS_AT_ONCE = 2**26


def scores(
    q: Tensor, k: Tensor, v: Tensor, config: StemConfig | None = None, *,
    layout: Layout | BoundLayout | None = None, q_offset: int | Tensor = 0, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Share of each block in its row's sum of exponentials, 0 where no query of the row sees all of the block.

    Arguments, result and errors as :func:`.antidiagonals.xattention`.
    """
    config, bound = prepare(q, k, v, config, layout, q_offset)
    return hide(row_sums(q, k, bound, resolve(impl, q)).softmax(-1).nan_to_num(nan=0.0), bound)


def row_sums(q: Tensor, k: Tensor, bound: BoundLayout, impl: str = "torch") -> Tensor:
    """Logarithm of the sum over a row's queries of exp(t), (B, Hq, Qb, Kb); -inf where none sees all of a block."""
    q_block, k_block = bound.block_size
    spans = spans_of(bound, "flashprefill")
    keys = block_means(k, k_block, bound.key_start, bound.key_end)
    lo, hi = whole_blocks(bound, spans)
    if impl == "triton":
        from stem_flex.kernels.selector_ops import Cut, Operands, query_logs

        scale = q.shape[-1] ** -0.5
        found = query_logs(Operands(q, keys.to(q.dtype), (lo, hi), (None,) * 4, Cut(1, q_block, 1), scale))
        return found * math.log(2)
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    found = torch.full((*q.shape[:2], bound.q_blocks, bound.k_blocks), -math.inf, dtype=kind, device=q.device)
    for rows in strips(bound.q_blocks, q.shape[0] * q.shape[1] * q_block * bound.k_blocks, _LOGITS_AT_ONCE):
        part = slice(rows.start * q_block, min(rows.stop * q_block, q.shape[2]))
        seen = -(-last_key(bound, part.stop) // k_block)
        logits = product(operand(q[:, :, part]), keys[:, :, :seen], q.shape[-1] ** -0.5)
        block = torch.arange(seen, dtype=torch.int32, device=q.device)
        logits.masked_fill_((block < lo[:, None, part, None]) | (block >= hi[:, None, part, None]), -math.inf)
        logits = filled(logits, 2, q_block, -math.inf)
        found[:, :, rows, :seen] = logits.unflatten(2, (-1, q_block)).to(kind).logsumexp(3)
    return found


def whole_blocks(bound: BoundLayout, spans: Spans) -> tuple[Tensor, Tensor]:
    """Blocks [lo, hi) of which a query sees all real keys, int32 (1 or B, Qb * query block); empty where none."""
    length, block = bound.seq_lengths[1], bound.block_size[1]
    first = torch.arange(0, length, block, dtype=torch.int32, device=bound.rows.device)[None]
    last = (first + block).clamp(max=length)
    if bound.key_start is not None and bound.key_end is not None:
        start, end = bound.key_start[:, None], bound.key_end[:, None]
        # without a real key: before them, a block that no span reaches back to; after them, one that none ends in
        first = torch.where(last > start, torch.maximum(first, start), first)
        last = torch.where(first < end, torch.minimum(last, end), length + 1)
    lo, hi = torch.broadcast_tensors(spans.start, spans.end)
    batch = max(lo.shape[0], first.shape[0])
    first, last, lo, hi = (x.expand(batch, -1).contiguous() for x in (first, last, lo, hi))
    lo = torch.searchsorted(first, lo, out_int32=True)
    return lo, torch.searchsorted(last, hi, right=True, out_int32=True)
