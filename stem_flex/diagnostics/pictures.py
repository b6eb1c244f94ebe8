"""Pictures of a BlockMask and of per-head numbers, as PNG files; matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from stem_flex.config import StemConfig
from stem_flex.diagnostics.inspection import MaskReader, listed_blocks
from stem_flex.plumbing.checks import check_block_mask
from stem_flex.plumbing.classes import FULL, PARTIAL

_MOST_CELLS = 1024  # blocks drawn along a side; longer prompts show every n-th block
_INK, _PALE = "#22303c", "#c3ccd4"
_SKIPPED, _FORCED = 3, 3  # beside EMPTY, PARTIAL and FULL; a forced block's class is its own plus _FORCED
_COLORS = ("#ffffff", "#f2a541", "#1f7a8c", "#e3e9ee", "#c9a3d6", "#7b4b94")
_NAMES = ("masked", "chosen, partial", "chosen, full", "skipped", "forced, partial", "forced, full")
_ORDER = (FULL, PARTIAL, FULL + _FORCED, PARTIAL + _FORCED, _SKIPPED)


def plot_block_mask(
    block_mask: BlockMask,
    path: str | Path,
    heads: Sequence[int] | None = None,
    *,
    batch: int = 0,
    config: StemConfig | None = None,
    title: str | None = None,
) -> Path:
    """Draw which blocks each head computes, as a PNG: chosen or forced, in full or in part, and skipped.

    Args:
        block_mask: any BlockMask.
        path: file to write; its folder must exist.
        heads: heads to draw, default up to four spread over all.
        batch: batch row to draw.
        config: of the selection, to tell forced blocks (sink, local, own) from chosen ones; None marks none.
            Needs a mask of :func:`stem_flex.stem_block_mask`, which knows where its rows stand.
        title: text above the panels; the density of what is drawn is added to it.

    Returns:
        The path. Prompts of more than 1024 blocks show every n-th row and column, n in the axis label.

    Raises:
        ImportError: matplotlib is missing.
        TypeError, ValueError: naming the argument, what was expected, what came.
    """
    figure_type = _figure_type()
    check_block_mask("block_mask", block_mask)
    rows, count, _ = block_mask.kv_num_blocks.shape
    if heads is None:
        heads = sorted({round(i * (count - 1) / 3) for i in range(4)})
    for name, value, size in (("batch", [batch], rows), ("heads", list(heads), count)):
        if not value or any(not 0 <= x < size for x in value):
            raise ValueError(f"{name} must be in [0, {size}) and not empty, got {value}")
    reader = MaskReader(block_mask, rows, count)
    if config is not None and reader.bound is None:
        raise ValueError("config must be None for a BlockMask that stem_block_mask did not build")
    pictures = [_cells(block_mask, reader, batch, head, config) for head in heads]
    figure = figure_type(figsize=(0.9 + 3.6 * len(heads), 4.9), layout="constrained")
    figure.get_layout_engine().set(rect=(0.0, 0.0, 1.0, 0.93))
    axes = figure.subplots(1, len(heads), squeeze=False, sharey=True)[0]
    for axis, head, (cells, step, density) in zip(axes, heads, pictures, strict=True):
        _draw(axis, cells)
        axis.set_title(f"head {head}: {density:.1%}", fontsize=10, loc="left", color=_INK)
        axis.set_xlabel("key block" if step == 1 else f"key block, every {step}th", fontsize=9)
    axes[0].set_ylabel("query block", fontsize=9)
    _legend(figure, set().union(*(cells.unique().tolist() for cells, _, _ in pictures)))
    mean = sum(density for _, _, density in pictures) / len(pictures)
    heading = title or f"{block_mask.seq_lengths[0]:,} queries, {block_mask.seq_lengths[1]:,} keys"
    heading = f"{heading}: {mean:.1%} of dense attention computed"
    figure.suptitle(heading, x=0.012, y=0.985, ha="left", fontsize=12, weight="bold", color=_INK)
    figure.savefig(path, dpi=140)
    return Path(path)


def _draw(axis: Any, cells: Tensor) -> None:
    from matplotlib.colors import ListedColormap

    axis.imshow(
        cells.cpu().numpy(),
        cmap=ListedColormap(_COLORS),
        vmin=0,
        vmax=len(_COLORS) - 1,
        interpolation="nearest",
    )
    axis.tick_params(labelsize=8, colors="#5c6770")
    for spine in axis.spines.values():
        spine.set_color(_PALE)


def _legend(figure: Any, used: set[int]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(facecolor=_COLORS[i], edgecolor=_PALE, label=_NAMES[i]) for i in _ORDER if i in used]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False, fontsize=9)


def _cells(
    block_mask: BlockMask, reader: MaskReader, b: int, h: int, config: StemConfig | None
) -> tuple[Tensor, int, float]:
    """(class of every drawn cell int8, blocks from one drawn row to the next, density of the drawn rows)."""
    q_blocks = block_mask.kv_num_blocks.shape[-1]
    k_blocks = -(-block_mask.seq_lengths[1] // block_mask.BLOCK_SIZE[1])
    step = -(-max(q_blocks, k_blocks) // _MOST_CELLS)
    lines, computed, total = [], 0, 0
    for row in range(0, q_blocks, step):
        allowed = reader.blocks(b, h, row, row + 1)[0]
        line = listed_blocks(block_mask, b, h, row, row + 1)[0]
        kept = line > 0
        computed, total = computed + int(kept.sum()), total + int((allowed | kept).sum())
        if config is not None:
            line = line + _FORCED * (kept & allowed & _forced(reader, b, row, allowed, config))
        lines.append(torch.where(allowed & ~kept, _SKIPPED, line)[::step])
    return torch.stack(lines), step, computed / total if total else 1.0


def _forced(reader: MaskReader, b: int, row: int, allowed: Tensor, config: StemConfig) -> Tensor:
    """Sink, local and own blocks of one row, bool (Kb,)."""
    bound = reader.bound
    assert bound is not None
    own_lo, own_hi = (int(x[min(b, x.shape[0] - 1), row]) for x in (bound.own_lo, bound.own_hi))
    key = torch.arange(len(allowed), device=allowed.device)
    first = int(allowed.to(torch.int8).argmax())
    sink = (key >= first) & (key < first + config.sink_blocks)
    local = key >= min(own_lo, own_hi - config.local_blocks)
    return sink | (local & (key < own_hi))


def plot_heads(values: Tensor, path: str | Path, *, title: str, label: str = "recall") -> Path:
    """Draw one number per layer and head as a heat map PNG, e.g. the recall of every layer.

    Args:
        values: (layers, heads); the colour scale ends at 1.
        path: file to write; its folder must exist.
        title: text above the picture; the mean is added to it.
        label: what the numbers are.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: ``values`` is no matrix.
    """
    if values.dim() != 2:
        raise ValueError(f"values must be (layers, heads), got shape {tuple(values.shape)}")
    numbers = values.detach().float().cpu()
    layers, heads = numbers.shape
    figure = _figure_type()(figsize=(3.4 + 0.3 * heads, 1.8 + 0.3 * layers), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(numbers.numpy(), cmap="viridis", vmin=min(0.0, float(numbers.min())), vmax=1.0)
    axis.set_xlabel("head")
    axis.set_ylabel("layer")
    axis.set_title(f"{title} (mean {float(numbers.mean()):.3f})", loc="left", fontsize=11, color=_INK)
    figure.colorbar(image, ax=axis, label=label, shrink=0.8)
    figure.savefig(path, dpi=140)
    return Path(path)


def _figure_type() -> Any:
    """matplotlib's Figure, used without pyplot so that no global state or window is touched."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib; pip install 'stem-flex[plot]'") from error
    return Figure
