"""XAttention (arXiv 2503.16428): mass of strided antidiagonals, and the fewest blocks that hold a share of it.

With down-sampled queries a and keys b of ``stride`` tokens each, S[a, b] = sum over r of q[a s + s-1-r] k[b s + r] is
scaled by 1 / (sqrt(D) s) and goes through a softmax over b; the mass of a pair of blocks is the sum over its cells.
A row keeps the first block and its own, and then its best blocks until threshold of the mass is held.

Cost: N^2 D / stride, 1 / (2 stride) of dense attention, and a matrix of (N / stride)^2 that is streamed. At 128K
tokens, 32 heads of 128 and stride 16: 4.4 TFLOP in products of bf16 and about 10 GB of traffic in strips,
some 12 ms of an H100; stride 8 takes 8.8 TFLOP and 40 GB, some 30 ms.

Departures from the published code: any length, batch and layout; the offset of a chunk is its true one; nothing is
masked by a length that is a multiple of the chunk.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from stem_flex.config import StemConfig
from stem_flex.layout import Layout
from stem_flex.plumbing.binding import BoundLayout
from stem_flex.select import forced_blocks
from stem_flex.selectors.rules import FORCED, Coverage, share, strips
from stem_flex.selectors.selector import Selector
from stem_flex.selectors.shared import (
    clear_keys,
    filled,
    hide,
    last_key,
    operand,
    prepare,
    product,
    real_tokens,
    spans_of,
)

_CELLS_AT_ONCE = 2**27  # antidiagonal sums of a strip, of all heads: 256 MiB in bf16


def scores(
    q: Tensor, k: Tensor, v: Tensor, config: StemConfig | None = None, *,
    layout: Layout | BoundLayout | None = None, q_offset: int | Tensor = 0,
) -> Tensor:  # fmt: skip
    """Share of each block in the antidiagonal mass of its row; the first and the own block are lifted by 4.

    Args:
        q: (B, Hq, Lq, D); k: (B, Hkv, Lk, D); v: (B, Hkv, Lk, Dv), not looked at.
        config: its stride and block sizes count; None means ``StemConfig()``.
        layout, q_offset: as in :func:`stem_flex.oam_scores`, of one interval of keys for each query. A cell counts
            where one of its pairs is allowed.

    Returns:
        float32 (B, Hq, Qb, Kb), -inf where the layout allows nothing.

    Raises:
        ValueError: a layout from a mask_mod or a BlockMask.
    """
    config, bound = prepare(q, k, v, config, layout, q_offset)
    per_row, per_column = config.query_block // config.stride, config.key_block // config.stride
    found = torch.zeros(*q.shape[:2], bound.q_blocks, bound.k_blocks, dtype=torch.float32, device=q.device)
    for rows, logits, empty in cells(q, k, bound, config, "xattention"):
        mass = logits.softmax(-1)
        mass = mass if empty is None else mass.masked_fill_(empty, 0.0)
        wide = torch.float64 if mass.dtype == torch.float64 else torch.float32
        mass = mass.unflatten(2, (-1, per_row)).sum(3, dtype=wide)  # along the rows first: whole lines are read
        mass = filled(mass, 3, per_column).unflatten(3, (-1, per_column)).sum(-1)
        found[:, :, rows, : mass.shape[-1]] = mass / mass.sum(-1, keepdim=True).clamp(min=1e-20)
    return hide(found + FORCED * first_and_own(bound, config), bound)


def threshold_for(scores: Tensor, mass: Tensor, coverage: float = 0.9) -> Tensor:
    """Thresholds by head under which a row takes the blocks that hold ``coverage`` of the true attention mass.

    Of each row, the fewest blocks with that much of ``mass``; the least estimated share among them; the sum of all
    shares from there up. The mean over rows, and over the batch.

    Args:
        scores: of :func:`scores`, (B, Hq, Qb, Kb).
        mass: true attention mass, (B, Hq, Qb, Kb), as `stem_flex.selectors.oracle.block_mass` has it.

    Returns:
        float32 (Hq,).
    """
    shares = share(scores)
    ordered, index = mass.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    needed = before < coverage * ordered.sum(-1, keepdim=True)
    least = shares.gather(-1, index).masked_fill(~needed, math.inf).amin(-1, keepdim=True)
    held = (shares * (shares >= least)).sum(-1) / shares.sum(-1).clamp(min=1e-20)
    return held.float().mean((0, 2))


def from_file(path: str | Path, layer: int) -> Selector:
    """The selector of one layer with the thresholds that ``python -m bench.calibrate_xattention`` wrote.

    Raises:
        ValueError: the file has no such layer.
    """
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    layers = found.get("thresholds", []) if isinstance(found, dict) else []
    if not 0 <= layer < len(layers):
        raise ValueError(f"layer must be one of the {len(layers)} layers of {Path(path).name}, got {layer}")
    return Selector(
        f"xattention:{layer}",
        scores,
        f"XAttention with thresholds of layer {layer} of {Path(path).name}",
        {"stride": found["stride"], "sink_blocks": 1, "local_blocks": 1},
        budget=Coverage(tuple(layers[layer])),
    )


def first_and_own(bound: BoundLayout, config: StemConfig) -> Tensor:
    """The first block of each row's range and the blocks of its own positions, bool (1 or B, 1 or H, Qb, Kb)."""
    one = StemConfig(block_size=config.block_size, stride=config.stride, sink_blocks=1, local_blocks=0)
    return forced_blocks(bound, bound.dense_classes(), one)


