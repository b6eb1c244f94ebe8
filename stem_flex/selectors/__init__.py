"""Block scores by name: Stem's own, its parts, and others that stand where they stand.

A selector is one object: a function ``scores(q, k, v, config, *, layout=None, q_offset=0)`` that returns float32
(B, Hq, Qb, Kb), finite where the layout allows the pair of blocks and -inf elsewhere, with the settings by which it
differs from the caller's :class:`StemConfig` and, where the method has one, its own budget rule. ``selector=``, by name
or as an object, is taken by :func:`stem_flex.stem_block_mask`, :func:`stem_flex.stem_attention`, the transformers
integration and the benchmarks alike. ``layout`` may be bound already, as :func:`stem_flex.score.bind_to` has it.

========================  ==================================================================================
``sam``, ``sam+tpd``      routing only (SAM, the score-aware metric), with even or decaying budgets
``oam``                   routing and z-scored value magnitude, even budgets
``stem``                  the published method: routing, value magnitude, decaying budgets
``stem-log``              Stem with the paper's Eq. 7 magnitude
``sketch``, ``+tpd``      experimental: coarse attention between 16 means a block (:mod:`.sketch`)
``sketch-outliers``       experimental: the same with outlying tokens as proxies of their own
``oracle``, ``-error``    the mass that dense attention gives (:mod:`.oracle`), the output's change: yardsticks
others                    published methods by rules of their own, floors (:mod:`.published`)
========================  ==================================================================================

``settings`` speak of scores (``value_weight``, ``metric``) and of budgets (``mu``): use ``selector.configured(config)``
for both. One of your own::

    register("mine", my_scores, "what it looks at")

lets ``bench.ruler.main(["--selector", "mine"])`` and ``bench.accuracy.main([])`` measure it in the same process.
A line here makes it known to ``python -m bench.ruler --selector mine`` too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stem_flex.budget import Budget
from stem_flex.config import StemConfig
from stem_flex.plumbing.tables import BlockTables
from stem_flex.score import oam_scores
from stem_flex.selectors import oracle, published, sketch, stem
from stem_flex.selectors.selector import ScoreFn, Selector

__all__ = ["Selector", "get", "names", "register", "resolve"]

_SELECTORS: dict[str, Selector] = {}


def register(
    name: str,
    scores: ScoreFn,
    note: str,
    *,
    experimental: bool = False,
    budget: Budget | None = None,
    fused: Callable[..., BlockTables | None] | None = None,
    **settings: Any,
) -> Selector:
    """Add a selector, see :class:`Selector`; ``settings`` are fields of :class:`StemConfig`.

    Raises:
        ValueError: the name is taken.
    """
    if name in _SELECTORS:
        raise ValueError(f"name must be a new one, got {name!r}, which {_SELECTORS[name].note!r} has; choose another")
    _SELECTORS[name] = Selector(name, scores, note, settings, experimental, budget, fused)
    return _SELECTORS[name]


def resolve(selector: str | Selector | None, config: StemConfig) -> Selector:
    """What a ``selector=`` argument stands for; None is ``config.routing`` by the configuration to the letter.

    Raises:
        TypeError, ValueError: it is neither a selector nor the name of one.
    """
    if selector is None:
        return _ROUTINGS[config.routing]
    if isinstance(selector, Selector):
        return selector
    if not isinstance(selector, str):
        raise TypeError(f"selector must be a name of {names()} or a Selector, got {type(selector).__name__}")
    return get(selector)


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


_ROUTINGS = {
    "oam": Selector("stem", oam_scores, "Stem as the configuration says", fused=stem.tables),
    "sketch": Selector("sketch", sketch.scores, "the block sketch as the configuration says", fused=sketch.tables),
}

register("sam", oam_scores, "routing only, the same budget for every row", fused=stem.tables, value_weight=0.0, mu=1.0)
register(
    "sam+tpd",
    oam_scores,
    "routing only, budgets decay along the prompt",
    fused=stem.tables,
    value_weight=0.0,
    mu=0.7,
)
register(
    "oam",
    oam_scores,
    "routing and z-scored value magnitude, the same budget for every row",
    fused=stem.tables,
    mu=1.0,
)
register(
    "stem",
    oam_scores,
    "routing, z-scored value magnitude, decaying budgets: as published",
    fused=stem.tables,
    mu=0.7,
)
register("stem-log", oam_scores, "Stem with the paper's Eq. 7 magnitude", fused=stem.tables, metric="log", mu=0.7)
_MEANS = (0, 16, 0, 16)
register(
    "sketch",
    sketch.scores,
    "attention between 16 means of each block, mean and maximum",
    experimental=True,
    fused=sketch.tables,
    sketch=_MEANS,
    coarse=None,
    mu=1.0,
)
register(
    "sketch+tpd",
    sketch.scores,
    "the block sketch with budgets that decay",
    experimental=True,
    fused=sketch.tables,
    sketch=_MEANS,
    coarse=None,
    mu=0.7,
)
register(
    "sketch-outliers",
    sketch.scores,
    "attention between 16 outlier queries + 8 means and 4 outlier keys + 8 means",
    experimental=True,
    fused=sketch.tables,
    sketch=(16, 8, 4, 8),
    coarse=None,
    mu=1.0,
)
register("oracle", oracle.scores, "the largest true attention mass any token gives the block", mu=1.0)

_SELECTORS |= {selector.name: selector for selector in published.SELECTORS}
