"""Block scores by name: Stem's own, its parts, and others that stand where they stand.

A selector is a function ``scores(q, k, v, config, *, layout=None, q_offset=0)`` that returns float32
(B, Hq, Qb, Kb), finite where the layout allows the pair of blocks and -inf elsewhere, together with the settings by
which it differs from the caller's :class:`StemConfig`. :func:`stem_flex.select.select_blocks` turns scores of any
origin into tables, and ``bench.attend`` runs a model with them.

========================  ==================================================================================
``sam``, ``sam+tpd``      routing only (SAM, the score-aware metric), with even or decaying budgets
``oam``                   routing and z-scored value magnitude, even budgets
``stem``                  the published method: routing, value magnitude, decaying budgets
``stem-log``              Stem with the paper's Eq. 7 magnitude
``sketch``, ``+tpd``      experimental: coarse attention between 16 means a block (:mod:`.sketch`)
``sketch-outliers``       experimental: the same with outlying tokens as proxies of their own
``oracle``                the attention mass that dense attention gives (:mod:`.oracle`): a yardstick
========================  ==================================================================================

``settings`` speak of scores (``value_weight``, ``metric``) and of budgets (``mu``): use ``selector.configured(config)``
for both. One of your own::

    register("mine", my_scores, "what it looks at")

lets ``bench.ruler.main(["--selector", "mine"])`` and ``bench.accuracy.main([])`` measure it in the same process.
A line here makes it known to ``python -m bench.ruler --selector mine`` too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from stem_flex.config import StemConfig
from stem_flex.score import oam_scores
from stem_flex.selectors import oracle, sketch

__all__ = ["Selector", "get", "names", "register"]

ScoreFn = Callable[..., Tensor]


@dataclass(frozen=True)
class Selector:
    """A way to score block pairs.

    Attributes:
        name: what it is called on command lines and in tables.
        scores: ``(q, k, v, config, *, layout=None, q_offset=0) -> (B, Hq, Qb, Kb)``.
        note: one line on what it looks at.
        settings: fields of :class:`StemConfig` that make it what it is.
        experimental: not a published method.
    """

    name: str
    scores: ScoreFn
    note: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    experimental: bool = False

    def configured(self, config: StemConfig) -> StemConfig:
        """``config`` with this selector's own settings."""
        return replace(config, **self.settings)


_SELECTORS: dict[str, Selector] = {}


def register(name: str, scores: ScoreFn, note: str, *, experimental: bool = False, **settings: Any) -> Selector:
    """Add a selector; ``settings`` are fields of :class:`StemConfig`.

    Raises:
        ValueError: the name is taken.
    """
    if name in _SELECTORS:
        raise ValueError(f"name must be a new one, got {name!r}, which {_SELECTORS[name].note!r} has; choose another")
    _SELECTORS[name] = Selector(name, scores, note, settings, experimental)
    return _SELECTORS[name]


def get(name: str) -> Selector:
    """The selector called ``name``.

    Raises:
        ValueError: there is none.
    """
    if name not in _SELECTORS:
        raise ValueError(f"selector must be one of {names()}, got {name!r}")
    return _SELECTORS[name]


def names() -> list[str]:
    """Names of all selectors, in the order of their registration."""
    return list(_SELECTORS)


register("sam", oam_scores, "routing only, the same budget for every row", value_weight=0.0, mu=1.0)
register("sam+tpd", oam_scores, "routing only, budgets decay along the prompt", value_weight=0.0, mu=0.7)
register("oam", oam_scores, "routing and z-scored value magnitude, the same budget for every row", mu=1.0)
register("stem", oam_scores, "routing, z-scored value magnitude, decaying budgets: as published", mu=0.7)
register("stem-log", oam_scores, "Stem with the paper's Eq. 7 magnitude", metric="log", mu=0.7)
register(
    "sketch", sketch.scores, "attention between 16 means of each block, mean and maximum", experimental=True, mu=1.0
)
register("sketch+tpd", sketch.scores, "the block sketch with budgets that decay", experimental=True, mu=0.7)
register(
    "sketch-outliers",
    sketch.outlier_scores,
    "attention between 16 outlier queries + 8 means and 4 outlier keys + 8 means",
    experimental=True,
    mu=1.0,
)
register("oracle", oracle.scores, "the largest true attention mass any token gives the block", mu=1.0)
