"""MInference's vertical-slash pattern (arXiv 2407.02490): the best key columns and the best diagonals of each head.

The last 64 queries of the prompt attend densely; a head keeps the keys that got most and the offsets (query place -
key place) that got most, with sizes of its own, found offline and published as JSON files (:func:`from_file`).
Here columns and diagonals of tokens become the blocks that hold them, so that density is higher than what the
published kernel gathers column by column: `stem_flex.block_density` says how much.

Cost: 64 dense rows, in two Triton kernels (:mod:`stem_flex.kernels.tail`); at 128K tokens of 32 heads 1 ms of an H100,
the whole selection 4.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stem_flex.budget import PREFERRED
from stem_flex.config import StemConfig
from stem_flex.layout import Layout
from stem_flex.plumbing.binding import BoundLayout
from stem_flex.plumbing.implementation import resolve
from stem_flex.selectors.rules import Above
from stem_flex.selectors.selector import Selector
from stem_flex.selectors.shared import (
    block_means,
    hide,
    offsets_between,
    own_distance,
    prepare,
    product,
    tail_attention,
    tail_of,
)

LAST_QUERIES = 64
KEPT_COLUMNS, KEPT_OFFSETS = 30, 100  # the first keys and the nearest ones are always among the best
DEFAULT = ("vertical_and_slash", 1000, 6096)
KINDS = ("vertical_and_slash", "stream_llm", "block_sparse")
Head = tuple[str, int, int]


def scores(
    q: Tensor, k: Tensor, v: Tensor, config: StemConfig | None = None, *,
    layout: Layout | BoundLayout | None = None, q_offset: int | Tensor = 0, heads: tuple[Head, ...] = (DEFAULT,),
    impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Lift the blocks of each head's pattern by PREFERRED over their attention from the last queries.

    Args:
        q: (B, Hq, Lq, D); k: (B, Hkv, Lk, D); v: (B, Hkv, Lk, Dv), not looked at.
        config: its block sizes count; None means ``StemConfig()``.
        layout, q_offset: as in :func:`stem_flex.oam_scores`: causal, padding, sliding windows. Of a chunk the last
            queries are the chunk's.
        heads: for all query heads, or for each: ("vertical_and_slash", columns, offsets), ("stream_llm", first,
            last tokens) or ("block_sparse", blocks of 64 keys, not looked at).
        impl: how the last queries attend: "triton", "torch", or "auto": Triton for CUDA tensors. Nothing falls back
            silently.

    Returns:
        float32 (B, Hq, Qb, Kb): share in [0, 1], lifted inside the pattern, -inf where the layout allows nothing.
        The share is the mean of what the last queries give the block's keys and its nearest offsets.

    Raises:
        ValueError: heads don't match q, or a layout of documents, of a mask_mod, or that sees the future.
        TypeError: float64 for Triton.
    """
    config, bound = prepare(q, k, v, config, layout, q_offset)
    heads = _checked(heads, q.shape[1])
    tail = tail_of(q, bound, LAST_QUERIES, "minference")
    columns, offsets = tail_attention(tail, k, resolve(impl, q))
    rows = tail.real.sum(-1).clamp(min=1)[:, None, None]
    inside = torch.zeros((), dtype=torch.bool, device=q.device)
    for kind, pattern in (
        ("vertical_and_slash", functools.partial(_vertical_slash, columns, offsets)),
        ("stream_llm", _stream),
        ("block_sparse", functools.partial(_block_sparse, q, k)),
    ):
        if any(head[0] == kind for head in heads):
            chosen = constant(tuple(head[0] == kind for head in heads), q.device)[:, None, None]
            inside = inside | (chosen & pattern(heads, bound))
    share = (block_share(columns / rows, bound)[:, :, None] + _offset_share(offsets / rows, bound)) / 2
    return hide(share.clamp(max=1.0) + PREFERRED * inside, bound)


def from_file(path: str | Path, layer: int, *, ratio: float = 1.0) -> Selector:
    """The selector of one layer of a published pattern file.

    The file is a JSON list over layers of ``{head: [kind, columns, offsets, score]}``; a head that is missing gets
    ("vertical_and_slash", 1000, 6096). ``ratio`` scales columns and offsets.

    Raises:
        ValueError: the file has no such layer, or an entry of another form.
    """
    layers = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(layers, list) or not 0 <= layer < len(layers) or not isinstance(layers[layer], dict):
        count = len(layers) if isinstance(layers, list) else 0
        raise ValueError(f"layer must be one of the {count} layers of {Path(path).name}, got {layer}")
    entries = {int(head): entry for head, entry in layers[layer].items()}
    heads = tuple(_head(entries.get(head), ratio, path) for head in range(max(entries, default=0) + 1))
    return Selector(
        f"minference:{layer}",
        functools.partial(scores, heads=heads if entries else (DEFAULT,)),
        f"MInference's patterns of layer {layer} of {Path(path).name}",
        {"sink_blocks": 0, "local_blocks": 0},
        budget=Above(PREFERRED),
    )


