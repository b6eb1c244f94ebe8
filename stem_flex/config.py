"""What Stem is asked to do: every option and its default, once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

Metric = Literal["zscore", "log"]
Schedule = Literal["envelope", "operator", "paper", "fixed"]

METRICS: tuple[Metric, ...] = ("zscore", "log")
SCHEDULES: tuple[Schedule, ...] = ("envelope", "operator", "paper", "fixed")


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

    @classmethod
    def operator(cls) -> StemConfig:
        """The published operator: z-scored value bonus of weight 0.2, stride 8, its length regimes, mu 0.7."""
        return cls(schedule="operator")

    @classmethod
    def paper(cls) -> StemConfig:
        """The paper: Eq. 7 magnitudes of weight 0.2, budget 0.2 N or 0.1 N of at least 54 blocks, mu 0.7."""
        return cls(schedule="paper", metric="log")

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
