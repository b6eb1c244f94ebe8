"""Rules of the selectors that estimate pairs of blocks in other ways; see :mod:`stem_flex.reference.selectors`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stem_flex.reference.selectors import Head, Rows, antidiagonal_cells, covering, first_and_own, tail, tail_sums


def cosine_mean(x: Tensor) -> float:
    """Mean of all entries of the cosine matrix of tokens (n, D), the diagonal included."""
    return float(torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1).mean()) if len(x) else 0.0


def spargeattn(head: Head, similarity: float, cdf: float | None, topk: float | None) -> Rows:
    """Blocks that are not alike, everything for rows that are not; of the others by softmax of block means."""
    keys = list(range(*head.keys))
    centred = head.k - head.k[keys].mean(0)
    alike = [cosine_mean(centred[list(head.column(j))]) > similarity for j in range(head.columns)]
    found = []
    for i in range(head.rows):
        allowed = head.allowed(i)
        query = head.mean_query(i) / math.sqrt(head.q.shape[1])
        scored = [j for j in allowed if alike[j]]
        if cosine_mean(head.q[list(head.row(i))]) <= similarity:
            found.append(set(allowed))
            continue
        logits = torch.tensor(
            [float(query @ centred[list(head.column(j))].mean(0)) for j in scored], dtype=torch.float32, device="cpu"
        )
        shares = dict(zip(scored, logits.double().softmax(0).tolist(), strict=True))
        order, upto, count = sorted(scored, key=lambda j: -shares[j]), 0.0, 0
        for j in order:
            upto += shares[j]
            count += cdf is not None and upto <= cdf
        if topk is not None:
            count = int(topk * head.columns)
        found.append({j for j in allowed if not alike[j]} | set(order[: max(count, 1)]))
    return found


def cosa(head: Head, top_p: float) -> Rows:
    """First and own block, hot blocks, others, each by mass, while the mass before is less than top_p of the row's."""
    found, n = [], head.block[1] // head.stride
    for i in range(head.rows):
        mass, hot = dict.fromkeys(head.allowed(i), 0.0), set()
        for row in antidiagonal_cells(head, i):
            peak = float(row.max())
            if peak == -math.inf:
                continue
            for j in mass:
                e = math.exp(float(row[j * n : (j + 1) * n].max()) - peak)
                mass[j] += e
                if e >= 0.999:
                    hot.add(j)
        forced = first_and_own(head, i)
        order = sorted(mass, key=lambda j: (j not in forced, j not in hot, -mass[j]))
        found.append(covering(mass, order, forced, top_p))
    return found


def vecattention(head: Head, alpha: float) -> Rows:
    """First and own block, and blocks with a key of at least alpha times the best other key's weight."""
    found = []
    for i in range(head.rows):
        forced, rows = first_and_own(head, i), slice(i * head.block[0], (i + 1) * head.block[0])
        query = head.mean_query(i) / math.sqrt(head.q.shape[1])
        best = {}
        for j in head.allowed(i):
            keys = range(j * head.block[1], min((j + 1) * head.block[1], head.k.shape[0]))
            logits = [float(query @ head.k[t]) for t in keys if bool(head.mask[rows, t].any())]
            if j not in forced:
                best[j] = max(logits)
        highest = max(best.values(), default=0.0)
        found.append(forced | {j for j, x in best.items() if x - math.log(alpha) >= highest})
    return found


def bands(dim: int) -> list[list[int]]:
    """Fast and slow rotary dimensions: the first half and the last three quarters of either half of the head."""
    half = dim // 2
    fast = [*range(half // 2), *range(half, half + half // 2)]
    return [fast, [*range(half - half * 3 // 4, half), *range(dim - half * 3 // 4, dim)]]


def prism(head: Head, part: float) -> Rows:
    """In each band, blocks while those before hold less than ``part``; both bands together."""
    queries = torch.stack([head.mean_query(i) for i in range(head.rows)])
    keys = torch.stack([head.mean_key(j) for j in range(head.columns)])
    found: Rows = [set() for _ in range(head.rows)]
    for index in bands(head.q.shape[1]):
        ratios = [math.sqrt(float(x[:, index].square().mean() / x.square().mean())) for x in (queries, keys)]
        tau = math.sqrt(len(index) / head.q.shape[1]) * ratios[0] * ratios[1]
        logits = queries[:, index] @ keys[:, index].T / (math.sqrt(len(index)) * tau)
        for i in range(head.rows):
            allowed = head.allowed(i)
            if not allowed:
                continue
            shares = dict(zip(allowed, logits[i, allowed].softmax(0).tolist(), strict=True))
            found[i] |= covering(shares, sorted(allowed, key=lambda j: -shares[j]), set(), part)
    return found


def proxyattn(head: Head, pooled: list[tuple[Tensor, Tensor]], group: int, gamma: float) -> Rows:
    """Blocks in the order of the pooled head's largest weights, as many as the head's last queries ask for."""
    queries, keys = pooled[head.index // group]
    size = head.block[1]
    last = tail(head, head.block[0])
    by_key, _ = tail_sums(head, last)
    mass = {j: math.fsum(by_key[j * size : (j + 1) * size]) / len(last) for j in range(head.columns)}
    seen = [j for j in mass if bool(head.mask[last, j * size : (j + 1) * size].any())]
    needed = len(covering({j: mass[j] for j in seen}, sorted(seen, key=lambda j: -mass[j]), set(), gamma))
    found = []
    for i in range(head.rows):
        allowed = head.allowed(i)
        best = dict.fromkeys(allowed, 0.0)
        for t in range(i * head.block[0], min((i + 1) * head.block[0], head.q.shape[0])):
            if t % head.stride or not bool(head.mask[t].any()):
                continue
            logits = (keys @ queries[t] / math.sqrt(head.q.shape[1])).masked_fill(~head.mask[t], -math.inf)
            weights = logits.softmax(0)
            for j in allowed:
                best[j] = max(best[j], float(weights[j * size : (j + 1) * size].max()))
        count = math.ceil(needed * len(allowed) / len(seen) - 1e-4)
        found.append(set(sorted(allowed, key=lambda j: (-best[j], j))[:count]))
    return found


def change_without(head: Head, i: int, j: int) -> float:
    """Root mean square change of row i's outputs when block j is masked out; all of the output if nothing is left."""
    tokens = slice(j * head.block[1], (j + 1) * head.block[1])
    squares = []
    for t in head.row(i):
        if not bool(head.mask[t].any()):
            continue
        logits = head.k @ head.q[t] / math.sqrt(head.q.shape[1])
        mask = head.mask[t].clone()
        before = logits.masked_fill(~mask, -math.inf).softmax(0) @ head.v
        mask[tokens] = False
        left = logits.masked_fill(~mask, -math.inf).softmax(0) @ head.v
        after = left if bool(mask.any()) else torch.zeros_like(before)
        squares.append(float((after - before).square().sum()))
    return math.sqrt(math.fsum(squares) / max(1, len(squares)))
