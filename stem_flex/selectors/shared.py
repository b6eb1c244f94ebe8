"""What the published selectors share: their binding, products without repeated keys, block means, the last queries."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from stem_flex.config import StemConfig
from stem_flex.layout import Layout
from stem_flex.plumbing.binding import BoundLayout
from stem_flex.plumbing.checks import check_config, check_qkv
from stem_flex.plumbing.classes import EMPTY
from stem_flex.plumbing.geometry import Spans
from stem_flex.score import bind_to
from stem_flex.select import forced_blocks


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig | None,
    layout: Layout | BoundLayout | None,
    q_offset: int | Tensor,
) -> tuple[StemConfig, BoundLayout]:
    """The configuration and the layout bound to q and k; raises as :func:`stem_flex.oam_scores` does."""
    config = check_config(config)
    check_qkv(q, k, v)
    return config, bind_to(q, k, layout, q_offset=q_offset, kv_len=None, prompt_len=None, config=config)


def spans_of(bound: BoundLayout, name: str) -> Spans:
    """The keys of each query, int32 (1 or B, Qb * query block).

    Raises:
        ValueError: the layout is no interval of keys for each query.
    """
    spans = bound.intervals()
    if spans is None:
        raise ValueError(
            f"layout must give every query one interval of keys for {name}, got a mask_mod or a BlockMask; "
            "use causal(), sliding_window(), padding(), prefix() or documents(), or selector='stem'"
        )
    return spans


def hide(scores: Tensor, bound: BoundLayout) -> Tensor:
    """float32 scores with -inf where the layout allows nothing."""
    return scores.float().masked_fill(bound.dense_classes() == EMPTY, -math.inf)


def operand(x: Tensor) -> Tensor:
    """x in the dtype it is multiplied in: its own on CUDA, float32 at least on a CPU."""
    x = x.detach()
    return x if x.is_cuda or x.dtype == torch.float64 else x.float()


def product(q: Tensor, k: Tensor, scale: float = 1.0) -> Tensor:
    """``scale * q @ k.mT`` for q (B, Hq, R, D) and k (B, Hkv, X, D): (B, Hq, R, X), no key repeated."""
    batch, heads, rows, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    left = q.reshape(batch * kv_heads, heads // kv_heads * rows, dim)
    right = k.reshape(batch * kv_heads, keys, dim).mT
    found = torch.baddbmm(left.new_empty(1, 1, 1), left, right, beta=0, alpha=scale)
    return found.view(batch, heads, rows, keys)


def filled(x: Tensor, dim: int, multiple: int, value: float = 0.0) -> Tensor:
    """x with ``value`` appended along ``dim`` up to a multiple; x itself where it is one, which pad would copy."""
    missing = -x.shape[dim] % multiple
    if not missing:
        return x
    return torch.nn.functional.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, missing), value=value)


def block_means(x: Tensor, block: int, start: Tensor | None, end: Tensor | None) -> Tensor:
    """Mean of the real tokens of each block, (B, H, L, D) to (B, H, blocks, D), zero where there are none.

    Sums are float32 (float64), the result has x's dtype as :func:`operand` takes it.
    """
    sums, counts = block_sums(x, block, start, end)
    return (sums / counts.clamp(min=1)[:, None, :, None].to(sums.dtype)).to(operand(x[:1, :1, :1]).dtype)


def block_sums(x: Tensor, block: int, start: Tensor | None, end: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum of the real tokens of each block, and how many they are: (B, H, blocks, D) and (1 or B, blocks)."""
    x = operand(x)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    real = real_tokens(x.shape[2], start, end, x.device)
    if start is not None:
        x = torch.where(real[:, None, :, None], x, 0)
    whole = x.shape[2] // block * block
    sums = x[:, :, :whole].unflatten(2, (-1, block)).sum(3, dtype=wide)
    if whole < x.shape[2]:
        sums = torch.cat([sums, x[:, :, whole:].sum(2, keepdim=True, dtype=wide)], 2)
    padded = torch.nn.functional.pad(real, (0, -real.shape[1] % block))
    return sums, padded.unflatten(1, (-1, block)).sum(-1)


def real_tokens(length: int, start: Tensor | None, end: Tensor | None, device: torch.device) -> Tensor:
    """Which tokens are no padding, bool (1 or B, length)."""
    token = torch.arange(length, device=device)[None]
    if start is None or end is None:
        return torch.ones_like(token, dtype=torch.bool)
    return (token >= start[:, None]) & (token < end[:, None])


def last_key(bound: BoundLayout, queries: int) -> int:
    """No query before the ``queries``-th sees a key from here on, as far as the host knows."""
    offset = bound.causal_offset
    return bound.seq_lengths[1] if offset is None else max(1, min(bound.seq_lengths[1], offset + queries))


def clear_keys(bound: BoundLayout, query: int) -> int:
    """All queries from the ``query``-th on see all keys before this one, as far as the host knows."""
    offset = bound.geometry.q_offset
    if not bound.layout.plain_causal or isinstance(offset, Tensor) or bound.geometry.kv_len is not None:
        return 0
    return min(bound.seq_lengths[1], offset + query)


class Tail(NamedTuple):
    """The last real queries of each batch row.

    q: (B, Hq, R, D). start, end: int32 (1 or B, R), the keys of each, empty for one that stands for none.
    real: bool (1 or B, R). position: int (1 or B,), one past the last query's place among the keys. clear: all of
    them see all keys before this one, as far as the host knows; not 0: every one of them sees a key.
    """

    q: Tensor
    start: Tensor
    end: Tensor
    real: Tensor
    position: Tensor
    clear: int


