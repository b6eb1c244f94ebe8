"""What Stem is asked to do: every option and its default, once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

Metric = Literal["zscore", "log"]
Schedule = Literal["envelope", "operator", "paper", "fixed"]

Routing = Literal["oam", "sketch"]
BudgetKind = Literal["tpd", "mass", "peak", "coverage"]
Correction = Literal["mean"]

METRICS: tuple[Metric, ...] = ("zscore", "log")
SCHEDULES: tuple[Schedule, ...] = ("envelope", "operator", "paper", "fixed")
ROUTINGS: tuple[Routing, ...] = ("oam", "sketch")
BUDGETS: tuple[BudgetKind, ...] = ("tpd", "mass", "peak", "coverage")
CORRECTIONS: tuple[Correction | None, ...] = (None, "mean")

LEAST_THRESHOLD = 1e-30  # of a coarse sketch's proposals: parts of it are numbers that float32 can double


@dataclass(frozen=True, kw_only=True, eq=False)
class StemConfig:
    """Options of Stem's block selection (arXiv 2603.06274), immutable and hashable.

    Args:
        block_size: tokens of a query block and of a key block, one int for both or ``(query, key)``.
        stride: distance of the antidiagonal samples; divides both block sizes. A smaller stride resolves
            less of a block's position pattern, a larger one costs more (score GEMM: ``stride * D`` deep).
        metric: value magnitude. ``"zscore"`` is the published operator's (invariant to the scale of v),
            ``"log"`` the paper's Eq. 7. With ``"log"`` a block's score does not depend on other blocks, so
            block-aligned chunks select exactly what one-shot prefill selects. With ``"zscore"`` a chunk normalises
            by the keys so far; one-shot prefill by all of the prompt's, later ones too, which no running statistics
            can know.
        value_weight: weight of the magnitude in the score (the paper's beta); 0 leaves routing only, the
            score-aware metric of the peers.
        schedule: blocks a row keeps, see :func:`stem_flex.tpd_budget`.
        k_start: only with ``schedule="fixed"``: blocks of the first rows, an int, or a float in (0, 1] as a
            fraction of the prompt's blocks.
        mu: the last row keeps ``mu`` times what the first does (Token Position-Decay), in (0, 1]; 1 is uniform.
        sink_blocks: first blocks of the row's allowed range, always kept and not counted in the budget.
        local_blocks: last blocks up to and with the diagonal, always kept and not counted in the budget.
        routing: what scores a pair of blocks. ``"oam"`` is Stem's; ``"sketch"`` estimates the attention mass between
            a few proxies of each block (:mod:`stem_flex.selectors.sketch`), and leaves metric, value_weight and
            stride unread.
        sketch: proxies of a block: (outlying queries, means of queries, outlying keys, means of keys).
        coarse: only with ``budget="mass"``: (outlying queries, outlying keys) that with the mean of each block make a
            coarser sketch of every pair, so that ``sketch`` looks only at the blocks that this one proposes
            (:mod:`stem_flex.selectors.sketch`), for a threshold of at least 1e-30; None: at all.
        budget: ``"tpd"`` counts blocks by the schedule. With ``routing="sketch"`` also a threshold on the estimated
            mass: ``"mass"`` absolute, ``"peak"`` relative to the row's best, ``"coverage"`` cumulative, see
            :class:`stem_flex.budget.Mass`; mu then raises the threshold along the prompt.
        threshold, floor, cap: of a budget by mass: the threshold, and the fewest and most blocks a row keeps by it.
        correction: what attention makes of blocks that were not kept. None: nothing. ``"mean"``: each that a query may
            see entirely is one more token, see :mod:`stem_flex.plumbing.means`. No part of the mask.

    Raises:
        TypeError, ValueError: naming the argument, what was expected, what came, and the fix.

    The defaults are the published operator's, with one exception. Its budget falls as the prompt grows,
    from 55 to 41 blocks at 56 blocks and from 61 to 46 at 160: a longer prompt would be read with less. The
    default schedule ``"envelope"`` keeps the operator's rule but never less than a shorter prompt got, and is
    the same from 310 blocks (39,680 tokens) on. ``StemConfig.operator()`` and ``StemConfig.paper()`` are the
    published ones to the letter.
    """

    block_size: int | tuple[int, int] = 128
    stride: int = 8
    metric: Metric = "zscore"
    value_weight: float = 0.2
    schedule: Schedule = "envelope"
    k_start: int | float | None = None
    mu: float = 0.7
    sink_blocks: int = 4
    local_blocks: int = 4
    routing: Routing = "oam"
    sketch: tuple[int, int, int, int] = (16, 8, 4, 8)
    coarse: tuple[int, int] | None = None
    budget: BudgetKind = "tpd"
    threshold: float = 0.05
    floor: int = 1
    cap: int | None = 256
    correction: Correction | None = None

    @classmethod
    def operator(cls) -> StemConfig:
        """The published operator: z-scored value bonus of weight 0.2, stride 8, its length regimes, mu 0.7."""
        return cls(schedule="operator")

    @classmethod
    def paper(cls) -> StemConfig:
        """The paper: Eq. 7 magnitudes of weight 0.2, budget 0.2 N or 0.1 N of at least 54 blocks, mu 0.7."""
        return cls(schedule="paper", metric="log")

    @classmethod
    def mass(
        cls,
        threshold: float = 0.05,
        *,
        sketch: tuple[int, int, int, int] = (16, 8, 4, 8),
        coarse: tuple[int, int] | None = None,
    ) -> StemConfig:
        """Ours: blocks whose estimated attention mass exceeds ``threshold``, and one sink and two local ones.

        ``sketch=(8, 8, 4, 8), coarse=(4, 1)`` makes the choice cheaper for very long prompts: fewer queries stand for a
        block, at some text loss, and not every pair is looked at.
        """
        return cls(
            routing="sketch", budget="mass", threshold=threshold, sketch=sketch, coarse=coarse, mu=1.0, sink_blocks=1,
            local_blocks=2,
        )  # fmt: skip

    @property
    def query_block(self) -> int:
        """Tokens of a query block."""
        return self.block_size if isinstance(self.block_size, int) else self.block_size[0]

    @property
    def key_block(self) -> int:
        """Tokens of a key block."""
        return self.block_size if isinstance(self.block_size, int) else self.block_size[1]

    def __eq__(self, other: object) -> bool:
        # a k_start of 1 block is not 1.0 of the blocks
        if not isinstance(other, StemConfig) or other.__class__ is not self.__class__:
            return NotImplemented
        return type(self.k_start) is type(other.k_start) and _options(self) == _options(other)

    def __hash__(self) -> int:
        return hash((type(self.k_start), _options(self)))

    def __post_init__(self) -> None:
        _check_blocks(self.block_size, self.stride)
        if self.metric not in METRICS:
            raise ValueError(f"metric must be one of {METRICS}, got {self.metric!r}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {SCHEDULES}, got {self.schedule!r}")
        _check_real("value_weight", self.value_weight, "a finite number", lambda x: math.isfinite(x))
        _check_real("mu", self.mu, "a number in (0, 1]", lambda x: 0 < x <= 1)
        for name in ("sink_blocks", "local_blocks"):
            count = getattr(self, name)
            if not _is_int(count):
                raise TypeError(f"{name} must be an int, got {count!r}")
            if count < 0:
                raise ValueError(f"{name} must be 0 or more, got {count}")
        _check_k_start(self.k_start, self.schedule)
        _check_mass(self)
        if self.correction not in CORRECTIONS:
            raise ValueError(f"correction must be one of {CORRECTIONS}, got {self.correction!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_real(name: str, value: object, expected: str, holds) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be {expected}, got {value!r}")
    if not holds(value):
        raise ValueError(f"{name} must be {expected}, got {value}")


def _options(config: StemConfig) -> tuple:
    # written out, for torch.compile to follow
    return (
        config.block_size,
        config.stride,
        config.metric,
        config.value_weight,
        config.schedule,
        config.k_start,
        config.mu,
        config.sink_blocks,
        config.local_blocks,
        config.routing,
        config.sketch,
        config.coarse,
        config.budget,
        config.threshold,
        config.floor,
        config.cap,
        config.correction,
    )


def _check_blocks(block_size: Any, stride: Any) -> None:
    sizes = block_size if isinstance(block_size, tuple) else (block_size, block_size)
    if len(sizes) != 2 or not all(_is_int(size) for size in sizes):
        raise TypeError(f"block_size must be an int or a (query, key) pair of ints, got {block_size!r}")
    for size in sizes:
        if size < 16 or size & (size - 1):
            raise ValueError(f"block_size must be powers of two of at least 16, got {block_size!r}; use 128")
    if not _is_int(stride):
        raise TypeError(f"stride must be an int, got {stride!r}")
    if stride < 1 or any(size % stride for size in sizes):
        raise ValueError(f"stride must divide block_size {block_size!r}, got {stride}; use 4, 8, 16 or 32")


def _check_k_start(k_start: object, schedule: str) -> None:
    if schedule != "fixed":
        if k_start is not None:
            raise ValueError(f"k_start must be None with schedule={schedule!r}, got {k_start!r}; use schedule='fixed'")
        return
    if isinstance(k_start, bool) or not isinstance(k_start, (int, float)):
        raise TypeError(
            f"k_start must be an int or a float with schedule='fixed', got {k_start!r}; "
            "give blocks (int) or a fraction of the prompt (float)"
        )
    if isinstance(k_start, int) and k_start < 1:
        raise ValueError(f"k_start must be at least 1 block, got {k_start}")
    if isinstance(k_start, float) and not 0 < k_start <= 1:
        raise ValueError(f"k_start as a fraction must be in (0, 1], got {k_start}")


def _check_mass(config: StemConfig) -> None:
    if config.routing not in ROUTINGS:
        raise ValueError(f"routing must be one of {ROUTINGS}, got {config.routing!r}")
    if config.budget not in BUDGETS:
        raise ValueError(f"budget must be one of {BUDGETS}, got {config.budget!r}")
    if config.budget != "tpd" and config.routing != "sketch":
        raise ValueError(f"budget={config.budget!r} needs scores that are masses; use routing='sketch'")
    most = 2 if config.budget == "mass" else 1
    _check_real("threshold", config.threshold, f"a number in (0, {most}]", lambda x: 0 < x <= most)
    for name in ("floor", "cap"):
        count = getattr(config, name)
        if name == "cap" and count is None:
            continue
        if not _is_int(count):
            raise TypeError(f"{name} must be an int, got {count!r}")
        if count < 1:
            raise ValueError(f"{name} must be 1 or more, got {count}")
    if config.cap is not None and config.cap < config.floor:
        raise ValueError(f"cap must be at least floor={config.floor}, got {config.cap}")
    sizes = config.sketch
    if not isinstance(sizes, tuple) or len(sizes) != 4 or not all(_is_int(size) for size in sizes):
        raise TypeError(f"sketch must be four ints (outliers, means of queries, then of keys), got {sizes!r}")
    outliers, means = sizes[0::2], sizes[1::2]
    blocks = (config.query_block, config.key_block)
    if min(outliers) < 0 or any(m < 1 or m & (m - 1) or m > block for m, block in zip(means, blocks, strict=True)):
        raise ValueError(
            f"sketch must have 0 or more outliers and means that are powers of two up to the blocks {blocks}, "
            f"got {sizes}"
        )
    if any(o > block for o, block in zip(outliers, blocks, strict=True)):
        raise ValueError(f"sketch must have at most as many outliers as a block has tokens {blocks}, got {sizes}")
    _check_coarse(config)


def _check_coarse(config: StemConfig) -> None:
    coarse = config.coarse
    if coarse is None:
        return
    if not isinstance(coarse, tuple) or len(coarse) != 2 or not all(_is_int(size) for size in coarse):
        raise TypeError(f"coarse must be two ints (outlying queries, outlying keys) or None, got {coarse!r}")
    if not all(0 <= fewer <= outliers for fewer, outliers in zip(coarse, config.sketch[0::2], strict=True)):
        raise ValueError(f"coarse must have at most the sketch's outliers {config.sketch[0::2]}, got {coarse}")
    if config.budget != "mass":
        raise ValueError(f"coarse needs budget='mass', whose threshold it proposes blocks for, got {config.budget!r}")
    if config.threshold < LEAST_THRESHOLD:
        raise ValueError(
            f"threshold must be at least {LEAST_THRESHOLD} with coarse={coarse}, got {config.threshold}; coarse=None "
            "looks at every block"
        )
