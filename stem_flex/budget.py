"""How many key blocks each row of query blocks may keep: Token Position-Decay (TPD), and rules to give instead."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stem_flex.config import StemConfig
from stem_flex.plumbing.binding import BoundLayout
from stem_flex.plumbing.checks import check_config, check_positive
from stem_flex.plumbing.schedule import largest_budget, row_budget
from stem_flex.plumbing.strips import strips

PREFERRED, FORCED = 4.0, 8.0
"""Lifts of blocks that stand above any share of mass, and above those: see :class:`Coverage`."""


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


@functools.lru_cache(maxsize=1024)
def causal_density(num_blocks: int, config: StemConfig) -> float:
    """Largest part of a causal prompt's block pairs that its budget and forced blocks keep, 1.0 = dense."""
    candidates = torch.arange(1, num_blocks + 1, device="cpu")
    kept = tpd_budget(num_blocks, config) + config.sink_blocks + config.local_blocks
    return int(torch.minimum(kept, candidates).sum()) / int(candidates.sum())


SLACK = 32
"""A coarse sketch proposes a block that scores above the threshold divided by this, or by its halves until at most
:meth:`Mass.proposed` blocks of the row do."""

PROPOSED = 256
"""Blocks of a row that a coarse sketch may propose, or the budget's cap where that is more."""


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

    def configured(self, config: StemConfig) -> StemConfig:
        """``config`` for the scores that this rule is to read: every pair's, unless it is a threshold that a coarse
        sketch can propose blocks for."""
        return config if config.coarse is None else _whole(config)

    needs_scores = False


@functools.lru_cache(maxsize=256)
def _whole(config: StemConfig) -> StemConfig:
    return replace(config, coarse=None)


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Mass(Budget):
    """A row keeps the blocks whose score, an estimated attention mass, exceeds a threshold; linear cost in the prompt.

    The same threshold for all layers, heads and rows lets diffuse heads keep many blocks and sharp ones few, where a
    count gives all the same. Needs scores that are masses (``routing="sketch"``). No sort, no length of the prompt: a
    chunk keeps what one-shot prefill keeps, unless ``config.mu`` < 1: then row i of a prompt of n blocks asks for
    threshold / (1 - (1 - mu) i / n), Token Position-Decay of the mass.

    Args:
        threshold: in (0, 2): a score is the mean plus the maximum of the mass over a block's queries.
        floor: a row keeps at least so many of its best blocks,
        cap: and at most so many, which bounds the tables; None is all.
    """

    threshold: float
    floor: int = 1
    cap: int | None = 256
    needs_scores = True

    def __post_init__(self) -> None:
        _check_share("threshold", self.threshold, self.most_share)
        check_positive("floor", self.floor)
        if self.cap is not None:
            check_positive("cap", self.cap)
            if self.cap < self.floor:
                raise ValueError(f"cap must be at least floor={self.floor}, got {self.cap}")

    most_share = 2.0

    def counts(self, bound, config, batch, heads, scores=None):
        assert scores is not None
        levels = self.levels(bound, config)
        kept = self._kept(scores, self.threshold if levels is None else levels[..., None])
        return kept.clamp(min=self.floor, max=bound.k_blocks if self.cap is None else self.cap)

    def most(self, bound, config):
        return bound.k_blocks if self.cap is None else min(self.cap, bound.k_blocks)

    def configured(self, config):
        return config if config.coarse is None else _of_mass(self, config)

    def levels(self, bound: BoundLayout, config: StemConfig) -> Tensor | None:
        """Threshold of every row, float32 (1 or B, 1, Qb); None where it is one for all."""
        if config.mu == 1:
            return None
        return (self.threshold / _decay(bound, config)).float()

    def _kept(self, scores: Tensor, threshold: float | Tensor) -> Tensor:
        return (scores > threshold).sum(-1, dtype=torch.int32)

    def proposed(self, bound: BoundLayout) -> int:
        """Most blocks of a row that a coarse sketch may propose."""
        return min(bound.k_blocks, bound.k_blocks if self.cap is None else max(self.cap, PROPOSED))


@functools.lru_cache(maxsize=256)
def _of_mass(rule: Mass, config: StemConfig) -> StemConfig:
    if type(rule) is not Mass:  # those compare with what only all scores tell
        return _whole(config)
    return replace(config, budget="mass", threshold=rule.threshold, floor=rule.floor, cap=rule.cap)


