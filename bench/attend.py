"""Run any Hugging Face causal LM with any block selector in every layer, at an exact number of computed blocks.

Selectors are compared at equal density: the forced blocks (sink, local, own) count in every row's budget, and the
budgets are solved so that their sum is the wanted part of the causal block pairs.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad, scaled_dot_product_attention

from stem_flex import budget
from stem_flex.attention import sparse_prefill
from stem_flex.budget import Budget
from stem_flex.config import StemConfig
from stem_flex.layout import causal
from stem_flex.mask import assemble
from stem_flex.plumbing.binding import BoundLayout
from stem_flex.plumbing.classes import EMPTY
from stem_flex.score import oam_scores
from stem_flex.select import forced_blocks, select_blocks
from stem_flex.selectors import Selector, get

RULES = {  # by a threshold
    "mass": budget.Mass,
    "peak": budget.Peak,
    "coverage": lambda threshold: budget.Coverage(1 - threshold, floor=1, cap=256),
}
IMPLEMENTATION = "stem_flex_bench"
Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]


def block_budgets(blocks: int, density: float, config: StemConfig) -> list[int]:
    """Blocks that each row keeps, forced ones included, so that all keep ``density`` of the causal pairs.

    The shape is the operator's: rows below k keep k, the others decay linearly to mu k. Fractions are spread over
    the rows, and no row keeps fewer than its forced blocks or more than it has.
    """

    def wanted(k: float) -> list[float]:
        span = max(1.0, blocks - 1 - k)
        return [k * (1 - (1 - config.mu) * min(1.0, max(0.0, (i - k) / span))) for i in range(blocks)]

    def clipped(kept: float, row: int) -> float:
        return min(row + 1.0, max(kept, config.sink_blocks + config.local_blocks))

    target = density * blocks * (blocks + 1) / 2
    low, high = 0.0, 2.0 * blocks / config.mu
    for _ in range(60):
        middle = (low + high) / 2
        total = sum(clipped(kept, row) for row, kept in enumerate(wanted(middle)))
        low, high = (middle, high) if total < target else (low, middle)
    budgets, owed = [], 0.0
    for row, kept in enumerate(wanted(high)):
        owed += clipped(kept, row)
        budgets.append(int(min(row + 1, max(1, math.floor(owed + 0.5)))))
        owed -= budgets[-1]
    return budgets


def same_forced(selector: Selector, base: StemConfig) -> StemConfig:
    """A selector's settings but for the forced blocks, which are ``base``'s, as all have them at equal density."""
    return replace(selector.configured(base), sink_blocks=base.sink_blocks, local_blocks=base.local_blocks)


@dataclass
class Dense:
    """Dense causal attention."""

    name: str = "dense"
    density: float = 1.0

    def computed(self, length: int) -> float:
        """Everything."""
        return 1.0

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


@dataclass
class Sparse:
    """Every layer computes the blocks a selector keeps.

    Attributes:
        selector: how block pairs are scored.
        config: block size, stride, forced blocks and mu; see :meth:`Selector.configured`.
        density: computed part of the causal block pairs.
        dense_tail: tokens at the end whose rows are dense: answers, as decoding would compute them. They are no
            part of what the selector sees, nor of the density. A multiple of the block size.
        band: (first, last) rows that are sparse; the others are dense. None: all.
        dense_layers: layers that attend densely.
        rule: instead of the density: a budget rule. The forced blocks are united with what it keeps, and the density
            is as it falls, see :meth:`computed`.
    """

    selector: Selector
    config: StemConfig
    density: float
    dense_tail: int = 0
    band: tuple[int, int] | None = None
    dense_layers: tuple[int, ...] = ()
    rule: Budget | None = None
    # by length; a replaced copy starts anew
    _budgets: dict[int, Tensor] = field(default_factory=dict, repr=False, init=False)
    _forced: dict[int, Tensor] = field(default_factory=dict, repr=False, init=False)
    _kept: dict[int, list[Tensor]] = field(default_factory=dict, repr=False, init=False)

    @property
    def name(self) -> str:
        """The selector's."""
        return self.selector.name

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if layer in self.dense_layers:
            return Dense()(layer, q, k, v, scale)
        return attend(q, k, v, self.block_mask(q, k, v), scale, self.config.correction)

    def block_mask(self, q: Tensor, k: Tensor, v: Tensor) -> BlockMask:
        """The blocks of these q, k, v."""
        config, length = self.config, q.shape[2]
        block = config.query_block
        if self.dense_tail % block or length % block:
            raise ValueError(f"lengths must be multiples of the block, got {length} and a tail of {self.dense_tail}")
        batch, heads = q.shape[:2]
        bound = causal().bind(batch, heads, length, length, block_size=(block, config.key_block), device=q.device)
        seen, tail = length - self.dense_tail, self.dense_tail // block
        scores = self.selector.scores(q[:, :, :seen], k[:, :, :seen], v[:, :, :seen], config)
        if self.rule is not None:
            return self._by_rule(scores, bound, length)
        if tail:
            scores = pad(scores, (0, tail, 0, tail))
        if length not in self._forced:
            self._forced[length] = forced_blocks(bound, bound.dense_classes(), config)
            self._budgets[length] = torch.tensor(self.budgets(length), dtype=torch.int32, device=q.device)
        # forced blocks come first, so that they count in the budget
        scores = scores.masked_fill(self._forced[length], math.inf)
        return assemble(select_blocks(scores, bound, config, budget=self._budgets[length]), bound)

    def _by_rule(self, scores: Tensor, bound: BoundLayout, length: int) -> BlockMask:
        """What the rule keeps of the sparse rows, the rows of the tail in full."""
        batch, heads, rows = scores.shape[:3]
        tail = bound.q_blocks - rows
        size = length - self.dense_tail
        seen = causal().bind(batch, heads, size, size, block_size=bound.block_size, device=scores.device)
        scores = scores.masked_fill(seen.dense_classes() == EMPTY, -math.inf)
        assert self.rule is not None
        counts = self.rule.counts(seen, self.config, batch, heads, scores).expand(batch, heads, rows)
        counts = pad(counts, (0, tail), value=bound.k_blocks)
        tables = select_blocks(pad(scores, (0, tail, 0, tail)), bound, self.config, budget=counts)
        mask = assemble(tables, bound)
        kept = mask.kv_num_blocks[:, :, :rows] if mask.full_kv_num_blocks is None else (
            mask.kv_num_blocks[:, :, :rows] + mask.full_kv_num_blocks[:, :, :rows]
        )  # fmt: skip
        self._kept.setdefault(length, []).append(kept.sum(-1).float().mean())
        return mask

    def budgets(self, length: int) -> list[int]:
        """Blocks kept by every row of a sequence of ``length`` tokens."""
        rows = length // self.config.query_block
        sparse = rows - self.dense_tail // self.config.query_block
        kept = block_budgets(sparse, self.density, self.config) + list(range(sparse + 1, rows + 1))
        first, last = self.band or (0, rows)
        return [count if first <= row < last else row + 1 for row, count in enumerate(kept)]

    def computed(self, length: int) -> float:
        """Computed part of the causal block pairs, the dense tail apart; with a rule, of the layers attended so far."""
        rows = (length - self.dense_tail) // self.config.query_block
        pairs = rows * (rows + 1) / 2
        if self.rule is None:
            return sum(self.budgets(length)[:rows]) / pairs
        found = self._kept.get(length)
        return float(torch.stack(found).mean()) / pairs if found else math.nan


