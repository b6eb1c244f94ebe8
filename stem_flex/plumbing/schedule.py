"""The schedules of Token Position-Decay in exact arithmetic, for lengths that only the device may know."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stem_flex.config import StemConfig

_PAPER_FLOOR = 54  # the paper's smallest k_start, in blocks


def row_budget(position: Tensor, prompt_blocks: Tensor, config: StemConfig) -> Tensor:
    """:func:`stem_flex.tpd_budget` of a prompt of ``prompt_blocks`` blocks at row ``position``, elementwise.

    Takes lengths that only the device knows (padding, documents), so nothing is read back.

    Args:
        position: int, any shape.
        prompt_blocks: int, the same shape; 0 (a row without a prompt) gives 1.
        config: the schedule, k_start and mu.

    Returns:
        int32, the shape of ``position``.
    """
    k_start = -1.0 if config.k_start is None else float(min(config.k_start, 2**31 - 1))
    fraction = isinstance(config.k_start, float)
    return _row_budget(position, prompt_blocks, config.schedule, k_start, fraction, config.mu)


# An opaque operator: a compiler that fused these float64 steps could contract a product and a sum that the
# schedule rounds apart, and move a row across an integer.
@torch.library.custom_op("stem_flex::row_budget", mutates_args=())
def _row_budget(
    position: Tensor, prompt_blocks: Tensor, schedule: str, k_start: float, fraction: bool, mu: float
) -> Tensor:
    n = prompt_blocks.double()
    i = position.double()
    if schedule == "paper":
        start = torch.where(n <= 128, 0.2 * n, 0.1 * n).clamp(min=_PAPER_FLOOR)
        kept = torch.ceil(start - start * (1 - mu) * i / n.clamp(min=1))
        return kept.clamp(min=1).int()
    start = _operator_start(n, schedule, k_start, fraction)
    steps = (n - start).clamp(min=2)
    kept = _linspace(start, mu * start, steps, i - start).floor()
    kept = torch.where((i < start) | (n - start <= 1), start, kept)
    return torch.minimum(kept, start).clamp(min=1).int()


@_row_budget.register_fake
def _(position, prompt_blocks, schedule, k_start, fraction, mu):
    return torch.empty_like(position, dtype=torch.int32)


def largest_budget(num_blocks: int, config: StemConfig) -> int:
    """The most blocks a row of any prompt of up to ``num_blocks`` blocks keeps: what tables are sized by."""
    n = max(num_blocks, 1)
    if config.schedule == "paper":
        return math.ceil(max(_PAPER_FLOOR, 0.1 * n))
    if config.schedule == "fixed":
        assert config.k_start is not None
        return config.k_start if isinstance(config.k_start, int) else max(1, int(config.k_start * n))
    if n < 56:
        return n
    return max(55, int(0.2 * n + 30)) if n < 160 else max(61, int(0.1 * n) + 30)


def _operator_start(n: Tensor, schedule: str, k_start: float, fraction: bool) -> Tensor:
    if schedule == "fixed":
        start = (k_start * n).floor() if fraction else torch.full_like(n, k_start)
        return start.clamp(min=1)
    middle, long = (0.2 * n + 30).floor(), (0.1 * n).floor() + 30
    if schedule == "envelope":  # the operator's k peaks at 55 blocks (55) and at 155 to 159 (61)
        middle, long = middle.clamp(min=55), long.clamp(min=61)
    return torch.where(n < 56, n, torch.where(n < 160, middle, long))


def _linspace(start: Tensor, end: Tensor, steps: Tensor, index: Tensor) -> Tensor:
    # Entry by entry what torch.linspace gives in float64: from both ends inwards, multiply and add fused.
    step = (end - start) / (steps - 1)
    first = _fused_multiply_add(step, index, start)
    second = _fused_multiply_add(-step, steps - 1 - index, end)
    return torch.where(index < (steps / 2).floor(), first, second)


def _fused_multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    # a * b + c rounded once, from exact products (Dekker) and exact sums (Knuth): PyTorch has no fused op.
    product, product_error = _two_product(a, b)
    total = product + c
    shadow = total - product
    total_error = (product - (total - shadow)) + (c - shadow)
    return total + (total_error + product_error)


def _two_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    product = a * b
    a_high, b_high = _upper_half(a), _upper_half(b)
    a_low, b_low = a - a_high, b - b_high
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    return product, error


def _upper_half(x: Tensor) -> Tensor:
    scaled = x * 134217729.0  # 2**27 + 1 splits a float64's 53 bits in two
    return scaled - (scaled - x)
