"""Tables and sentences of thresholds of mass, from what bench.thresholds wrote, for :mod:`bench.readme`."""

from __future__ import annotations

from typing import Any

from .report import short
from .result_tables import run

THRESHOLDS = {
    "thresholds": "the shipped model",
    "thresholds_medium": "a model of 43.8 M parameters",
    "thresholds_32k": "the shipped model, more prompts",
    "thresholds_coarse": "the shipped model with `sketch=(8, 8, 4, 8)`",
    "thresholds_smollm2": "SmolLM2-135M-Instruct",
}
BRIEF_LENGTHS = (8192, 32768)  # of thresholds': those that README.md shows, where they were measured


def thresholds(result: dict[str, Any], model: str = "the shipped model") -> str:
    """Density, answers and text loss by threshold and length."""
    from .thresholds import table

    return _thresholds(result, model) + "\n".join(table(result["rows"])) + "\n"


def thresholds_brief(result: dict[str, Any]) -> str:
    """The same at some lengths, and what it says of the default threshold at the longest."""
    from .thresholds import table

    rows = result["rows"]
    rows = [row for row in rows if "coarse" not in row["policy"]]  # a sketch of its own: `thresholds_coarse`
    shown = [row for row in rows if row["length"] in BRIEF_LENGTHS] or rows
    longest = [row for row in rows if row["length"] == max(row["length"] for row in rows)]
    named = {row["policy"]: row for row in longest}
    said = ""
    if {"dense", "mass > 0.05", "Stem 25%"} <= named.keys():
        found = [_summary(named[name], named["dense"], name) for name in ("dense", "mass > 0.05", "Stem 25%")]
        said = f"\nAt {short(longest[0]['length'])} tokens: {'; '.join(found)}. Other lengths and models: "
        said += "[bench/RESULTS.md](bench/RESULTS.md).\n"
    return _thresholds(result, THRESHOLDS["thresholds"]) + "\n".join(table(shown)) + "\n" + said


def thresholds_coarse(result: dict[str, Any]) -> str:
    """What the fastest budget keeps at the longest length, in one sentence."""
    rows = [row for row in result["rows"] if row["length"] == max(row["length"] for row in result["rows"])]
    named = {row["policy"]: row for row in rows}
    name = "mass > 0.05, coarse (4, 1)"
    if name not in named:
        return ""
    found = _summary(named[name], named["dense"], name)
    return (
        f"With `sketch=(8, 8, 4, 8), coarse=(4, 1)` at {short(rows[0]['length'])} tokens, {rows[0]['all'][1]} prompts: "
        f"{found}; {_summary(named['dense'], named['dense'], 'dense')} ({run(result['environment'])}).\n"
    )


def _thresholds(result: dict[str, Any], model: str) -> str:
    count = result["rows"][0]["all"][1]
    return (
        f"Budgets of estimated mass on {model}: {run(result['environment'])}; {count} prompts a cell, right answers "
        "with the prompt's rows sparse or all of them, nats a token added on text; 95 % intervals, of text of the "
        f"paired difference.{_stem_words(result['rows'])}\n\n"
    )


def _stem_words(rows: list[dict[str, Any]]) -> str:
    """What the percents in the names of Stem's policies are, and which part of the causal pairs they compute."""
    computed: dict[str, list[str]] = {}
    for row in rows:
        if row["policy"].startswith("Stem "):
            computed.setdefault(row["policy"], []).append(f"{row['density']:.0%}")
    parts = [f"{name} computes {' to '.join(sorted({min(x), max(x)}))}" for name, x in computed.items()]
    if not parts:
        return ""
    return (
        ' "Stem" and a percent: `k_start`, the part of the whole prompt\'s blocks that a row keeps, falling to 0.7 of '
        "it at the prompt's end; early rows see fewer and keep all they see. Of the causal pairs, by which density "
        f"counts, {', '.join(parts)}."
    )


def _summary(row: dict[str, Any], dense: dict[str, Any], name: str) -> str:
    """A policy's shares of right answers, its density and its added loss, in words."""
    from .thresholds import difference

    prompt, every = (f"{hits / count:.2f}" for hits, count in (row["prompt"], row["all"]))
    if row is dense:
        return f"dense attention finds {prompt} of the answers with the prompt sparse ({every} with every row)"
    extra, half = difference(row["losses"], dense["losses"])
    return f"{name} {prompt} ({every}) by {row['density']:.1%} of the blocks, for {extra:+.3f} ± {half:.3f} nats"
