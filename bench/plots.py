"""Pictures of the benchmarks' results (needs matplotlib: ``pip install 'stem-flex[plot]'``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .report import short

Series = Mapping[str, Sequence[tuple[int, float]]]
INK, GRID = "#22303c", "#d8dee4"
COLORS = ("#d1495b", "#2e86ab", "#edae49", "#3b8f6b", "#7b5ea7", "#8a8d91", "#b0632b", "#4d5d6c")
MORE = ("#e377c2", "#17becf", "#a3a500", "#111111", "#8fd175", "#f57600", "#7a0019", "#9ecae1", "#f4a6a0", "#0b5d3b",
        "#c5b0d5", "#1f3fbf")  # fmt: skip
MARKERS = (*"os^DvPXp<>hd8H", (4, 1, 0), (6, 1, 0), (3, 1, 0), (4, 1, 45), (8, 1, 0))


def subplots(count: int, *, rows: int = 1, size: tuple[float, float] = (5.6, 4.6)) -> Any:
    """(pyplot, figure, axes): ``count`` panels of ``size`` inches side by side, axes by row where there are several."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shape = (size[0] * count, size[1] * rows)
    figure, axes = pyplot.subplots(rows, count, figsize=shape, squeeze=False, layout="constrained")
    for axis in axes.flat:
        plain(axis)
    return pyplot, figure, axes[0] if rows == 1 else axes


def plain(axis: Any) -> None:
    """A light grid behind the curves, no frame above and at the right."""
    axis.grid(True, color=GRID, lw=0.7)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def save(pyplot: Any, figure: Any, path: Path, title: str) -> None:
    """Write the picture under its title, and let go of it."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK, weight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


def style_of(index: int) -> dict[str, Any]:
    """Colour, dash and marker of the ``index``-th curve: its own colour up to 20, its own marker up to 19."""
    colors = COLORS + MORE
    return {
        "color": colors[index % len(colors)],
        "ls": "-" if index < len(COLORS) else "--",
        "marker": MARKERS[index % len(MARKERS)],
    }


def legend_below(figure: Any, axes: Iterable[Any], columns: int) -> None:
    """One legend for several panels, under them, each label once."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    place = {"loc": "outside lower center", "ncols": columns, "fontsize": 8.5, "handlelength": 3}
    figure.legend([*handles.values()], [*handles], frameon=False, **place)


def legend_under(axis: Any, columns: int) -> None:
    """A panel's own legend, under it, where it covers no curve."""
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13), "ncols": columns, "handlelength": 3}
    axis.legend(frameon=False, fontsize=8.5, **place)


def panels(path: Path, title: str, parts: Sequence[Mapping[str, Any]]) -> Path | None:
    """Draw one panel per part: ``{"title", "ylabel", "series", "log", "dashed", "lines"}`` over token counts.

    ``series`` maps a name to (tokens, value) pairs; names in ``dashed`` are drawn dashed; ``lines`` maps a
    label to a horizontal line's height. Returns the path, or None (with a note) without matplotlib.
    """
    parts = [part for part in parts if any(part["series"].values())]
    if not parts:
        return None
    entries = max(len(part["series"]) for part in parts)
    try:
        pyplot, figure, axes = subplots(len(parts), size=(6.2, 4.3 + 0.1 * entries))
    except ImportError:
        print("note: no picture, matplotlib is missing; pip install 'stem-flex[plot]'")
        return None
    names = list(dict.fromkeys(name for part in parts for name in part["series"]))
    color = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    for axis, part in zip(axes, parts, strict=True):
        _draw(axis, part, color)
    save(pyplot, figure, path, title)
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
    legend_under(axis, 2)
