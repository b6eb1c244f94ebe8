"""The published selectors' rules, one head at a time, by loops in float64: what each keeps before forced blocks.

Each rule is a function of a :class:`Head` and its options that returns the set of blocks kept by every row.
:func:`kept` runs one over all heads and unites it with the configuration's forced blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stem_flex.reference.selection import forced_blocks
from stem_flex.reference.structure import (
    RowPlace,
    blocks,
    pair,
    per_row,
    query_range,
    row_places,
    token_mask,
    valid_range,
)

Rows = list[set[int]]


@dataclass(frozen=True)
class Head:
    """One query head: q (Lq, D), k (Lk, D), v (Lk, Dv) in float64, its token mask (Lq, Lk), where its rows stand."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor
    block: tuple[int, int]
    stride: int
    offset: int
    queries: tuple[int, int]
    keys: tuple[int, int]
    places: list[RowPlace]
    index: int

    @property
    def rows(self) -> int:
        return blocks(self.q.shape[0], self.block[0])

    @property
    def columns(self) -> int:
        return blocks(self.k.shape[0], self.block[1])

    def row(self, i: int) -> range:
        """Real local queries of row i."""
        first, last = i * self.block[0], min((i + 1) * self.block[0], self.q.shape[0])
        return range(max(first, self.queries[0]), min(last, self.queries[1]))

    def column(self, j: int) -> range:
        """Real keys of block j."""
        first, last = j * self.block[1], min((j + 1) * self.block[1], self.k.shape[0])
        return range(max(first, self.keys[0]), min(last, self.keys[1]))

    def allowed(self, i: int) -> list[int]:
        """Blocks that row i may see some of."""
        rows = slice(i * self.block[0], (i + 1) * self.block[0])
        size = self.block[1]
        return [j for j in range(self.columns) if bool(self.mask[rows, j * size : (j + 1) * size].any())]

    def mean_query(self, i: int) -> Tensor:
        tokens = list(self.row(i))
        return self.q[tokens].mean(0) if tokens else torch.zeros_like(self.q[0])

    def mean_key(self, j: int) -> Tensor:
        tokens = list(self.column(j))
        return self.k[tokens].mean(0) if tokens else torch.zeros_like(self.k[0])

    def weights(self, queries: list[int]) -> Tensor:
        """Dense attention (queries, Lk); zero rows for queries that see nothing."""
        logits = self.q[queries] @ self.k.T / math.sqrt(self.q.shape[1])
        weights = logits.masked_fill(~self.mask[queries], -math.inf).softmax(-1)
        return weights.nan_to_num(nan=0.0)


Rule = Callable[..., Rows]


def kept(
    rule: Rule, q: Tensor, k: Tensor, v: Tensor, config: Any, *, layout: Any = None, q_offset: int | Tensor = 0,
    **options: Any,
) -> Tensor:  # fmt: skip
    """bool (B, Hq, Qb, Kb): what ``rule`` and the forced blocks of ``config`` keep together."""
    (B, Hq, Lq, _), (_, Hkv, Lk, _) = q.shape, k.shape
    size, masks = pair(config.block_size), token_mask(layout, B, Hq, Lq, Lk, q_offset)
    keep = torch.zeros(B, Hq, blocks(Lq, size[0]), blocks(Lk, size[1]), dtype=torch.bool, device="cpu")
    offsets = per_row(q_offset, B, 0)
    for b in range(B):
        places = row_places(layout, b, Lq, Lk, size, q_offset)
        queries, keys = query_range(layout, b, Lk, offsets[b], Lq, None), valid_range(layout, b, Lk)
        for h in range(Hq):
            g = h // (Hq // Hkv)
            head = Head(q[b, h].double(), k[b, g].double(), v[b, g].double(), masks[b, h], size, config.stride,
                        offsets[b], queries, keys, places, h)  # fmt: skip
            for i, chosen in enumerate(rule(head, **options)):
                allowed, place = head.allowed(i), places[i]
                forced = forced_blocks(allowed, place.own_lo, place.own_hi, config.sink_blocks, config.local_blocks)
                keep[b, h, i, sorted((chosen & set(allowed)) | forced)] = True
    return keep


def share_of_row(values: dict[int, float]) -> dict[int, float]:
    """Values divided by their sum."""
    total = math.fsum(values.values())
    return {j: x / total if total else 0.0 for j, x in values.items()}


