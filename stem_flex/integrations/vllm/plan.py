"""Which requests of a batch run sparse, from lengths that the host knows. Nothing here needs vLLM or a device."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from stem_flex import selectors
from stem_flex.budget import Schedule, rule_of, tpd_budget
from stem_flex.config import StemConfig
from stem_flex.integrations.hf_settings import Settings, is_prefill


@dataclass(frozen=True)
class Row:
    """One request's part of a batch.

    Attributes:
        index: row of the batch's tables.
        start, stop: its tokens in the batch, half open.
        keys: keys of its last query, that is cached tokens and these.
        prompt: tokens of the whole prompt, None where nobody knows.
        allowed: pairs of blocks that causality allows.
    """

    index: int
    start: int
    stop: int
    keys: int
    prompt: int | None
    allowed: int

    @property
    def queries(self) -> int:
        return self.stop - self.start

    @property
    def offset(self) -> int:
        """Keys before the first query."""
        return self.keys - self.queries


@dataclass(frozen=True)
class Run:
    """Neighbouring requests that vLLM's own class serves: rows [first, last), tokens [start, stop), metadata."""

    first: int
    last: int
    start: int
    stop: int
    metadata: Any = None


@dataclass(frozen=True)
class Plan:
    """A batch with sparse rows, and the runs between them."""

    rows: tuple[Row, ...]
    runs: tuple[Run, ...] = field(default=())


def sparse_rows(
    starts: Sequence[int],
    keys: Sequence[int],
    prefilling: Sequence[bool],
    prompts: Sequence[int | None],
    settings: Settings,
) -> tuple[Row, ...]:
    """The requests that run sparse.

    Args:
        starts: first token of each request, and the end: one more than requests. Equal ones are padding.
        keys: cached and new tokens of each request.
        prefilling: whether the request still reads its prompt; drafts to verify do not.
        prompts: tokens of each whole prompt, None where unknown: then the tokens so far count as it.
        settings: ``min_tokens``, and what chooses.
    """
    rows = []
    rule = {"min_tokens": settings.min_tokens}
    selector = selectors.resolve(settings.selector, settings.config)
    config = selector.configured(settings.config)
    chosen = rule_of(selector.budget if settings.budget is None else settings.budget, config)
    foreseen = settings.min_tokens > 0 and isinstance(chosen, Schedule)  # other rules read scores
    for index, (start, stop) in enumerate(itertools.pairwise(starts)):
        if not prefilling[index] or not is_prefill(rule, stop - start, prompts[index] or keys[index]):
            continue
        if foreseen and keeps_all(keys[index], prompts[index], config):
            continue
        allowed = allowed_pairs(keys[index] - stop + start, stop - start, config)
        rows.append(Row(index, start, stop, keys[index], prompts[index], allowed))
    return tuple(rows)


def runs_between(rows: Sequence[Row], starts: Sequence[int], tokens: int) -> list[tuple[int, int, int, int]]:
    """(first, last, start, stop) of the requests between sparse rows that have tokens; the last takes the padding."""
    runs, first, requests = [], 0, len(starts) - 1
    for index in [*(row.index for row in rows), requests]:
        stop = tokens if index == requests else starts[index]
        if index > first and starts[index] > starts[first]:
            runs.append((first, index, starts[first], stop))
        first = index + 1
    return runs


def keeps_all(keys: int, prompt: int | None, config: StemConfig) -> bool:
    """Whether the budget keeps every block of every row up to ``keys`` keys, forced blocks not counted."""
    block = config.key_block
    return -(-keys // block) <= _dense_blocks(-(-(prompt or keys) // block), config)


@functools.lru_cache(maxsize=4096)
def _dense_blocks(blocks: int, config: StemConfig) -> int:
    choosy = tpd_budget(blocks, config) < torch.arange(1, blocks + 1, device="cpu")
    return int(choosy.int().argmax()) if bool(choosy.any()) else blocks


def allowed_pairs(offset: int, queries: int, config: StemConfig) -> int:
    """Pairs of blocks with an allowed pair of tokens, causal, of one head."""
    ends = torch.arange(config.query_block, queries + config.query_block, config.query_block, device="cpu").clamp(
        max=queries
    )
    return int(((offset + ends - 1) // config.key_block + 1).sum())