def add_budget(parser: argparse.ArgumentParser) -> None:
    """``--budget``, ``--density`` and ``--threshold``; see :func:`rule_of`."""
    note = "density: the same for every selector; own: the selector's rule; others: a rule of stem_flex.budget"
    parser.add_argument("--budget", default="density", choices=("density", "own", *RULES), help=note)
    parser.add_argument("--density", type=float, default=0.25, help="computed part of the causal block pairs")
    parser.add_argument("--threshold", type=float, default=0.05, help="of the rule that --budget names")


def rule_of(options: argparse.Namespace) -> Budget | None:
    """The rule that ``--budget`` and ``--threshold`` name; None for a density.

    Raises:
        ValueError: the rule does not suit the selector.
    """
    if options.budget == "density":
        return None
    label = "own" if options.budget == "own" else f"{options.budget}:{options.threshold}"
    rule = rule_named(label, get(options.selector))
    if rule is None:
        raise ValueError(f"budget {options.budget} does not suit the selector {options.selector}; use a density")
    return rule


def rule_named(label: str, selector: Selector) -> Budget | None:
    """The rule "own" (the selector's) or "NAME:THRESHOLD", as "mass:0.05"; None where the selector has none.

    Thresholds speak of estimated attention mass; Stem's score, a mean logit, is none.

    Raises:
        ValueError: there is no such rule.
    """
    if label == "own":
        return selector.budget
    name, _, threshold = label.partition(":")
    if name not in RULES or not threshold:
        raise ValueError(f"a budget rule must be own or NAME:THRESHOLD with NAME of {sorted(RULES)}, got {label!r}")
    return None if selector.scores is oam_scores else RULES[name](float(threshold))


def attend(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, scale: float, correction: str | None = None
) -> Tensor:
    """flex_attention by its Triton kernel on CUDA, its C++ kernel on a CPU."""
    options = None
    if q.is_cuda and block_mask.BLOCK_SIZE[0] < 128:
        options = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
    backend = "triton" if q.is_cuda else "cpu"
    with torch.no_grad():
        out = sparse_prefill(q, k, v, block_mask, scale=scale, backend=backend, options=options, correction=correction)
    assert isinstance(out, Tensor)
    return out


_current: list[Attend] = []


def _forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    changing = [name for name in ("sliding_window", "softcap", "s_aux", "position_bias") if kwargs.get(name)]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.shape[2] == 1 and attention_mask is None and not changing:  # decoding is dense
        out = scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None
    if changing or attention_mask is not None or query.shape[2] != key.shape[2]:
        raise NotImplementedError(
            f"the benchmark serves plain causal attention over whole prompts, got {changing or 'a mask or a cache'}"
        )
    out = _current[-1](module.layer_idx, query, key, value, scale)
    return out.transpose(1, 2).contiguous(), None


def prepare(model: Any) -> Any:
    """Let every attention layer of ``model`` ask :func:`attending`'s function; returns the model."""
    from transformers import AttentionInterface

    from stem_flex.integrations.hf_versions import implementation

    AttentionInterface.register(IMPLEMENTATION, _forward)
    model.set_attn_implementation(IMPLEMENTATION)
    if implementation(model.config.get_text_config(decoder=True)) != IMPLEMENTATION:
        raise TypeError(f"{type(model).__name__} does not use transformers' attention interface")
    return model


@contextmanager
def attending(attend: Attend) -> Iterator[None]:
    """Prepared models attend by ``attend(layer, q, k, v, scale)`` while the block runs."""
    _current.append(attend)
    try:
        yield
    finally:
        _current.pop()