def a_shape(head: Head, initial: int, local: int, last: int = 0) -> Rows:
    """Blocks with a pair within ``local`` tokens, the first blocks, everything for the prompt's ``last`` queries."""
    found = []
    prompt_end = min(head.queries[1], head.q.shape[0])
    for i in range(head.rows):
        allowed = head.allowed(i)
        first = i * head.block[0] + head.offset
        chosen = {j for j in allowed if first - (min((j + 1) * head.block[1], head.k.shape[0]) - 1) < local}
        if allowed:
            chosen |= set(range(allowed[0], allowed[0] + blocks(initial, head.block[1])))
        if any(t >= prompt_end - last for t in head.row(i)):
            chosen |= set(allowed)
        found.append(chosen)
    return found


def tail(head: Head, rows: int) -> list[int]:
    """The last ``rows`` real local queries."""
    first, last = head.queries
    return list(range(max(first, last - rows), last))


def tail_sums(head: Head, queries: list[int]) -> tuple[list[float], list[float]]:
    """Attention of some queries, summed by key and by offset (query place - key place)."""
    weights = head.weights(queries)
    length = head.k.shape[0]
    by_key, by_offset = [0.0] * length, [0.0] * length
    for t, row in zip(queries, weights.tolist(), strict=True):
        for j, x in enumerate(row):
            if x:
                by_key[j] += x
                by_offset[t + head.offset - j] += x
    return by_key, by_offset