def cells(
    q: Tensor, k: Tensor, bound: BoundLayout, config: StemConfig, name: str
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Strips of the scaled antidiagonal sums: (rows of blocks, logits, empty).

    ``logits`` is (B, Hq, cells of those rows, cells of the keys up to the last that the strip may see), -inf where no
    pair of the cell is allowed. Cell rows without any, where ``empty`` (1 or B, 1, cells, 1) is True, hold anything;
    None: the host knows that there are none.
    """
    stride = config.stride
    spans_of(bound, name)
    fine = _cells_layout(q, k, bound, stride)
    per_row = config.query_block // stride
    keys = _cut(k, bound.key_start, bound.key_end, stride)
    entries = q.shape[0] * q.shape[1] * per_row * keys.shape[2]
    for rows in strips(bound.q_blocks, entries, _CELLS_AT_ONCE):
        first, last = rows.start * config.query_block, min(rows.stop * config.query_block, q.shape[2])
        start, end = (None if x is None else x - first for x in (bound.query_start, bound.query_end))
        queries = _cut(q[:, :, first:last], start, end, stride, reverse=True)
        queries = filled(queries, 2, per_row)
        seen = -(-last_key(bound, last) // stride)
        logits = product(queries, keys[:, :, :seen], 1 / (math.sqrt(q.shape[-1]) * stride))
        part = slice(rows.start * per_row, rows.start * per_row + queries.shape[2])
        clear = clear_keys(bound, first) // stride
        column = torch.arange(clear, seen, dtype=torch.int32, device=q.device)
        lo, hi = (
            torch.nn.functional.pad(x[:, part], (0, queries.shape[2] - x[:, part].shape[1]))[:, None, :, None]
            for x in (fine.lo, fine.hi)
        )
        logits[..., clear:].masked_fill_((column < lo) | (column >= hi), -math.inf)
        whole = bound.layout.plain_causal and last - first == (rows.stop - rows.start) * config.query_block
        yield rows, logits, None if whole and bound.geometry.kv_len is None else lo >= hi


def _cells_layout(q: Tensor, k: Tensor, bound: BoundLayout, stride: int) -> BoundLayout:
    """The same layout cut into blocks of ``stride`` tokens: [lo, hi) are the cells that a cell may see."""
    geometry = bound.geometry
    return bound.layout.bind(
        q.shape[0], q.shape[1], q.shape[2], k.shape[2], q_offset=geometry.q_offset, kv_len=geometry.kv_len,
        prompt_len=geometry.prompt_len, block_size=(stride, stride), device=q.device,
    )  # fmt: skip


def _cut(x: Tensor, start: Tensor | None, end: Tensor | None, stride: int, *, reverse: bool = False) -> Tensor:
    """``stride`` tokens side by side, zeros for padding: (B, H, L, D) to (B, H, ceil(L / stride), stride D)."""
    x = operand(x)
    if start is not None:
        x = torch.where(real_tokens(x.shape[2], start, end, x.device)[:, None, :, None], x, 0)
    x = filled(x, 2, stride).unflatten(2, (-1, stride))
    return (x.flip(3) if reverse else x).flatten(3)
