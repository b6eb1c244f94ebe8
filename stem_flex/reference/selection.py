"""Budgets, scores and ranking, written the way the paper and the published operator define them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stem_flex.config import StemConfig
from stem_flex.reference.structure import (
    block_classes,
    blocks,
    pair,
    per_row,
    query_range,
    row_places,
    token_mask,
    valid_range,
)

ENVELOPE_STEPS = range(1, 400)  # the operator's regimes end at 160 blocks and catch up with their peak at 310


def operator_k(n: int) -> int:
    """Blocks of the first rows in a prompt of n blocks, published operator."""
    if n < 56:
        return n
    return int(0.2 * n + 30) if n < 160 else int(0.1 * n) + 30


def tpd_budget(
    num_blocks: int, config: StemConfig | None = None, *, device: torch.device | str | None = None
) -> Tensor:
    """Token Position-Decay, row by row (arXiv 2603.06274, and the length regimes of the published operator).

    Returns:
        (num_blocks,) int32: blocks of each row, before the forced ones and before clipping to the mask.
    """
    config, device = config or StemConfig(), torch.device("cpu") if device is None else device
    n, mu = num_blocks, config.mu
    if config.schedule == "paper":
        k = max(54.0, (0.2 if n <= 128 else 0.1) * n)
        rows = [max(1, math.ceil(k - k * (1 - mu) * i / n)) for i in range(n)]
        return torch.tensor(rows, dtype=torch.int32, device=device)
    if config.schedule == "operator":
        k = operator_k(n)
    elif config.schedule == "envelope":
        k = max(operator_k(m) for m in (*ENVELOPE_STEPS, n) if m <= n)
    else:
        start = config.k_start
        k = start if isinstance(start, int) else max(1, int(start * n))  # type: ignore[operator]
    rows = [k] * n
    if n - k > 1:
        decay = torch.linspace(k, mu * k, n - k, dtype=torch.float64, device="cpu")
        for i in range(k, n):
            rows[i] = min(max(math.floor(decay[i - k].item()), 1), k)
    return torch.tensor(rows, dtype=torch.int32, device=device)


def oam_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig | None = None,
    *,
    layout: Any = None,
    q_offset: int | Tensor = 0,
    kv_len: int | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Output-Aware Metric of every block pair, by the literal (N / stride)^2 definition.

    Strided antidiagonal scores of single cells, then a plain mean over the cells of a block pair, future and
    padded cells included. Computed in float64.

    Args:
        q: (B, Hq, Lq, D). k: (B, Hkv, Lk, D). v: (B, Hkv, Lk, Dv).
        impl: accepted for the sake of one signature; there is one implementation.

    Returns:
        (B, Hq, Qb, Kb), float64 for float64 inputs, else float32; -inf where the layout allows no token pair.
    """
    scores = _exact_scores(q, k, v, config or StemConfig(), layout, q_offset, kv_len)
    return scores if q.dtype == torch.float64 else scores.float()


def _exact_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig,
    layout: Any,
    q_offset: int | Tensor,
    kv_len: int | Tensor | None,
) -> Tensor:
    (B, Hq, Lq, _), (_, Hkv, Lk, _) = q.shape, k.shape
    BQ, BK = pair(config.block_size)
    Kb = blocks(Lk, BK)
    scores = torch.empty(B, Hq, blocks(Lq, BQ), Kb, dtype=torch.float64, device="cpu")
    offsets = per_row(q_offset, B, 0)
    for b in range(B):
        keys = valid_range(layout, b, Lk, kv_len)
        queries = query_range(layout, b, Lk, offsets[b], Lq, kv_len)
        for h in range(Hq):
            g = h // (Hq // Hkv)
            qh = _zero_outside(q[b, h].double().cpu(), queries, BQ)
            kh = _zero_outside(k[b, g].double().cpu(), keys, BK)
            scores[b, h] = _routing(qh, kh, config.stride, BQ, BK)
            if config.value_weight:
                bonus = value_magnitude(v[b, g].double().cpu(), keys, config)
                scores[b, h] += config.value_weight * bonus
    allowed = block_classes(token_mask(layout, B, Hq, Lq, Lk, q_offset, kv_len), (BQ, BK)) > 0
    return scores.masked_fill(~allowed, -math.inf)


def _zero_outside(x: Tensor, valid: tuple[int, int], block: int) -> Tensor:
    """x (L, D) with zeros for invalid tokens, and zeros appended up to a whole number of blocks."""
    out = torch.zeros(blocks(x.shape[0], block) * block, x.shape[1], dtype=x.dtype, device=x.device)
    out[valid[0] : valid[1]] = x[valid[0] : valid[1]]
    return out


