"""XAttention and CoSA: strided antidiagonals, and the best blocks that hold a share of what they say.

With down-sampled queries a and keys b of ``stride`` tokens each, S[a, b] = sum over r of q[a s + s-1-r] k[b s + r] is
scaled by 1 / (sqrt(D) s).

- XAttention (arXiv 2503.16428): a softmax over b; a block's mass is the sum over its cells. A row keeps the first block
  and its own, and then its best blocks until ``threshold`` of the mass is held.
- CoSA (AngelSlim): e[a, J] = exp(largest in J - largest of the row a), summed over the rows of a query block. A block
  is hot where some e is at least 0.999. Blocks are taken in the order first and own block, hot ones, others, each by
  mass, while the mass taken before is less than ``top_p`` (0.8) of the row's; the first and the own block always. Hot
  blocks are only favoured: they fall out once the mass is held.

Cost: N^2 D / stride, 1 / (2 stride) of dense attention, in two Triton kernels (:mod:`stem_flex.kernels.cells`): at 128K
tokens of 32 heads they take 8 ms of an H100 at XAttention's stride of 16, 15 ms at CoSA's of 8, the whole selections 10
and 18. PyTorch alone goes through a matrix of (N / stride)^2 in strips, twice the time.

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

from stem_flex.budget import FORCED, PREFERRED, Coverage, share_of
from stem_flex.config import StemConfig
from stem_flex.layout import Layout
from stem_flex.plumbing.binding import BoundLayout
from stem_flex.plumbing.implementation import resolve
from stem_flex.plumbing.strips import strips
from stem_flex.selectors.selector import Selector
from stem_flex.selectors.shared import (
    clear_keys,
    filled,
    first_and_own,
    hide,
    last_key,
    operand,
    prepare,
    product,
    real_tokens,
    spans_of,
)

HOT = 0.999
_CELLS_AT_ONCE = 2**27  # antidiagonal sums of a strip, of all heads: 256 MiB in bf16


def xattention(
    q: Tensor, k: Tensor, v: Tensor, config: StemConfig | None = None, *,
    layout: Layout | BoundLayout | None = None, q_offset: int | Tensor = 0, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Share of each block in the antidiagonal mass of its row; the first and the own block are lifted by FORCED.

    Args:
        q: (B, Hq, Lq, D); k: (B, Hkv, Lk, D); v: (B, Hkv, Lk, Dv), not looked at.
        config: its stride and block sizes count; None means ``StemConfig()``.
        layout, q_offset: as in :func:`stem_flex.oam_scores`, of one interval of keys for each query. A cell counts
            where one of its pairs is allowed.
        impl: "triton", "torch", or "auto": Triton for CUDA tensors. Nothing falls back silently.

    Returns:
        float32 (B, Hq, Qb, Kb), -inf where the layout allows nothing.

    Raises:
        ValueError: a layout from a mask_mod or a BlockMask.
        TypeError: float64 for Triton.
    """
    config, bound = prepare(q, k, v, config, layout, q_offset)
    mass, _ = antidiagonal_mass(q, k, bound, config, "xattention", resolve(impl, q))
    mass /= mass.sum(-1, keepdim=True).clamp(min=1e-20)
    return hide(mass + FORCED * first_and_own(bound, config), bound)


