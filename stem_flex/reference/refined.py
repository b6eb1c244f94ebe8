"""Trained sparse attention with Stem's budget and value magnitude, one query at a time (stem_flex.selectors.refine)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stem_flex.config import StemConfig


def decayed(position: int, prompt: int, keep: int, config: StemConfig) -> int:
    """Keys that the row at ``position`` of a prompt of ``prompt`` keys keeps, of a constant budget of ``keep``."""
    if config.schedule == "paper":
        return min(keep, max(1, math.ceil(keep - keep * (1 - config.mu) * position / prompt)))
    if position < keep or prompt - keep <= 1:
        return keep
    decay = torch.linspace(keep, config.mu * keep, prompt - keep, dtype=torch.float64, device="cpu")
    return min(keep, max(1, math.floor(decay[position - keep].item())))


def magnitude(norms: Tensor, key_size: int, config: StemConfig) -> Tensor:
    """Value magnitude of keys of ``key_size`` tokens from the norms of one row's and head's real tokens."""
    norms = norms.double()
    groups = list(norms.split(key_size))
    if config.metric == "log":
        return torch.stack([group.max().log().clamp(min=0) for group in groups])
    size = min(config.stride, key_size)
    parts = list(norms.split(size))
    logs = torch.stack([(part.max() + 1e-6).log() for part in parts])
    whole = logs[[len(part) == size for part in parts]]
    if len(whole) < 2:
        return torch.zeros(len(groups), dtype=torch.float64, device="cpu")
    z = ((logs - whole.mean()) / (whole.std() + 1e-6)).clamp(min=0)
    per_key = key_size // size  # parts of a key that have no token count as 0
    return torch.stack([z[i * per_key : (i + 1) * per_key].sum() / per_key for i in range(len(groups))])


def best(scores: list[float], count: int) -> list[int]:
    """The ``count`` best places: ties to the earlier, NaN after everything."""
    return sorted(range(len(scores)), key=lambda i: (math.isnan(scores[i]), -scores[i], i))[:count]


def dsa_keep(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    v: Tensor,
    config: StemConfig,
    *,
    keep: int,
    start: list[int] | None = None,
    end: list[int] | None = None,
    q_offset: int = 0,
    prompt_len: list[int] | None = None,
) -> Tensor:
    """Which key tokens DSA with Stem keeps for each query token, bool (B, Lq, Lk).

    Args:
        q: (B, Hi, Lq, Di); k: (B, Lk, Di); weights: (B, Lq, Hi); v: (B, Hkv, Lk, Dv).
        start, end: real keys of each batch row. None: all.
        prompt_len: real tokens of each row's prompt. None: its real keys.
    """
    batch, heads, queries, _ = q.shape
    keys = k.shape[1]
    kept = torch.zeros(batch, queries, keys, dtype=torch.bool, device="cpu")
    for b in range(batch):
        lo, hi = 0 if start is None else start[b], keys if end is None else end[b]
        prompt = hi - lo if prompt_len is None else prompt_len[b]
        bonus = magnitude(v[b, :, lo:hi].transpose(0, 1).flatten(1).double().norm(dim=-1), 1, config)
        for row in range(queries):
            position = q_offset + row
            if not lo <= position < hi:
                continue
            scores = bonus[: position + 1 - lo] * config.value_weight
            for head in range(heads):
                products = k[b, lo : position + 1].double() @ q[b, head, row].double()
                scores = scores + weights[b, row, head].double() * products.clamp(min=0)
            count = decayed(min(position - lo, prompt - 1), prompt, keep, config)
            for place in best(scores.tolist(), count):
                kept[b, row, lo + place] = True
    return kept


def infllm_keep(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig,
    *,
    keep: int,
    block: int = 64,
    window: int = 32,
    stride: int = 16,
    first: int = 1,
    local: int = 33,
    q_offset: int = 0,
    end: list[int] | None = None,
    prompt_len: list[int] | None = None,
    threshold: float = -1.0,
) -> Tensor:
    """Which blocks InfLLM-v2 with Stem keeps for each query token and KV head, bool (B, Hkv, Lq, Kb).

    Beside the forced blocks no more than have a mass above ``threshold``.
    """
    (batch, heads, queries, dim), kv_heads, keys = q.shape, k.shape[1], k.shape[2]
    group, blocks = heads // kv_heads, -(-keys // block)
    kept = torch.zeros(batch, kv_heads, queries, blocks, dtype=torch.bool, device="cpu")
    for b in range(batch):
        hi = keys if end is None else end[b]
        prompt = -(-(hi if prompt_len is None else prompt_len[b]) // block)
        for h in range(kv_heads):
            bonus = magnitude(v[b, h, :hi].double().norm(dim=-1), block, config)
            for row in range(queries):
                position = q_offset + row
                if position >= hi:
                    continue
                own = position // block
                starts = range(0, position - window + 2, stride)
                mass = torch.zeros(len(starts), dtype=torch.float64, device="cpu")
                if len(starts):
                    means = torch.stack([k[b, h, s : s + window].double().mean(0) for s in starts])
                    for g in range(group):
                        logits = means @ q[b, h * group + g, row].double() / math.sqrt(dim)
                        mass += logits.softmax(-1)
                scores, above = [], 0
                for j in range(own + 1):
                    if j < first or j > own - local:
                        scores.append(math.inf)
                        above += 1
                        continue
                    over = [
                        m for s, m in zip(starts, mass, strict=True) if s < (j + 1) * block and s + window > j * block
                    ]
                    worth = max(over).item() if over else 0.0
                    above += worth > threshold
                    scores.append(worth * math.exp(config.value_weight * bonus[j]))
                count = max(first + local, min(above, decayed(min(own, prompt - 1), prompt, keep, config)))
                kept[b, h, row, best(scores, count)] = True
    return kept
