"""The published selectors at their published settings, floors and ceilings.

Each is a function of scores and a budget rule (:mod:`.rules`): a row keeps the best scores, as many as the rule
counts, and the method's own first and last blocks, which take the place of the configuration's. Any other ``budget=``
takes the blocks in the order of the scores. Where a file has the per-head settings of a model, a layer's selector is
made by :func:`.minference.from_file` and :func:`.antidiagonals.from_file`.

================== ========================= ======================= ===================== =====================
name               looks at                  keeps                   layouts               module
================== ========================= ======================= ===================== =====================
dense              nothing                   everything              any                   :mod:`.static`
a-shape            nothing                   128 first, 3,968 last   any                   :mod:`.static`
tri-shape          nothing                   and 100 last queries    any                   :mod:`.static`
random             a hash                    the schedule            any                   :mod:`.static`
uniform            block means               the schedule            any                   :mod:`.static`
minference         64 last queries           1,000 + 6,096 tokens    one causal prompt     :mod:`.minference`
flexprefill        last queries, means       gamma 0.9, tau 0.1      one causal prompt     :mod:`.flexprefill`
xattention         antidiagonals             0.9 of their mass       intervals             :mod:`.antidiagonals`
flashprefill, -v2  queries, mean keys        0.2, 0.1 of the best    intervals             :mod:`.flashprefill`
spargeattn, -topk  means, cosines            0.98, half              any                   :mod:`.spargeattn`
cosa               antidiagonal peaks        0.8 of their mass       intervals             :mod:`.antidiagonals`
vecattention       mean queries, keys        0.1 of the best         intervals             :mod:`.vecattention`
prism              means in two bands        0.95 of each            any                   :mod:`.prism`
proxyattn          pooled heads              as last queries say     one causal prompt     :mod:`.proxyattn`
oracle-error       everything                the schedule            intervals             :mod:`.oracle`
================== ========================= ======================= ===================== =====================

Intervals are layouts that give every query one interval of keys: all but masks from functions and BlockMasks. One
causal prompt: causal, padding, sliding windows. All take ``q_offset``, batches, grouped heads and any length.
"""

from __future__ import annotations

import functools
from typing import Any

from stem_flex.budget import PREFERRED, Coverage
from stem_flex.selectors import (
    antidiagonals,
    flashprefill,
    flexprefill,
    minference,
    oracle,
    prism,
    proxyattn,
    spargeattn,
    static,
    vecattention,
)
from stem_flex.selectors.rules import Above, Part, Relative
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
        antidiagonals.xattention,
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
    Selector(
        "spargeattn",
        spargeattn.scores,
        "block means where tokens are alike, 98 % of their softmax, and all blocks that are not",
        _forced(0, 1),
        budget=Coverage(0.98, floor=1, crossing=False),
    ),
    Selector(
        "spargeattn-topk",
        functools.partial(spargeattn.scores, similarity=-0.1),
        "the same, half of all key blocks",
        _forced(0, 1),
        budget=Part(0.5),
    ),
    Selector(
        "cosa",
        antidiagonals.cosa,
        "antidiagonal peaks, blocks with a row's peak first, 80 % of the mass",
        _forced(1, 1),
        budget=Coverage(0.8),
    ),
    Selector(
        "vecattention",
        vecattention.scores,
        "keys from 0.1 of the best for the mean query",
        _forced(1, 1),
        budget=Relative(0.1),
    ),
    Selector(
        "prism",
        prism.scores,
        "block means in bands of fast and slow rotary dimensions, 95 % of each",
        _forced(1, 1),
        budget=Above(1 - 0.95),
    ),
    Selector(
        "proxyattn",
        proxyattn.scores,
        "4 pooled heads rank blocks by tokens, each head with a budget of its own",
        _forced(1, 1),
        budget=Above(PREFERRED),
    ),
    Selector("oracle-error", oracle.error_scores, "the true change of the output without the block", {"mu": 1.0}),
)
