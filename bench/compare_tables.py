"""Tables of selectors side by side, from what bench.compare wrote, for :mod:`bench.readme`."""

from __future__ import annotations

from typing import Any

from .compare_report import MADE, WAYS, matched_table, native_table, remark, speed_words
from .report import short
from .result_tables import markdown, run


def selectors(result: dict[str, Any]) -> str:
    """Every published selector at its own settings, and the figure of all."""
    where = result["environment"]
    return (
        f"Published selectors at their own settings in the same kernels: {run(where)}. "
        f"{_compared(result)}\n\n"
        + markdown(*native_table(result))
        + "\nAt equal densities: [bench/RESULTS.md](bench/RESULTS.md).\n\n"
        + "![selectors](bench/results/compare.png)\n"
    )


def _compared(result: dict[str, Any]) -> str:
    """What the columns of a comparison say."""
    where, timed = result["environment"], speed_words(result)
    said = f" Times: {timed}, of {MADE}; median ms of selection and attention, each alone, and the density."
    asked = max((cell["all"]["samples"] for cell in result["cells"] if "all" in cell), default=0)
    return (
        f"The shipped model on {short(where['length'])}-token prompts, {asked} a cell: density of text, attention mass "
        f"on computed blocks and error of the attention output on dense activations, answers exactly right with the "
        f"prompt's rows sparse or all of them (95 % Wilson intervals), nats a token added on text."
        + (said if timed else "")
    )


def compare(result: dict[str, Any]) -> str:
    """The same at equal densities: by counts, and by each selector's own rule."""
    text = selectors(result).replace("\nAt equal densities: [bench/RESULTS.md](bench/RESULTS.md).\n", "")
    for density in sorted({cell["wanted"] for cell in result["cells"] if cell["wanted"] is not None}):
        for way, words in WAYS.items():
            columns, rows = matched_table(result, way, density)
            if rows:
                text += f"\n### {density:.0%} of the blocks, {words}\n\n" + markdown(columns, rows)
                text += remark(result, way, density)
    return text


def speeds(result: dict[str, Any]) -> str:
    """Times of selection and of attention by another backend."""
    where = result["environment"]
    rows = [
        [row["selector"], row["way"], *(f"{row[key]:.3g}" for key in ("selection", "attention", "density"))]
        for row in result["speed"]
        if "selection" in row
    ]
    return (
        f"Selection and attention by {result['speed'][0]['backend'].upper()}, median ms, {speed_words(result)}, of "
        f"{MADE}: {run(where)}. native: at its own settings; count: "
        f"{result['environment']['density']:.0%} of the blocks, "
        "the same number for every row.\n\n"
        + markdown(["selector", "settings", "selection", "attention", "density"], rows)
    )