def minference(head: Head, columns: int, offsets: int) -> Rows:
    """Blocks of the best columns, and blocks that hold a pair of tokens at one of the best offsets."""
    by_key, by_offset = tail_sums(head, tail(head, 64))
    length = head.k.shape[0]
    columns, offsets = min(length, max(columns, 30)), min(length, max(offsets, min(50, length)))
    for j in range(30):
        if head.keys[0] + j < length:
            by_key[head.keys[0] + j] = math.inf
    for o in range(min(100, length)):
        by_offset[o] = math.inf
    best_keys = sorted(range(length), key=lambda j: -by_key[j])[:columns]
    best_offsets = set(sorted(range(length), key=lambda o: -by_offset[o])[:offsets])
    hit = {j // head.block[1] for j in best_keys}
    found = []
    for i in range(head.rows):
        first, end = i * head.block[0], min((i + 1) * head.block[0], head.q.shape[0])
        chosen = set(hit)
        for j in head.allowed(i):
            keys = range(j * head.block[1], min((j + 1) * head.block[1], length))
            spans = range(first + head.offset - keys[-1], end - 1 + head.offset - keys[0] + 1)
            if best_offsets.intersection(spans):
                chosen.add(j)
        found.append(chosen)
    return found


def tokens_for(mass: list[float], gamma: float) -> int:
    """Entries whose running sum, largest first, is at most gamma, plus one."""
    upto, count = 0.0, 0
    for x in sorted(mass, reverse=True):
        upto += x
        count += upto <= gamma
    return count + 1


def flexprefill(head: Head, gamma: float, tau: float, min_budget: int, max_budget: int | None) -> Rows:
    """Columns and diagonals of blocks, or those few and the largest block-mean weights of the whole head."""
    length, block = head.k.shape[0], head.block[1]
    least = blocks(min_budget, block)
    if length <= max(256, least * block):
        return [set(head.allowed(i)) for i in range(head.rows)]
    most = head.columns if max_budget is None else min(blocks(max_budget, block), head.columns)
    queries = tail(head, head.block[0])
    by_key, by_offset = ([x / len(queries) for x in sums] for sums in tail_sums(head, queries))
    vertical, slash = ([math.fsum(x[j * block : (j + 1) * block]) for j in range(head.columns)]
                       for x in (by_key, by_offset))  # fmt: skip
    seen = [j for j in range(head.columns) if bool(head.mask[queries, j * block : (j + 1) * block].any())]
    mean = head.q[queries].mean(0) / math.sqrt(head.q.shape[1])
    estimate = [0.0] * head.columns
    for j, x in zip(seen, torch.stack([mean @ head.mean_key(j) for j in seen]).softmax(0).tolist(), strict=True):
        estimate[j] = x
    distance = math.sqrt(max(0.0, sum(_entropy_part(a, b) + _entropy_part(b, a)
                                      for a, b in zip(estimate, vertical, strict=True)) / 2))  # fmt: skip
    aware = distance < tau
    number = [least if aware else min(max(tokens_for(x, gamma) // block + 1, least), most) for x in (by_key, by_offset)]
    vertical[head.keys[0] // block] = slash[0] = math.inf
    columns = set(sorted(range(head.columns), key=lambda j: -vertical[j])[: number[0]])
    diagonals = set(sorted(range(head.columns), key=lambda d: -slash[d])[: number[1]])
    found = []
    for i in range(head.rows):
        own = head.places[i].own_hi - 1
        found.append({j for j in head.allowed(i) if j in columns or own - j in diagonals})
    if aware:
        for i, j in block_mean_entries(head, gamma):
            found[i].add(j)
    return found


def _entropy_part(a: float, b: float) -> float:
    return a * math.log(2 * a / (a + b)) if a > 0 else 0.0


def block_mean_entries(head: Head, gamma: float) -> list[tuple[int, int]]:
    """Largest entries of the block-mean attention whose sum stays within gamma of its rows."""
    entries = []
    for i in range(head.rows):
        allowed = head.allowed(i)
        if allowed:
            query = head.mean_query(i) / math.sqrt(head.q.shape[1])
            weights = torch.stack([query @ head.mean_key(j) for j in allowed]).softmax(0)
            entries += [(x, i, j) for j, x in zip(allowed, weights.tolist(), strict=True)]
    limit, upto, taken = gamma * math.fsum(x for x, _, _ in entries), 0.0, []
    for x, i, j in sorted(entries, reverse=True):
        upto += x
        if upto <= limit:
            taken.append((i, j))
    return taken


def antidiagonal_cells(head: Head, i: int) -> Tensor:
    """Scaled antidiagonal sums (cells of row i, cells of all keys); -inf where no pair of the cell is allowed."""
    s, (Lq, Lk) = head.stride, head.mask.shape
    n = head.block[0] // s
    cells = torch.full((n, blocks(Lk, s)), -math.inf, dtype=torch.float64, device="cpu")
    real_q, real_k = range(*head.queries), range(*head.keys)
    for a in range(n):
        start = i * head.block[0] + a * s
        for b in range(cells.shape[1]):
            if not bool(head.mask[start : min(start + s, Lq), b * s : b * s + s].any()):
                continue
            pairs = [(start + s - 1 - r, b * s + r) for r in range(s)]
            terms = [head.q[x] @ head.k[y] for x, y in pairs if x in real_q and y in real_k]
            cells[a, b] = sum(float(x) for x in terms) / (math.sqrt(head.q.shape[1]) * s)
    return cells


def first_and_own(head: Head, i: int) -> set[int]:
    """The first block a row may see, and the blocks of its own positions."""
    allowed, place = head.allowed(i), head.places[i]
    return {*allowed[:1], *range(place.own_lo, place.own_hi)} & set(allowed)


def covering(shares: dict[int, float], order: list[int], forced: set[int], part: float) -> set[int]:
    """Forced blocks, then blocks in ``order`` while what is held is less than ``part`` of the sum."""
    held, total = math.fsum(shares[j] for j in forced), math.fsum(shares.values())
    chosen = set(forced)
    for j in order:
        if j not in forced and (held < part * total or part >= 1):
            chosen.add(j)
            held += shares[j]
    return chosen


def xattention(head: Head, threshold: float | list[float]) -> Rows:
    """First and own block, then the best by antidiagonal mass until the threshold is held."""
    part = threshold[head.index] if isinstance(threshold, list) else threshold
    found, n = [], head.block[1] // head.stride
    for i in range(head.rows):
        weights = antidiagonal_cells(head, i).softmax(-1).nan_to_num(nan=0.0).sum(0)
        mass = {j: float(weights[j * n : (j + 1) * n].sum()) for j in head.allowed(i)}
        order = sorted(mass, key=lambda j: -mass[j])
        found.append(covering(mass, order, first_and_own(head, i), part))
    return found


def flashprefill(head: Head, alpha: float, full_rows: int) -> Rows:
    """Blocks from alpha of the row's best sum of exponentials; everything in the last rows of the prompt."""
    found = []
    for i in range(head.rows):
        allowed, place = head.allowed(i), head.places[i]
        sums = dict.fromkeys(allowed, 0.0)
        for j in allowed:
            mean, keys = head.mean_key(j), list(head.column(j))
            rows = list(head.row(i))
            if keys and rows:
                sees_all = head.mask[rows][:, keys].all(1)
                sums[j] = float((head.q[rows] @ mean / math.sqrt(head.q.shape[1])).exp()[sees_all].sum())
        best = max(sums.values(), default=0.0)
        full = place.position >= place.prompt_blocks - full_rows
        found.append({j for j in allowed if full or sums[j] >= alpha * best})
    return found
