"""Tables and the picture of `bench.ttft`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from . import plots, report

NAMES = {"sdpa": "SDPA FlashAttention-2", "fa4": "flash-attn-4", "stem": "Stem"}


def listed(layers: Sequence[int]) -> str:
    """Layers in words."""
    return ", ".join(map(str, layers)) or "none"


def _cells_of(row: dict[str, Any], names: list[str]) -> list[str]:
    line = [row["model"], report.short(row["tokens"])]
    for name in names:
        cell = row.get(name, {})
        line.append(f"{cell['fastest_ms']:,.0f}" if "ms" in cell else "error" if "error" in cell else "-")
    stem = row.get("stem", {})
    line += [f"{stem[part]:,.1f}" if part in stem else "-" for part in ("attention_ms", "mask_ms", "rest_ms")]
    line += [f"{row[key]:.2f}x" if key in row else "-" for key in ("over_sdpa", "over_fa4")]
    return [*line, f"{row['extra_gib']:+.2f}" if "extra_gib" in row else "-"]


def present(rows: list[dict[str, Any]], options: argparse.Namespace, header: dict[str, Any]) -> None:
    """Print the table, write JSON, CSV, the table with the header's note, and the picture."""
    names = [name for name in NAMES if name in options.implementations]
    columns = ["model", "tokens", *(f"{NAMES[name]} ms" for name in names), "Stem attention", "mask", "rest",
               "over SDPA", "over FA4", "peak GiB over SDPA"]  # fmt: skip
    body = [_cells_of(row, names) for row in rows]
    notes = [
        f"{row['model']} {report.short(row['tokens'])} {name}: {cell.get('error') or cell['skipped']}"
        for row in rows
        for name, cell in row.items()
        if isinstance(cell, dict) and ({"error", "skipped"} & cell.keys())
    ]
    machine = header["environment"]["gpu"] or "CPU"
    layers = listed(options.dense_layers)
    name = f"Time to first token, {machine}"
    title = f"{name}, {options.dtype}, batch 1, dense layers {layers}, fastest of up to {options.repeats}"
    report.show(title, columns, body, notes)
    path = report.write(options.out, "ttft", rows, **header)
    table = [columns, ["---", *["---:"] * (len(columns) - 1)], *body]
    text = f"{title}:\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in table)
    (options.out / "ttft.md").write_text(text + (f"\n{header['note']}\n" if "note" in header else ""))
    picture = plots.panels(
        options.out / "ttft.png",
        name,
        [_panel(rows, model, names) for model in options.models],
    )
    print(f"wrote {path}, {options.out / 'ttft.md'}" + (f" and {picture}" if picture else ""))


def _panel(rows: list[dict[str, Any]], model: str, names: list[str]) -> dict[str, Any]:
    series: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["model"] != model:
            continue
        for name in names:
            if "ms" in row.get(name, {}):
                series.setdefault(NAMES[name], []).append((row["tokens"], row[name]["fastest_ms"] / 1e3))
        if "ms" in row.get("stem", {}):
            series.setdefault("Stem without attention", []).append((row["tokens"], row["stem"]["rest_ms"] / 1e3))
    return {
        "title": model,
        "ylabel": "seconds to the first token",
        "series": series,
        "log": True,
        "dashed": [name for name in series if not name.startswith("Stem")] + ["Stem without attention"],
    }
