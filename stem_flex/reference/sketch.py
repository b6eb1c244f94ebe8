"""The block sketch as it is defined: attention between a few proxies of each block, one proxy at a time."""

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
    token_mask,
    valid_range,
)

Proxy = tuple[Tensor, int]
"""A vector (D,) and the number of tokens that it stands for."""


def sketch_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig | None = None,
    *,
    layout: Any = None,
    q_offset: int | Tensor = 0,
    kv_len: int | Tensor | None = None,
    sketch: tuple[int, int, int, int] = (16, 8, 4, 8),
    coarse: tuple[int, int] | None = None,
    threshold: float = 0.05,
    capacity: int = 256,
    impl: str = "auto",
) -> Tensor:
    """Score of every pair of blocks, mean and largest mass of the key block's proxies. Computed in float64.

    Args:
        q: (B, Hq, Lq, D). k: (B, Hkv, Lk, D). v: not looked at.
        sketch: query outliers, query means, key outliers, key means of a block.
        coarse: query outliers and key outliers of the sketch that proposes what is looked at by ``sketch``: what it
            scores above threshold / 32, or the smallest doubling of that which leaves at most ``capacity`` of a row.
        impl: accepted for the sake of one signature; there is one implementation.

    Returns:
        (B, Hq, Qb, Kb), float64 for float64 inputs, else float32; -inf where the layout allows no token pair.
    """
    config = config or StemConfig()
    (B, Hq, Lq, _), (_, Hkv, Lk, _) = q.shape, k.shape
    BQ, BK = pair(config.block_size)
    allowed = block_classes(token_mask(layout, B, Hq, Lq, Lk, q_offset, kv_len), (BQ, BK)) > 0
    scores = torch.full((B, Hq, blocks(Lq, BQ), blocks(Lk, BK)), -math.inf, dtype=torch.float64, device="cpu")
    offsets = per_row(q_offset, B, 0)
    for b in range(B):
        queries_range = query_range(layout, b, Lk, offsets[b], Lq, kv_len)
        keys_range = valid_range(layout, b, Lk, kv_len)
        for h in range(Hq):
            queries = proxies(q[b, h].double().cpu(), queries_range, BQ, *sketch[:2])
            keys = proxies(k[b, h // (Hq // Hkv)].double().cpu(), keys_range, BK, *sketch[2:])
            few = coarse or (0, 0)
            few_queries = proxies(q[b, h].double().cpu(), queries_range, BQ, few[0], 1)
            few_keys = proxies(k[b, h // (Hq // Hkv)].double().cpu(), keys_range, BK, few[1], 1)
            for i, of_block in enumerate(queries):
                seen = allowed[b, h, i].nonzero().flatten().tolist()
                if not seen:
                    continue
                if coarse is None:
                    scores[b, h, i, seen] = _row(of_block, [keys[j] for j in seen])
                else:
                    fewer = few_queries[i], [few_keys[j] for j in seen]
                    scores[b, h, i, seen] = _looked_at(
                        of_block, [keys[j] for j in seen], *fewer, coarse[0], sketch[0], threshold / 32, capacity
                    )
    return scores if q.dtype == torch.float64 else scores.float()


def proxies(x: Tensor, valid: tuple[int, int], block: int, outliers: int, means: int) -> list[list[Proxy]]:
    """The proxies of each block of one head's x (L, D): only those that stand for tokens of [valid)."""
    found = []
    for first in range(0, x.shape[0], block):
        real = [t for t in range(first, min(first + block, x.shape[0])) if valid[0] <= t < valid[1]]
        of_block: list[Proxy] = []
        if real:
            center = x[real].mean(0)
            far = {t: float((x[t] - center).norm()) for t in real}
            of_block += [(x[t], 1) for t in sorted(real, key=lambda t: (-far[t], t))[:outliers]]
        size = block // means
        for begin in range(first, first + block, size):
            group = [t for t in real if begin <= t < begin + size]
            if group:
                of_block.append((x[group].mean(0), len(group)))
        found.append(of_block)
    return found


def _row(queries: list[Proxy], keys: list[list[Proxy]]) -> Tensor:
    """Scores (J,) of one query block against the key blocks that it sees."""
    of_block = [j for j, block in enumerate(keys) for _ in block]
    places = torch.tensor(of_block, dtype=torch.int64, device="cpu")
    vectors = torch.stack([vector for block in keys for vector, _ in block])
    bias = torch.tensor([math.log(tokens) for block in keys for _, tokens in block], dtype=vectors.dtype, device="cpu")
    total, weights = torch.zeros(len(keys), dtype=vectors.dtype, device="cpu"), 0
    largest = torch.zeros(len(keys), dtype=vectors.dtype, device="cpu")
    for vector, tokens in queries:
        attention = torch.softmax(vectors @ vector / math.sqrt(vector.shape[0]) + bias, 0)
        mass = torch.zeros(len(keys), dtype=vectors.dtype, device="cpu").index_add_(0, places, attention)
        total, weights = total + tokens * mass, weights + tokens
        largest = torch.maximum(largest, mass)
    return total / weights + largest


def _logits(query: Tensor, block: list[Proxy]) -> Tensor:
    """Logits of one query proxy with the proxies of one key block, which count as often as they stand for tokens."""
    return torch.stack([vector @ query / math.sqrt(query.shape[0]) + math.log(tokens) for vector, tokens in block])


def _softmax(logits: list[Tensor]) -> Tensor:
    """Share of each block, whose logits are given, in the softmax over all of them."""
    shares = torch.cat(logits).softmax(0).split([len(of_block) for of_block in logits])
    return torch.stack([share.sum() for share in shares])


def _looked_at(
    queries: list[Proxy], keys: list[list[Proxy]], few_queries: list[Proxy], few_keys: list[list[Proxy]],
    few_outliers: int, outliers: int, lowest: float, capacity: int,
) -> Tensor:  # fmt: skip
    """Scores (J,) of one query block: by all its proxies of the blocks that its few ones propose, else by those."""
    found = _row(few_queries, few_keys)
    while int((found > lowest).sum()) > capacity:
        lowest *= 2
    proposed = (found > lowest).nonzero().flatten().tolist()
    others = [j for j in range(len(keys)) if j not in proposed]
    total, weights = torch.zeros(len(proposed), dtype=found.dtype, device="cpu"), 0
    largest = torch.zeros_like(total)
    real = few_queries[-1][1]  # tokens of the block: what its mean stands for
    for a, (query, tokens) in enumerate(queries):
        stand_in = few_queries[a if a < min(few_outliers, outliers, real) else -1][0]
        if not proposed:
            continue
        mass = _softmax([_logits(query, keys[j]) for j in proposed])
        seen = _softmax([_logits(stand_in, block) for block in few_keys])[proposed].sum()
        beside = [_logits(stand_in, few_keys[j]) for j in others]
        by_size = _softmax([_logits(query, keys[j]) for j in proposed] + beside)[: len(proposed)].sum()
        mass = mass * max(seen, by_size)
        total, weights = total + tokens * mass, weights + tokens
        largest = torch.maximum(largest, mass)
    found[proposed] = total / max(weights, 1) + largest
    return found