@dataclass(frozen=True)
class Peak(Mass):
    """A row keeps the blocks whose score exceeds ``threshold``, in (0, 1], times its best (as FlashPrefill does)."""

    most_share = 1.0

    def _kept(self, scores, threshold):
        return super()._kept(scores, threshold * scores.amax(-1, keepdim=True))


@dataclass(frozen=True)
class Coverage(Budget):
    """A row keeps its forced blocks, and the fewest best others with which the shares reach ``share`` of their sum.

    A cumulative budget as XAttention's and FlexPrefill's; needs a sort. Scores are shares of anything, below PREFERRED;
    a preferred block is lifted by PREFERRED, a forced one by FORCED (:func:`share_of`). Blocks are taken by score:
    forced, preferred, the rest. What is forced counts in the sum.

    Args:
        share: of the row's sum, in (0, 1]; one number, or one for each query head. 1 keeps everything.
        floor, cap: least and most blocks beside the forced ones.
        crossing: False leaves out the block that reaches the share, as SpargeAttn does.
        decays: what is left out, 1 - share, grows along the prompt as the threshold of :class:`Mass` does.
    """

    share: float | tuple[float, ...]
    floor: int = 0
    cap: int | None = None
    crossing: bool = True
    decays: bool = False
    needs_scores = True

    def __post_init__(self) -> None:
        for value in self.share if isinstance(self.share, tuple) else (self.share,):
            _check_share("share", value, 1.0)

    def counts(self, bound, config, batch, heads, scores=None):
        assert scores is not None
        if isinstance(self.share, tuple):
            if len(self.share) != heads:
                raise ValueError(f"share must be a number or one for each of the {heads} query heads, got {self.share}")
            wanted = _on(self.share, scores.device)[:, None]
        else:
            wanted = torch.full((), self.share, dtype=scores.dtype, device=scores.device)
        if self.decays and config.mu != 1:
            wanted = 1 - (1 - wanted) / _decay(bound, config)
        wanted = wanted.broadcast_to(torch.broadcast_shapes(wanted.shape, (1, scores.shape[2])))
        rows = strips(scores.shape[2], scores.shape[0] * scores.shape[1] * scores.shape[3])
        return torch.cat([self._counts(scores[:, :, part], wanted[..., part]) for part in rows], 2)

    def _counts(self, scores: Tensor, wanted: Tensor) -> Tensor:
        ordered = scores.sort(-1, descending=True).values
        shares = share_of(ordered)
        upto = shares.cumsum(-1)
        limit = (wanted * upto[..., -1])[..., None]
        reached = upto - shares < limit if self.crossing else upto <= limit
        taken = torch.where(wanted >= 1, scores.shape[-1], reached.sum(-1, dtype=torch.int32))
        forced = (scores >= FORCED).sum(-1, dtype=torch.int32)
        return forced + (taken - forced).clamp(min=self.floor, max=self.cap)


def share_of(scores: Tensor) -> Tensor:
    """Share of each block without its lift, 0 where the layout allows nothing."""
    return torch.where(scores.isfinite(), scores.clamp(min=0).remainder(PREFERRED), 0.0)


def _decay(bound: BoundLayout, config: StemConfig) -> Tensor:
    """From 1 in a prompt's first row towards mu, (1 or B, 1, Qb)."""
    return (1 - (1 - config.mu) * bound.position / bound.prompt_blocks.clamp(min=1))[:, None]


@functools.lru_cache(maxsize=256)
def _on(values: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what is kept serves every mode
        return torch.tensor(values, dtype=torch.float32, device=device)


def _check_share(name: str, value: object, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number in (0, {most:g}], got {value!r}")
    if not 0 < value <= most:
        raise ValueError(f"{name} must be in (0, {most:g}], got {value}")


def rule_of(budget: int | Tensor | Budget | None, config: StemConfig) -> Budget:
    """The rule that a ``budget=`` argument stands for; None is the configuration's own."""
    if budget is not None:
        return budget if isinstance(budget, Budget) else Blocks(budget)
    if config.budget == "tpd":
        return _SCHEDULE
    if config.budget == "coverage":
        return Coverage(1 - config.threshold, config.floor, config.cap, decays=True)
    return _RULES[config.budget](config.threshold, config.floor, config.cap)


_SCHEDULE = Schedule()
_RULES = {"mass": Mass, "peak": Peak}
