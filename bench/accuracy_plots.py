"""Pictures of `bench.accuracy` (need matplotlib: ``pip install 'stem-flex[plot]'``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .accuracy_report import PROTOCOLS, Row, by_density
from .plots import COLORS, INK, legend_below, legend_under, save, style_of, subplots
from .report import short


def draw(result: Row, path: Path) -> None:
    """Accuracy by density under both protocols, and added text loss."""
    densities, cells, shown = by_density(result)
    if not densities:
        return
    pyplot, figure, axes = subplots(3)
    dense = cells.get(("dense", 1.0))
    for axis, protocol in zip(axes, PROTOCOLS, strict=False):
        for index, name in enumerate(shown):
            points = [(d, cells[name, d][protocol]) for d in densities if (name, d) in cells]
            ys = np.array([cell["share"] for _, cell in points])
            errors = [ys - [c["low"] for _, c in points], [c["high"] for _, c in points] - ys]
            xs = [100 * d * (1 + 0.012 * (index - len(shown) / 2)) for d, _ in points]
            axis.errorbar(
                xs, ys, np.clip(errors, 0, None), lw=1.8, ms=4.5, elinewidth=0.8, label=name, **style_of(index)
            )
        if dense:
            axis.axhline(dense[protocol]["share"], color=INK, lw=1.1, ls=":", label="dense")
        axis.set_ylim(-0.03, 1.03)
        axis.set_ylabel("answers exactly right", color=INK)
        axis.set_title(f'protocol "{protocol}"', loc="left", fontsize=10.5, color=INK)
    for index, name in enumerate(shown):
        points = [(100 * d, cells[name, d]["extra_loss"]) for d in densities if (name, d) in cells]
        axes[2].plot(*zip(*points, strict=True), lw=1.8, ms=4.5, label=name, **style_of(index))
    axes[2].set_title("added loss on text, nats a token", loc="left", fontsize=10.5, color=INK)
    for axis in axes:
        axis.set_xscale("log")
        axis.set_xticks([100 * d for d in densities], [f"{d:.0%}" for d in densities])
        axis.minorticks_off()
        axis.set_xlabel("computed block pairs", color=INK)
    legend_below(figure, axes[:1], 10)
    save(pyplot, figure, path, f"Accuracy against density, prompts of {short(result['environment']['length'])} tokens")


def draw_models(results: Sequence[tuple[str, Row]], path: Path) -> None:
    """Answers found with every row sparse, and the loss added on text, by density, one column of panels a model."""
    pyplot, figure, axes = subplots(len(results), rows=2)
    cells_of = [cell for _, result in results for cell in (*result["main"], *result.get("rules", []))]
    names_of = dict.fromkeys(cell["selector"] for cell in cells_of)
    styles = {name: style_of(index) for index, name in enumerate(name for name in names_of if name != "dense")}
    for column, (title, result) in enumerate(results):
        densities, cells, shown = by_density(result)
        top, bottom = axes[0][column], axes[1][column]
        for name in shown:
            points = [(100 * d, cells[name, d]) for d in densities if (name, d) in cells]
            xs = [x for x, _ in points]
            ys = np.array([cell["all"]["share"] for _, cell in points])
            errors = [ys - [c["all"]["low"] for _, c in points], [c["all"]["high"] for _, c in points] - ys]
            top.errorbar(xs, ys, np.clip(errors, 0, None), lw=1.8, ms=4.5, elinewidth=0.8, label=name, **styles[name])
            bottom.plot(xs, [cell["extra_loss"] for _, cell in points], lw=1.8, ms=4.5, **styles[name])
        _rules(top, bottom, result.get("rules", []), styles)
        dense = cells.get(("dense", 1.0))
        if dense:
            top.axhline(dense["all"]["share"], color=INK, lw=1.1, ls=":", label="dense")
        top.set_ylim(-0.03, 1.03)
        top.set_title(title, loc="left", fontsize=10.5, color=INK)
        for axis in (top, bottom):
            axis.set_xscale("log")
            ticks = sorted({*densities, *(round(c["computed"], 1) for c in result.get("rules", []))})
            axis.set_xticks([100 * d for d in ticks], [f"{d:.0%}" for d in ticks])
            axis.minorticks_off()
        bottom.set_xlabel("computed block pairs", color=INK)
    axes[0][0].set_ylabel("answers right, every row sparse", color=INK)
    axes[1][0].set_ylabel("added loss on text, nats a token", color=INK)
    axes[0][0].plot([], [], ls="none", marker="*", ms=10, color=INK, label="threshold of mass: its value")
    legend_below(figure, axes[0], 7)
    save(pyplot, figure, path, "Accuracy against density, by model; stars: the blocks whose mass exceeds a threshold")


def _rules(top: Any, bottom: Any, rules: Sequence[Row], styles: Mapping[str, Any]) -> None:
    """A star for every budget rule, with its threshold beside it, in both panels of a model."""
    for cell in rules:
        style = styles[cell["selector"]] | {"ls": "none", "marker": "*", "ms": 10}
        label = cell["rule"].removeprefix("mass:")
        points = {
            top: (100 * cell["all"].get("computed", cell["computed"]), cell["all"]["share"]),
            bottom: (100 * cell["computed"], cell.get("extra", np.nan)),
        }
        for axis, point in points.items():
            axis.plot(*point, **style)
            axis.annotate(label, point, (0, 7), textcoords="offset points", ha="center", fontsize=8, color=INK)


def draw_detail(result: Row, path: Path) -> None:
    """Error by position when bands of rows are pruned; mass and strong pairs kept by layer."""
    found = result["layers"]
    if not found or not result["bands"]:
        return
    pyplot, figure, axes = subplots(3)
    kind = result["bands"][0]["kind"]
    for index, cell in enumerate(c for c in result["bands"] if c["kind"] == kind):
        kl = np.array(cell["kl"])
        xs = (np.arange(len(kl)) + 0.5) / len(kl)
        label = f"rows {cell['band'][0] / len(kl):.0%} to {cell['band'][1] / len(kl):.0%}"
        axes[0].plot(xs, np.maximum(kl, 1e-7), lw=1.6, label=label, color=COLORS[index])
    axes[0].set_yscale("log")
    axes[0].set_title(f"pruned rows keep {kind}: KL from dense", loc="left", fontsize=10.5, color=INK)
    axes[0].set_xlabel("position in the prompt", color=INK)
    for axis, key, title in (
        (axes[1], "error", "error of the attention output"),
        (axes[2], "strong_kept", "strong block pairs kept"),
    ):
        for index, (name, by_layer) in enumerate(found["losses"].items()):
            axis.plot(
                range(len(by_layer)), [cell[key] for cell in by_layer], lw=1.6, ms=4, label=name, **style_of(index)
            )
        axis.set_title(f"{title}, at {found['density']:.0%}", loc="left", fontsize=10.5, color=INK)
        axis.set_xlabel("layer", color=INK)
    legend_under(axes[0], 2)
    legend_under(axes[1], 4)
    save(pyplot, figure, path, "Where a selection loses")