def _head(entry: Any, ratio: float, path: str | Path) -> Head:
    if entry is None:
        return DEFAULT
    if not isinstance(entry, list) or len(entry) < 3 or entry[0] not in KINDS:
        raise ValueError(
            f"path must hold entries [kind, columns, offsets, score] of {KINDS}, got {entry!r} in {Path(path).name}"
        )
    return entry[0], int(entry[1] * ratio), int(entry[2] * ratio)


def _checked(heads: tuple[Head, ...], number: int) -> tuple[Head, ...]:
    if len(heads) not in (1, number) or any(head[0] not in KINDS for head in heads):
        raise ValueError(f"heads must be one or {number} patterns of {KINDS}, got {heads!r}")
    return tuple(heads) * number if len(heads) == 1 else tuple(heads)


@functools.lru_cache(maxsize=256)
def constant(values: tuple, device: torch.device) -> Tensor:
    """A tuple of ints or bools as a tensor, kept: making one waits for the host's copy."""
    dtype = torch.bool if isinstance(values[0], bool) else torch.int64
    with torch.inference_mode(False):  # what is kept serves every mode
        return torch.tensor(values, dtype=dtype, device=device)


def _vertical_slash(columns: Tensor, offsets: Tensor, heads: tuple[Head, ...], bound: BoundLayout) -> Tensor:
    length = columns.shape[-1]
    vertical = tuple(min(length, max(head[1], KEPT_COLUMNS)) for head in heads)
    slash = tuple(min(length, max(head[2], min(50, length))) for head in heads)
    place = torch.arange(length, device=columns.device)
    start = 0 if bound.key_start is None else bound.key_start[:, None, None]
    first = (place >= start) & (place < start + KEPT_COLUMNS)
    column = best(columns.masked_fill(first, torch.inf), vertical)
    offset = best(offsets.masked_fill(place < KEPT_OFFSETS, torch.inf), slash)
    hit = torch.nn.functional.pad(column, (0, -length % bound.block_size[1])).unflatten(-1, (-1, bound.block_size[1]))
    return hit.any(-1)[:, :, None] | _holds(offset, bound)


def best(values: Tensor, counts: tuple[int, ...]) -> Tensor:
    """The ``counts[h]`` largest entries of each head's vector (B, H, N), bool of that shape."""
    index = values.topk(max(counts), dim=-1).indices
    taken = torch.arange(index.shape[-1], device=values.device) < constant(counts, values.device)[:, None]
    return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, index, taken.expand(index.shape))


def _holds(offset: Tensor, bound: BoundLayout) -> Tensor:
    """Which pairs of blocks hold a pair of tokens at a chosen offset (B, H, N): (B, H, Qb, Kb)."""
    before = torch.nn.functional.pad(offset.cumsum(-1, dtype=torch.int32), (1, 0))
    return _between(before, bound) > 0


def _between(before: Tensor, bound: BoundLayout) -> Tensor:
    """Differences of running sums (B, H, N + 1) over the offsets that each pair of blocks spans."""
    least, most = (x[:, None].long() for x in offsets_between(bound))
    first, last = (x.clamp(min=0, max=before.shape[-1] - 1) for x in (least, most + 1))
    shape = (*before.shape[:2], *first.shape[2:])
    low, high = (
        before.gather(-1, x.expand(before.shape[0], before.shape[1], -1, -1).flatten(2)).view(shape)
        for x in (first, last)
    )
    return high - low


def block_share(columns: Tensor, bound: BoundLayout) -> Tensor:
    """Sums of a vector over keys (B, H, Lk) by block: (B, H, Kb)."""
    block = bound.block_size[1]
    return torch.nn.functional.pad(columns, (0, -columns.shape[-1] % block)).unflatten(-1, (-1, block)).sum(-1)


def _offset_share(offsets: Tensor, bound: BoundLayout) -> Tensor:
    """What the offsets of a pair's own distance in blocks got: (B, H, Qb, Kb)."""
    by_block = block_share(offsets, bound)
    distance = own_distance(bound)[:, None].clamp(min=0).long()
    shape = (*by_block.shape[:2], *distance.shape[2:])
    return by_block.gather(-1, distance.expand(*shape).flatten(2)).view(shape)


def _stream(heads: tuple[Head, ...], bound: BoundLayout) -> Tensor:
    sizes = constant(tuple(head[1:] for head in heads), bound.rows.device)
    least, _ = offsets_between(bound)
    blocks = (sizes[:, 0] + bound.block_size[1] - 1) // bound.block_size[1]
    key = torch.arange(bound.k_blocks, device=bound.rows.device)
    first = key < bound.lo[:, None, :, None] + blocks[:, None, None]
    return first | (least[:, None] < sizes[:, 1, None, None])


def _block_sparse(q: Tensor, k: Tensor, heads: tuple[Head, ...], bound: BoundLayout) -> Tensor:
    q_block, k_block = bound.block_size
    queries = block_means(q, q_block, bound.query_start, bound.query_end)
    keys = block_means(k, k_block, bound.key_start, bound.key_end)
    logits = hide(product(queries, keys), bound)
    number = min(bound.k_blocks, -(-100 * 64 // k_block))
    index = logits.topk(number, dim=-1).indices
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, index, True)