def tail_of(q: Tensor, bound: BoundLayout, rows: int, name: str) -> Tail:
    """The last ``rows`` real queries of each batch row.

    Raises:
        ValueError: the layout has several prompts in a row, lets queries see the future, or is no interval.
    """
    spans = spans_of(bound, name)
    parts = bound.layout.parts()
    if any(part.document_spans() is not None for part in parts) or not any(part.forbids_future() for part in parts):
        raise ValueError(
            f"layout must be causal and of one prompt for {name}, whose pattern is that of the prompt's last queries, "
            f"got {type(bound.layout).__name__}; use another selector, or selector='stem', for documents and full masks"
        )
    length = q.shape[2]
    rows = min(rows, length)
    offset = bound.geometry.column(bound.geometry.q_offset)[:, 0]
    if bound.query_start is None or bound.query_end is None:
        part = slice(length - rows, length)
        real = torch.ones(1, rows, dtype=torch.bool, device=q.device)
        clear = clear_keys(bound, length - rows)
        first, last = spans.start[:, part], spans.end[:, part]
        return Tail(q[:, :, part], first, last, real, offset + length, clear)
    index = bound.query_end[:, None] - rows + torch.arange(rows, device=q.device)
    real = index >= bound.query_start[:, None]
    index = index.clamp(min=0, max=length - 1).long()
    picked = q.gather(2, index[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
    start, end = (x.expand(index.shape[0], -1).gather(1, index) for x in spans)
    return Tail(picked, start, torch.where(real, end, start), real, offset + bound.query_end, 0)


def tail_attention(tail: Tail, k: Tensor, impl: str = "torch") -> tuple[Tensor, Tensor]:
    """Sums of the softmax of the last queries over key columns and over diagonals.

    Returns:
        float32 (float64) (B, Hq, Lk) twice: by key, and by offset, query place - key place.

    Raises:
        TypeError: float64 for Triton.
    """
    if impl == "triton":
        from stem_flex.kernels.selector_ops import tail_sums

        columns, diagonals = tail_sums(tail.q, k, tail.start, tail.end)
    else:
        columns, diagonals = _tail_sums(tail, k)
    rows, length = tail.q.shape[2], k.shape[2]
    # row r and key n are o = position - rows + r - n apart: their entry, rows + n - r, is position - o
    entry = (tail.position[:, None] - torch.arange(length, device=k.device)).long()
    found = diagonals.gather(2, entry.clamp(min=0, max=rows + length - 1)[:, None].expand(*columns.shape[:2], -1))
    return columns, found * ((entry >= 0) & (entry < rows + length))[:, None]


def _tail_sums(tail: Tail, k: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`stem_flex.kernels.tail.tail_sums` by PyTorch, one key head at a time."""
    heads, rows, dim = tail.q.shape[1:]
    kv_heads, length = k.shape[1], k.shape[2]
    group = heads // kv_heads
    key = torch.arange(length, device=k.device)
    late = key[tail.clear :]
    hidden = ((late < tail.start[..., None]) | (late >= tail.end[..., None]))[:, None]
    empty = (tail.end <= tail.start)[:, None, :, None]
    columns, diagonals = [], []
    for head in range(kv_heads):
        part = tail.q[:, head * group : (head + 1) * group]
        # as many keys before the first as there are rows, which nobody sees: `diagonal_sums` wants the room
        keys = torch.nn.functional.pad(operand(k[:, head : head + 1]), (0, 0, rows, 0))
        logits = product(operand(part), keys, dim**-0.5)
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        logits[..., :rows] = -math.inf
        logits[..., rows + tail.clear :].masked_fill_(hidden, -math.inf)
        weights = logits.softmax(-1, dtype=wide)
        weights = weights if tail.clear else weights.masked_fill_(empty, 0.0)
        columns.append(weights[..., rows:].sum(2))
        diagonals.append(diagonal_sums(weights)[..., :-1])
    return torch.cat(columns, 1), torch.cat(diagonals, 1)


def diagonal_sums(weights: Tensor) -> Tensor:
    """Sums of weights (B, H, R, N), 0 in the first R columns, along diagonals: at c that of row r's column c + r,
    (B, H, N + 1). In memory, read one wider, a diagonal is a column; no copy is made."""
    rows, wide = weights.shape[2], weights.shape[3] + 1
    flat, whole = weights.flatten(2), (rows - 1) * wide
    sums, rest = flat[..., :whole].unflatten(2, (rows - 1, wide)).sum(2), flat[..., whole:]
    sums[..., : rest.shape[-1]] += rest
    return sums


def first_and_own(bound: BoundLayout, config: StemConfig) -> Tensor:
    """The first block of each row's range and the blocks of its own positions, bool (1 or B, 1 or H, Qb, Kb)."""
    one = StemConfig(block_size=config.block_size, stride=config.stride, sink_blocks=1, local_blocks=0)
    return forced_blocks(bound, bound.dense_classes(), one)


def own_distance(bound: BoundLayout) -> Tensor:
    """Blocks from each key block to the row's own last one, (1 or B, Qb, Kb); negative in the future."""
    key = torch.arange(bound.k_blocks, device=bound.rows.device)
    return (bound.own_hi - 1)[..., None] - key


def offsets_between(bound: BoundLayout) -> tuple[Tensor, Tensor]:
    """Least and largest query place - key place of each pair of blocks, (1 or B, Qb, Kb), as they are cut."""
    q_block, k_block = bound.block_size
    key = torch.arange(bound.k_blocks, device=bound.rows.device) * k_block
    place = bound.geometry.column(bound.geometry.q_offset)
    first = torch.arange(bound.q_blocks, device=bound.rows.device) * q_block
    last = (first + q_block).clamp(max=bound.seq_lengths[0]) - 1
    least = (place + first)[..., None] - (key + k_block).clamp(max=bound.seq_lengths[1]) + 1
    return least, (place + last)[..., None] - key
