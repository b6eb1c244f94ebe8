"""How many key blocks each row of query blocks may keep: Token Position-Decay (TPD), and rules to give instead."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stem_flex.config import StemConfig
from stem_flex.plumbing.binding import BoundLayout
from stem_flex.plumbing.checks import check_config

_PAPER_FLOOR = 54  # the paper's smallest k_start, in blocks


def tpd_budget(num_blocks: int, config: StemConfig | None = None, *, device=None) -> Tensor:
    """Blocks kept by each row of a prompt of ``num_blocks`` blocks, before forced blocks and causal clipping.

    With k = k_start(num_blocks) and m = num_blocks - k:

    - ``"operator"``: k = n below 56 blocks, int(0.2 n + 30) below 160, int(0.1 n) + 30 above. Rows i < k keep
      k, row i >= k keeps floor(linspace(k, mu k, m)[i - k]) in float64, between 1 and k; k everywhere if m <= 1.
    - ``"envelope"``: the operator's decay from the largest k of any prompt up to this length: never falls.
    - ``"paper"``: k = max(54, 0.2 n) up to 128 blocks, max(54, 0.1 n) above, not rounded; row i keeps
      ceil(k - k (1 - mu) i / n). Not clipped to n: 54 blocks of a 10-block prompt are all of it.
    - ``"fixed"``: the operator's decay from ``config.k_start`` (blocks, or a fraction of n, at least 1).

    Args:
        num_blocks: blocks of the whole prompt, not of a chunk of it.
        config: None means ``StemConfig()``.
        device: of the result; None is the CPU.

    Returns:
        int32 (num_blocks,).

    Raises:
        TypeError, ValueError: ``num_blocks`` is not a positive int.
    """
    if isinstance(num_blocks, bool) or not isinstance(num_blocks, int):
        raise TypeError(f"num_blocks must be an int, got {num_blocks!r}")
    if num_blocks < 1:
        raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
    device = torch.device("cpu") if device is None else device  # None is not the default device
    position = torch.arange(num_blocks, dtype=torch.int32, device=device)
    return row_budget(position, torch.full_like(position, num_blocks), check_config(config))


def row_budget(position: Tensor, prompt_blocks: Tensor, config: StemConfig) -> Tensor:
    """:func:`tpd_budget` of a prompt of ``prompt_blocks`` blocks at row ``position``, elementwise.

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


@functools.lru_cache(maxsize=1024)
def causal_density(num_blocks: int, config: StemConfig) -> float:
    """Largest part of a causal prompt's block pairs that its budget and forced blocks keep, 1.0 = dense."""
    candidates = torch.arange(1, num_blocks + 1, device="cpu")
    kept = tpd_budget(num_blocks, config) + config.sink_blocks + config.local_blocks
    return int(torch.minimum(kept, candidates).sum()) / int(candidates.sum())


class Budget:
    """A rule for how many blocks each row keeps, the best scores first. The forced blocks are united with them.

    One object serves the mask, the attention, transformers and the benchmarks: ``budget=`` takes it everywhere.
    """

    def counts(
        self, bound: BoundLayout, config: StemConfig, batch: int, heads: int, scores: Tensor | None = None
    ) -> Tensor:
        """Blocks that each row keeps, int32, broadcastable to (batch, heads, Qb). Nothing waits for the device.

        Args:
            bound: the layout at the sizes of q and k.
            config: the caller's options.
            batch, heads: of q.
            scores: float32 (batch, heads, Qb, Kb), -inf where the layout allows nothing; given if ``needs_scores``.
        """
        raise NotImplementedError

    def most(self, bound: BoundLayout, config: StemConfig) -> int:
        """No row's count is larger. Known without the device: tables are as wide."""
        return bound.k_blocks

    needs_scores = False


class Schedule(Budget):
    """The configuration's own schedule, :func:`tpd_budget`, of the prompt that each row belongs to."""

    def counts(self, bound, config, batch, heads, scores=None):
        return bound.remembered(config, lambda: row_budget(bound.position, bound.prompt_blocks, config)[:, None])

    def most(self, bound, config):
        return bound.k_blocks if bound.longest_prompt is None else largest_budget(bound.longest_prompt, config)


@dataclass(frozen=True, eq=False)
class Blocks(Budget):
    """Counts of blocks given by the caller.

    Args:
        blocks: an int of at least 1, or an int tensor (Qb,), (Hq, Qb) or (B, Hq, Qb) on q's device. With a tensor
            on a GPU the tables are Kb wide, since its largest entry can't be read without waiting.
    """

    blocks: int | Tensor

    def __post_init__(self) -> None:
        given = self.blocks
        if isinstance(given, Tensor):
            if given.is_floating_point() or given.dtype == torch.bool:
                raise TypeError(f"budget must hold integers, got {given.dtype}")
            return
        if isinstance(given, bool) or not isinstance(given, int):
            raise TypeError(f"budget must be an int or an int tensor, got {given!r}; or a rule of stem_flex.budget")
        if given < 1:
            raise ValueError(f"budget must be at least 1 block, got {given}")

    def counts(self, bound, config, batch, heads, scores=None):
        given = self.blocks
        if not isinstance(given, Tensor):
            kept = min(given, bound.k_blocks)
            return torch.full((1, 1, bound.q_blocks), kept, dtype=torch.int32, device=bound.rows.device)
        rows = given.reshape((1,) * (3 - given.dim()) + tuple(given.shape)) if given.dim() <= 3 else given
        sizes = zip(rows.shape, (batch, heads, bound.q_blocks), strict=False)
        if rows.dim() != 3 or any(have not in (1, size) for have, size in sizes):
            raise ValueError(
                f"budget must have shape ({bound.q_blocks},), ({heads}, {bound.q_blocks}) or ({batch}, {heads}, "
                f"{bound.q_blocks}), got {tuple(given.shape)}"
            )
        if given.device != bound.rows.device:
            raise ValueError(f"budget must be on q's device {bound.rows.device}, got {given.device}")
        return rows.clamp(min=1, max=bound.k_blocks).to(torch.int32)

    def most(self, bound, config):
        if not isinstance(self.blocks, Tensor):
            return min(self.blocks, bound.k_blocks)
        if self.blocks.is_cuda or torch.compiler.is_compiling():
            return bound.k_blocks
        return min(max(int(self.blocks.max()), 1), bound.k_blocks)


def rule_of(budget: int | Tensor | Budget | None) -> Budget:
    """The rule that a ``budget=`` argument stands for; None is the configuration's own."""
    if budget is None:
        return _SCHEDULE
    return budget if isinstance(budget, Budget) else Blocks(budget)


_SCHEDULE = Schedule()
