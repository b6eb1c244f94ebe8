"""Pictures of the benchmarks' results (needs matplotlib: ``pip install 'stem-flex[plot]'``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .report import short

Series = Mapping[str, Sequence[tuple[int, float]]]
INK, GRID = "#22303c", "#d8dee4"
COLORS = ("#d1495b", "#2e86ab", "#edae49", "#3b8f6b", "#7b5ea7", "#8a8d91", "#b0632b", "#4d5d6c")


def panels(path: Path, title: str, parts: Sequence[Mapping[str, Any]]) -> Path | None:
    """Draw one panel per part: ``{"title", "ylabel", "series", "log", "dashed", "lines"}`` over token counts.

    ``series`` maps a name to (tokens, value) pairs; names in ``dashed`` are drawn dashed; ``lines`` maps a
    label to a horizontal line's height. Returns the path, or None (with a note) without matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        print("note: no picture, matplotlib is missing; pip install 'stem-flex[plot]'")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = [part for part in parts if any(part["series"].values())]
    if not parts:
        return None
    names = list(dict.fromkeys(name for part in parts for name in part["series"]))
    color = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    figure, axes = pyplot.subplots(1, len(parts), figsize=(6.2 * len(parts), 4.6), squeeze=False)
    for axis, part in zip(axes[0], parts, strict=True):
        _draw(axis, part, color)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK, weight="bold")
    figure.tight_layout(rect=(0, 0, 1, 0.96))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)
    return path


def _draw(axis: Any, part: Mapping[str, Any], color: Mapping[str, str]) -> None:
    ticks = sorted({tokens for points in part["series"].values() for tokens, _ in points})
    for name, points in part["series"].items():
        if points:
            style = "--" if name in part.get("dashed", ()) else "-"
            xs, ys = zip(*sorted(points), strict=True)
            axis.plot(xs, ys, style, marker="o", ms=4.5, lw=2, color=color[name], label=name)
    for label, height in part.get("lines", {}).items():
        axis.axhline(height, color="#8a8d91", lw=1.1, ls=":")
        axis.annotate(
            label,
            (1, height),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8,
            color="#5c6770",
        )
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [short(tokens) for tokens in ticks])
    axis.minorticks_off()
    if part.get("log"):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
    else:
        axis.set_ylim(bottom=0)
    axis.set_title(part["title"], loc="left", fontsize=10.5, color=INK)
    axis.set_xlabel("prompt tokens", color=INK)
    axis.set_ylabel(part["ylabel"], color=INK)
    axis.grid(True, color=GRID, lw=0.7)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    if part["series"]:
        axis.legend(frameon=False, fontsize=8.5)