def _routing(q: Tensor, k: Tensor, stride: int, BQ: int, BK: int) -> Tensor:
    """(Qb, Kb) mean strided antidiagonal score of one head; q and k whole blocks long."""
    cells = torch.zeros(q.shape[0] // stride, k.shape[0] // stride, dtype=q.dtype, device=q.device)
    for r in range(stride):
        cells += q[stride - 1 - r :: stride] @ k[r::stride].T
    nq, nk = BQ // stride, BK // stride
    # Scaled last: the means of small integers are exact, so equal scores stay equal.
    means = [[part.mean() for part in rows.split(nk, dim=1)] for rows in cells.split(nq, dim=0)]
    cells = torch.tensor([[x.item() for x in row] for row in means], dtype=q.dtype, device=q.device)
    return cells / (math.sqrt(q.shape[1]) * stride)


def value_magnitude(v: Tensor, valid: tuple[int, int], config: StemConfig) -> Tensor:
    """Magnitude (Kb,) of the values of every key block, for one head's v (Lk, Dv); ``valid`` keys only."""
    BK, s = pair(config.block_size)[1], config.stride
    norms = [0.0 if math.isnan(norm) else norm for norm in v.norm(dim=-1).tolist()]
    Kb = blocks(len(norms), BK)

    def valid_norms(start: int, size: int) -> list[float]:
        return [norms[j] for j in range(max(start, valid[0]), min(start + size, valid[1], len(norms)))]

    if config.metric == "log":
        largest = [max(valid_norms(J * BK, BK), default=0.0) for J in range(Kb)]
        logs = [max(0.0, math.log(x)) if x > 0 else 0.0 for x in largest]
        return torch.tensor(logs, dtype=torch.float64, device="cpu")
    groups = [valid_norms(g * s, s) for g in range(Kb * BK // s)]
    logs = [math.log(max(group, default=0.0) + 1e-6) for group in groups]
    complete = [x for x, group in zip(logs, groups, strict=True) if len(group) == s]
    if len(complete) < 2:
        return torch.zeros(Kb, dtype=torch.float64, device="cpu")
    mean = math.fsum(complete) / len(complete)
    std = math.sqrt(math.fsum((x - mean) ** 2 for x in complete) / (len(complete) - 1))
    relu_z = [max(0.0, (x - mean) / (std + 1e-6)) if g else 0.0 for x, g in zip(logs, groups, strict=True)]
    return torch.tensor(relu_z, dtype=torch.float64, device="cpu").reshape(Kb, BK // s).mean(dim=1)


def rank(scores: list[float], candidates: list[int]) -> list[int]:
    """Candidates from best to worst: higher score first, ties to the lower index, NaN after -inf."""

    def key(J: int) -> tuple[bool, float, int]:
        missing = math.isnan(scores[J])
        return missing, 0.0 if missing else -scores[J], J

    return sorted(candidates, key=key)


def forced_blocks(allowed: list[int], own_lo: int, own_hi: int, sink: int, local: int) -> set[int]:
    """Blocks that are kept whatever their score: the row's first ``sink``, its last ``local``, its own."""
    if not allowed:
        return set()
    wanted = {*range(allowed[0], allowed[0] + sink), *range(own_hi - local, own_hi), *range(own_lo, own_hi)}
    return wanted & set(allowed)


def row_budgets(budget: int | Tensor, B: int, Hq: int, Qb: int) -> Tensor:
    """A budget given as int, (Qb,), (Hq, Qb) or (B, Hq, Qb), for every row: (B, Hq, Qb)."""
    given = budget if isinstance(budget, Tensor) else torch.tensor(budget, dtype=torch.int64, device="cpu")
    return given.cpu().broadcast_to(B, Hq, Qb)


def block_keep(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig | None = None,
    *,
    layout: Any = None,
    q_offset: int | Tensor = 0,
    prompt_len: int | Tensor | None = None,
    kv_len: int | Tensor | None = None,
    budget: int | Tensor | None = None,
    scores: Tensor | None = None,
) -> Tensor:
    """The block pairs Stem keeps, by ranking every row in Python.

    Args:
        budget: overrides TPD: int, (Qb,), (Hq, Qb) or (B, Hq, Qb); less than 1 counts as 1.
        scores: (B, Hq, Qb, Kb) to rank instead of the Output-Aware Metric.

    Returns:
        (B, Hq, Qb, Kb) bool, True = kept.
    """
    config = config or StemConfig()
    (B, Hq, Lq, _), Lk = q.shape, k.shape[2]
    size = pair(config.block_size)
    values = _exact_scores(q, k, v, config, layout, q_offset, kv_len) if scores is None else scores
    allowed = block_classes(token_mask(layout, B, Hq, Lq, Lk, q_offset, kv_len), size) > 0
    keep = torch.zeros_like(allowed)
    Qb = allowed.shape[2]
    given = None if budget is None else row_budgets(budget, B, Hq, Qb)
    for b in range(B):
        places = row_places(layout, b, Lq, Lk, size, q_offset, kv_len, prompt_len)
        for i, place in enumerate(places):
            rows = tpd_budget(place.prompt_blocks, config)
            for h in range(Hq):
                count = int(rows[place.position] if given is None else given[b, h, i])
                candidates = allowed[b, h, i].nonzero().flatten().tolist()
                best = rank(values[b, h, i].tolist(), candidates)[: max(count, 1)]
                forced = forced_blocks(candidates, place.own_lo, place.own_hi, config.sink_blocks, config.local_blocks)
                keep[b, h, i, sorted({*best, *forced})] = True
    return keep
