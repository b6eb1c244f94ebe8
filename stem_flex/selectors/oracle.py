"""Oracles, as dear as dense attention: what it really gives each block, or loses without it. Yardsticks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stem_flex.config import StemConfig
from stem_flex.layout import Layout
from stem_flex.plumbing.binding import BoundLayout
from stem_flex.plumbing.checks import check_qkv
from stem_flex.plumbing.implementation import resolve
from stem_flex.selectors.shared import hide, prepare, product, spans_of


def scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig | None = None,
    *,
    layout: Layout | BoundLayout | None = None,
    q_offset: int | Tensor = 0,
) -> Tensor:
    """The largest attention mass that a token of the query block gives the key block, in dense attention.

    Args:
        q: (B, Hq, Lq, D); k: (B, Hkv, Lk, D); v: (B, Hkv, Lk, Dv), not looked at.
        config: its block sizes count; None means ``StemConfig()``.
        layout: None (causal) or ``causal()``.
        q_offset: keys before the first query, an int.

    Returns:
        float32 (B, Hq, Qb, Kb), -inf above the diagonal.

    Raises:
        ValueError: another layout.
    """
    config = config or StemConfig()
    check_qkv(q, k, v)
    if isinstance(layout, BoundLayout):
        layout, q_offset = layout.layout, layout.geometry.q_offset
    if layout is not None and not layout.plain_causal:
        raise ValueError(f"layout must be None or causal() for the oracle, got {type(layout).__name__}")
    if isinstance(q_offset, Tensor):
        raise ValueError("q_offset must be an int for the oracle, got a tensor")
    block = (config.query_block, config.key_block)
    _, peak = block_mass(q, k, block, q_offset=q_offset)
    rows = torch.arange(peak.shape[2], device=q.device)[:, None] * block[0] + block[0] - 1 + q_offset
    hidden = torch.arange(peak.shape[3], device=q.device) * block[1] > rows.clamp(max=q_offset + q.shape[2] - 1)
    return peak.masked_fill(hidden, -math.inf)


def block_mass(
    q: Tensor, k: Tensor, block: tuple[int, int], *, q_offset: int = 0, scale: float | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Mass of dense causal attention on every block: mean and largest over the query block's tokens.

    Goes through the queries block by block; nothing of size Lq x Lk is held.

    Returns:
        float32 (B, Hq, Qb, Kb) twice; the mean's rows sum to 1. Zero where causality forbids.
    """
    factor = float(q.shape[-1] ** -0.5) if scale is None else scale
    if resolve(impl, q) == "triton":
        return _by_kernels(q, k, block, q_offset, factor)
    batch, heads, q_len, _ = q.shape
    k_len, (q_block, k_block) = k.shape[2], block
    blocks = -(-q_len // q_block), -(-k_len // k_block)
    mean = torch.zeros(batch, heads, *blocks, dtype=torch.float32, device=q.device)
    peak = torch.zeros_like(mean)
    for row in range(blocks[0]):
        part = slice(row * q_block, min((row + 1) * q_block, q_len))
        end = min(k_len, q_offset + part.stop)
        keys = k[:, :, :end].float().repeat_interleave(heads // k.shape[1], 1)
        logits = q[:, :, part].float() @ keys.mT * factor
        positions = torch.arange(part.start, part.stop, device=q.device)[:, None] + q_offset
        weights = logits.masked_fill_(torch.arange(end, device=q.device) > positions, -math.inf).softmax(-1)
        weights = torch.nn.functional.pad(weights, (0, -end % k_block))
        mass = weights.unflatten(-1, (-1, k_block)).sum(-1)
        mean[:, :, row, : mass.shape[-1]] = mass.mean(2)
        peak[:, :, row, : mass.shape[-1]] = mass.amax(2)
    return mean, peak


def _by_kernels(q: Tensor, k: Tensor, block: tuple[int, int], q_offset: int, scale: float) -> tuple[Tensor, Tensor]:
    from stem_flex.kernels.selector_ops import Cut, Operands, cell_mass

    (q_block, k_block), q_len, k_len = block, q.shape[2], k.shape[2]
    query = torch.arange(-(-q_len // q_block) * q_block, dtype=torch.int32, device=q.device)
    end = torch.where(query < q_len, (query + q_offset + 1).clamp(max=k_len), 0)[None]
    operands = Operands(q, k, (torch.zeros_like(end), end), (None,) * 4, Cut(1, q_block, k_block), scale)
    total, peak = cell_mass(operands, q_offset)
    return total / (q_len - query[::q_block]).clamp(max=q_block)[:, None], peak


def error_scores(
    q: Tensor, k: Tensor, v: Tensor, config: StemConfig | None = None, *,
    layout: Layout | BoundLayout | None = None, q_offset: int | Tensor = 0,
) -> Tensor:  # fmt: skip
    """How much the output of a query block changes when the key block alone is left out: a ceiling for one block.

    With p the softmax's mass of the block for a query, o its output and o_J the block's part of it, leaving it out
    changes the output by (o_J - p o) / (1 - p); the score is the root mean square of its length over the query
    block's tokens. Where nothing else is visible (p = 1) all of o is lost. Costs more than dense attention.

    Args:
        q: (B, Hq, Lq, D); k: (B, Hkv, Lk, D); v: (B, Hkv, Lk, Dv).
        config: its block sizes count; None means ``StemConfig()``.
        layout, q_offset: as in :func:`stem_flex.oam_scores`, of one interval of keys for each query.

    Returns:
        float32 (B, Hq, Qb, Kb), -inf where the layout allows nothing.

    Raises:
        ValueError: a layout from a mask_mod or a BlockMask.
    """
    config, bound = prepare(q, k, v, config, layout, q_offset)
    (q_block, k_block), length = bound.block_size, k.shape[2]
    start, end = spans_of(bound, "oracle-error")
    key = torch.arange(length, dtype=torch.int32, device=q.device)
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    found = torch.zeros(*q.shape[:2], bound.q_blocks, bound.k_blocks, dtype=kind, device=q.device)
    values = torch.nn.functional.pad(v.detach().to(kind), (0, 0, 0, -length % k_block)).unflatten(2, (-1, k_block))
    group = q.shape[1] // k.shape[1]
    for head in range(q.shape[1]):
        keys, parts = k[:, head // group : head // group + 1].to(kind), values[:, head // group]
        for row in range(bound.q_blocks):
            part = slice(row * q_block, min((row + 1) * q_block, q.shape[2]))
            logits = product(q[:, head : head + 1, part].to(kind), keys, q.shape[-1] ** -0.5)[:, 0]
            hidden = (key < start[:, part, None]) | (key >= end[:, part, None])
            weights = logits.masked_fill_(hidden, -math.inf).softmax(-1).masked_fill_(hidden, 0.0)
            weights = torch.nn.functional.pad(weights, (0, -length % k_block)).unflatten(2, (-1, k_block))
            mass = weights.sum(-1)[..., None]
            outputs = torch.einsum("b i j t, b j t d -> b i j d", weights, parts)
            output = outputs.sum(2, keepdim=True)
            change = (outputs - mass * output) / (1 - mass).clamp(min=1e-6)
            change = torch.where(mass > 1 - 1e-6, output.expand_as(change), change)
            real = (~hidden).any(-1).sum(-1).clamp(min=1)
            found[:, head, row] = (change.square().sum((1, 3)) / real[:, None]).sqrt()
    return hide(found, bound)
