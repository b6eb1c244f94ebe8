"""The picture of `bench.compare` (needs matplotlib: ``pip install 'stem-flex[plot]'``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .compare_report import WAYS, Row, speed_words
from .plots import INK, legend_under, plain, save, style_of, subplots

TICKS = (5, 10, 15, 25, 40, 60, 100)
SPREAD = 0.015  # between neighbours at one density, of that density


def draw(result: Row, path: Path) -> None:
    """Answers with intervals, a line a selector; output error by density in both ways, native points hollow; times."""
    pyplot, figure, axes = subplots(3, rows=2, size=(6.0, 5.2))
    named = list(dict.fromkeys(cell["selector"] for cell in result["cells"] if cell["selector"] != "dense"))
    styles = {name: style_of(index) for index, name in enumerate(named)}
    grid = axes[0][0].get_gridspec()
    for axis in axes[:, 0]:
        axis.remove()
    tall = figure.add_subplot(grid[:, 0])
    plain(tall)
    _answers(tall, result["cells"], styles)
    for axis, way in zip(axes[:, 1], WAYS, strict=True):
        _errors(axis, [cell for cell in result["cells"] if "error" in cell], way, styles)
    _bars(axes[0][2], [row for row in result["speed"] if row["way"] == "native" and "selection" in row])
    if timed := speed_words(result):
        axes[0][2].set_title(f"{timed}, made vectors, native", loc="left", fontsize=10, color=INK)
    else:
        axes[0][2].axis("off")
    axes[1][2].axis("off")
    for name in named:  # every one, whether or not it has a point in some panel
        axes[1][2].plot([], [], lw=1.5, ms=6, label=name, **styles[name])
    if named:
        axes[1][2].legend(frameon=False, fontsize=10, ncols=2, loc="center", handlelength=3)
    save(pyplot, figure, path, "Published selectors side by side")


def _answers(axis: Any, cells: list[Row], styles: dict[str, Row]) -> None:
    """A line a selector: filled points at the same number of blocks a row, half-filled by its own rule, hollow native;
    the density beside each. Best by counts first."""
    found = [cell for cell in cells if "all" in cell]
    ways = sorted(
        {(cell["way"], cell["wanted"] or 0.0) for cell in found},
        key=lambda way: ([*WAYS, "native"].index(way[0]), way[1]),
    )
    by_place = {(c["selector"], c["way"], c["wanted"] or 0.0): c for c in found if c["selector"] in styles}

    def order(name: str) -> tuple[float, ...]:
        return tuple(by_place.get((name, *way), {"all": {"share": -1.0}})["all"]["share"] for way in ways)

    shown = sorted((name for name in styles if any(name == place[0] for place in by_place)), key=order)
    for (name, *way), cell in by_place.items():
        one, style = cell["all"], styles[name]
        height = shown.index(name) + 0.8 * (0.5 - (ways.index(tuple(way)) + 0.5) / len(ways))
        fill = {"count": "full", "rule": "left", "native": "none"}[way[0]]
        axis.plot([one["low"], one["high"]], [height, height], lw=0.8, color=style["color"])
        axis.plot(one["share"], height, ms=7, fillstyle=fill, **style | {"ls": "none"})
        beside = f" {percent(cell['computed'])}"
        axis.annotate(beside, (one["high"], height), va="center", fontsize=6.5, color=INK)
    for cell in found:
        if cell["selector"] == "dense":
            axis.axvline(cell["all"]["share"], color=INK, lw=1.1, ls=":")
            axis.annotate(" dense", (cell["all"]["share"], len(shown) - 0.4), fontsize=8, color=INK)
    axis.set_yticks(range(len(shown)), shown, fontsize=9)
    axis.set_ylim(-0.6, max(len(shown), 1) - 0.1)
    axis.set_xlim(-0.03, 1.12)
    axis.set_xticks(np.linspace(0, 1, 6))
    axis.set_xlabel("answers exactly right, every row sparse; at the intervals: density", color=INK)
    axis.set_title("filled: equal counts; half: its own rule; hollow: native", loc="left", fontsize=10, color=INK)


def _errors(axis: Any, cells: list[Row], way: str, styles: dict[str, Row]) -> None:
    """Output error by density; points of equal counts, which all have one density, are spread around it. Points far
    below all of up to half of the pairs are named, not drawn."""
    matched = [cell for cell in cells if cell["way"] == way]
    natives = [cell for cell in cells if cell["way"] == "native"]
    floor = 0.6 * min((cell["error"] for cell in matched if cell["computed"] < 0.5), default=0.0)
    for index, (name, style) in enumerate(styles.items()):
        points = [c for c in matched if c["selector"] == name and c["error"] >= floor]
        points.sort(key=lambda cell: cell["computed"])
        apart = 1 + SPREAD * (index - (len(styles) - 1) / 2) if way == "count" else 1.0
        xs = [100 * apart * c["computed"] for c in points]
        axis.plot(xs, [c["error"] for c in points], lw=0.8, ms=5, **style)
    for cell in (c for c in natives if c["error"] >= floor):
        style = styles[cell["selector"]] | {"ls": "none"}
        axis.plot(100 * cell["computed"], cell["error"], ms=7, fillstyle="none", **style)
    hidden = [c for c in (*natives, *matched) if c["error"] < floor]
    below = dict.fromkeys(f"{c['selector']} {c['error']:.3f} at {percent(c['computed'])}" for c in hidden)
    if below:
        lines = "\n".join(["below:", *below])
        axis.annotate(lines, (0.02, 0.02), xycoords="axes fraction", fontsize=7.5, color=INK)
    axis.set_yscale("log")
    axis.set_xscale("log")
    axis.set_xticks(TICKS, [f"{tick}" for tick in TICKS])
    axis.set_yticks([0.02, 0.03, 0.05, 0.1, 0.2], ["0.02", "0.03", "0.05", "0.1", "0.2"])
    axis.minorticks_off()
    axis.set_xlim(8, 115)
    axis.set_ylabel("relative error of the attention output", color=INK)
    axis.set_xlabel("computed block pairs, %" + (", spread around each density" if way == "count" else ""), color=INK)
    axis.set_title(WAYS[way] + "; hollow: native", loc="left", fontsize=10, color=INK)


def _bars(axis: Any, rows: list[Row]) -> None:
    rows = sorted(rows, key=lambda row: -row["selection"])
    places = np.arange(len(rows))
    axis.barh(places + 0.2, [row["selection"] for row in rows], 0.38, color="#d1495b", label="selection")
    axis.barh(places - 0.2, [row["attention"] for row in rows], 0.38, color="#2e86ab", label="attention")
    for place, row in zip(places, rows, strict=True):
        end = max(row["selection"], row["attention"])
        axis.annotate(f" {percent(row['density'])}", (end, place - 0.2), va="center", fontsize=7, color=INK)
    axis.set_yticks(places, [row["selector"] for row in rows], fontsize=8)
    axis.set_xscale("log")
    axis.set_xlabel("ms (at the bars: density)", color=INK)
    axis.grid(False, axis="y")
    if rows:
        legend_under(axis, 2)


def percent(share: float) -> str:
    """A density with one decimal below a tenth."""
    return f"{share:.1%}" if share < 0.1 else f"{share:.0%}"