def cosa(
    q: Tensor, k: Tensor, v: Tensor, config: StemConfig | None = None, *,
    layout: Layout | BoundLayout | None = None, q_offset: int | Tensor = 0, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Share of each block in its row's peaks; hot blocks are lifted by PREFERRED, the first and the own by FORCED.

    Arguments, result and errors as :func:`xattention`.
    """
    config, bound = prepare(q, k, v, config, layout, q_offset)
    mass, peak = antidiagonal_mass(q, k, bound, config, "cosa", resolve(impl, q), peaks=True)
    mass /= mass.sum(-1, keepdim=True).clamp(min=1e-20)
    return hide(mass + PREFERRED * (peak >= HOT) + FORCED * first_and_own(bound, config), bound)


def threshold_for(scores: Tensor, mass: Tensor, coverage: float = 0.9) -> Tensor:
    """Thresholds by head under which a row takes the blocks that hold ``coverage`` of the true attention mass.

    Of each row, the fewest blocks with that much of ``mass``; the least estimated share among them; the sum of all
    shares from there up. The mean over rows, and over the batch.

    Args:
        scores: of :func:`xattention`, (B, Hq, Qb, Kb).
        mass: true attention mass, (B, Hq, Qb, Kb), as `stem_flex.selectors.oracle.block_mass` has it.

    Returns:
        float32 (Hq,).
    """
    shares = share_of(scores)
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
        xattention,
        f"XAttention with thresholds of layer {layer} of {Path(path).name}",
        {"stride": found["stride"], "sink_blocks": 1, "local_blocks": 1},
        budget=Coverage(tuple(layers[layer])),
    )


def antidiagonal_mass(
    q: Tensor, k: Tensor, bound: BoundLayout, config: StemConfig, name: str, impl: str = "torch", *, peaks: bool = False
) -> tuple[Tensor, Tensor]:
    """Sum and maximum over the rows of cells of a query block of their weights on each block, (B, Hq, Qb, Kb).

    A weight is the sum of the row's softmax over the block's cells; with ``peaks``, exp(the block's largest logit - the
    row's largest). float32, 0 where nothing is allowed.
    """
    spans_of(bound, name)
    if impl == "triton":
        return _by_kernels(q, k, bound, config, peaks)
    per_row, per_column = config.query_block // config.stride, config.key_block // config.stride
    shape = (*q.shape[:2], bound.q_blocks, bound.k_blocks)
    total, peak = (torch.zeros(shape, dtype=torch.float32, device=q.device) for _ in range(2))
    for rows, logits, empty in cells(q, k, bound, config):
        by_block = filled(logits, 3, per_column, -math.inf).unflatten(3, (-1, per_column))
        if peaks:
            best = by_block.amax(-1)
            weights = (best - best.amax(-1, keepdim=True)).exp()
        else:
            weights = by_block.flatten(3).softmax(-1).unflatten(3, (-1, per_column)).sum(-1)
        weights = weights if empty is None else weights.masked_fill(empty, 0.0)
        weights = weights.unflatten(2, (-1, per_row))
        seen = slice(0, weights.shape[-1])
        total[:, :, rows, seen], peak[:, :, rows, seen] = weights.sum(3), weights.amax(3)
    return total, peak


def _by_kernels(q: Tensor, k: Tensor, bound: BoundLayout, config: StemConfig, peaks: bool) -> tuple[Tensor, Tensor]:
    from stem_flex.kernels.selector_ops import Cut, Operands, cell_mass

    stride, per_row = config.stride, config.query_block // config.stride
    fine = _cells_layout(q, k, bound, stride)
    missing = bound.q_blocks * per_row - fine.q_blocks
    lo, hi = (torch.nn.functional.pad(x, (0, missing)) for x in (fine.lo, fine.hi))
    valid = bound.key_start, bound.key_end, bound.query_start, bound.query_end
    cut = Cut(stride, per_row, config.key_block // stride)
    operands = Operands(q, k, (lo, hi), valid, cut, 1 / (math.sqrt(q.shape[-1]) * stride))
    return cell_mass(operands, bound.causal_offset, stride, sums=not peaks, peaks=peaks)


def cells(
    q: Tensor, k: Tensor, bound: BoundLayout, config: StemConfig
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Strips of the scaled antidiagonal sums: (rows of blocks, logits, empty).

    ``logits`` is (B, Hq, cells of those rows, cells of the keys up to the last that the strip may see), -inf where no
    pair of the cell is allowed. Cell rows without any, where ``empty`` (1 or B, 1, cells, 1) is True, hold anything;
    None: the host knows that there are none.
    """
    stride = config.stride
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
