"""What a selector is: scores, and what belongs to them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from stem_flex.budget import Budget
from stem_flex.config import StemConfig
from stem_flex.plumbing.implementation import constant
from stem_flex.plumbing.tables import BlockTables

ScoreFn = Callable[..., Tensor]


@dataclass(frozen=True)
class Selector:
    """A way to score block pairs, and what belongs to it.

    Attributes:
        name: what it is called on command lines and in tables.
        scores: ``(q, k, v, config, *, layout=None, q_offset=0) -> (B, Hq, Qb, Kb)``; one that also takes ``impl=`` has
            Triton kernels and is told which implementation to run.
        note: one line on what it looks at.
        settings: fields of :class:`StemConfig` that make it what it is.
        experimental: not a published method.
        budget: its own rule of how many blocks a row keeps; None: the config's schedule.
        fused: ``(q, k, v, bound, config, rule) -> BlockTables``, the Triton backend of scoring and selecting in one
            operator that holds no score matrix, or None for a rule that it does not serve. None: there is none.
    """

    name: str
    scores: ScoreFn
    note: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    experimental: bool = False
    budget: Budget | None = None
    fused: Callable[..., BlockTables | None] | None = None

    def configured(self, config: StemConfig) -> StemConfig:
        """``config`` with this selector's own settings."""
        return replace(config, **self.settings) if self.settings else config

    @property
    def has_kernels(self) -> bool:
        """Whether ``scores`` is told which implementation to run."""
        return _takes_impl(self.scores)


@constant
def _takes_impl(f: Callable) -> bool:
    return "impl" in inspect.signature(f).parameters
