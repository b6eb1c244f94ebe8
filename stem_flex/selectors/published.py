"""The published selectors at their published settings, floors and ceilings: each by its own budget rule."""

from __future__ import annotations

from typing import Any

from stem_flex.selectors import flashprefill, flexprefill, minference, static, xattention
from stem_flex.selectors.rules import PREFERRED, Above, Coverage, Relative
from stem_flex.selectors.selector import Selector


def _forced(sink: int, local: int, **settings: Any) -> dict[str, Any]:
    """Settings with the method's own first and last blocks in place of the caller's."""
    return {"sink_blocks": sink, "local_blocks": local, **settings}


SELECTORS = (
    Selector("dense", static.dense, "everything", _forced(0, 0), budget=Above(PREFERRED)),
    Selector(
        "a-shape",
        static.a_shape,
        "the first 128 keys and the last 3,968 (StreamingLLM)",
        _forced(0, 0),
        budget=Above(PREFERRED),
    ),
    Selector(
        "tri-shape",
        static.tri_shape,
        "A-shape, and everything for the last 100 queries",
        _forced(0, 0),
        budget=Above(PREFERRED),
    ),
    Selector("random", static.scattered, "a hash of the pair's place: a floor", {"mu": 1.0}),
    Selector("uniform", static.means, "mean query times mean key, the same budget for every row", {"mu": 1.0}),
    Selector(
        "minference",
        minference.scores,
        "vertical-slash: 1,000 columns and 6,096 diagonals of each head",
        _forced(0, 0),
        budget=Above(PREFERRED),
    ),
    Selector(
        "flexprefill",
        flexprefill.scores,
        "vertical-slash or query-aware, as the last queries say",
        _forced(0, 0),
        budget=Above(PREFERRED),
    ),
    Selector(
        "xattention",
        xattention.scores,
        "mass of strided antidiagonals, 90 % of it",
        _forced(1, 1, stride=16),
        budget=Coverage(0.9),
    ),
    Selector(
        "flashprefill",
        flashprefill.scores,
        "every query against mean keys, blocks from 0.2 of the row's best",
        _forced(2, 4),
        budget=Relative(0.2, full_rows=2),
    ),
    Selector(
        "flashprefill-v2",
        flashprefill.scores,
        "the same from 0.1 of the row's best, the last 8 rows dense",
        _forced(2, 4),
        budget=Relative(0.1, full_rows=8),
    ),
)
