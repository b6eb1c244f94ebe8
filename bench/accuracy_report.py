"""Tables and figures of bench.accuracy, from its accuracy.jsonl."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stem_flex.selectors import get, names

from .families import HARDER
from .report import bootstrap, share, short, show
from .ruler import wilson

Row = dict[str, Any]
PROTOCOLS = ("prompt", "all")


def write(path: Path) -> Row:
    """Write accuracy.json, accuracy.md and the figures beside accuracy.jsonl, print the main table."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    result = summarize(rows)
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(result))
    columns, table = main_cells(result)
    show("answers found, by density", columns, table)
    from . import accuracy_plots  # which reads results by what is here

    accuracy_plots.draw(result, path.with_suffix(".png"))
    accuracy_plots.draw_detail(result, path.with_name("accuracy_detail.png"))
    return result


def pooled(rows: Iterable[Row]) -> Row:
    """One cell of several passes: hits, samples, share and interval by protocol and family, and the text loss."""
    rows = list(rows)
    cell: Row = {"computed": rows[0]["computed"], "passes": len(rows)}
    for protocol in PROTOCOLS:
        hits: dict[str, str] = defaultdict(str)
        for row in rows:
            for family, found in row[protocol].items():
                hits[family] += found
        everything = "".join(found for family, found in hits.items() if family not in HARDER or len(hits) == 1)
        low, high = wilson(everything.count("1"), len(everything))
        cell[protocol] = {
            "right": everything.count("1"), "samples": len(everything), "low": low, "high": high,
            "share": everything.count("1") / max(1, len(everything)),
            "families": {family: [found.count("1"), len(found)] for family, found in hits.items()},
        }  # fmt: skip
        nats = [loss for row in rows for losses in row.get(f"{protocol}_nats", {}).values() for loss in losses]
        if nats:
            cell[protocol] |= {"nats": float(np.mean(nats)), "nats_interval": bootstrap(nats)}
        if all(f"{protocol}_computed" in row for row in rows):
            cell[protocol]["computed"] = float(np.mean([row[f"{protocol}_computed"] for row in rows]))
    cell["computed"] = float(np.mean([row["computed"] for row in rows]))
    cell["loss"] = float(np.mean([loss for row in rows for loss in row["loss"]]))
    for key in ("kl", "extra"):
        values = [value for row in rows for value in row.get(key, [])]
        if values:
            cell |= {key: float(np.mean(values)), f"{key}_interval": bootstrap(values)}
    return cell


def summarize(rows: Sequence[Row]) -> Row:
    """Everything measured, passes pooled."""

    def of(section: str) -> list[Row]:
        return [row for row in rows if row["section"] == section]

    def grouped(section: str, *keys: str) -> list[Row]:
        groups: dict[tuple, list[Row]] = defaultdict(list)
        for row in of(section):
            groups[tuple(json.dumps(row[key]) for key in keys)].append(row)
        return [{key: group[0][key] for key in keys} | pooled(group) for group in groups.values()]

    environment = (of("environment") or [{}])[0]
    dense = {(row["length"], row.get("turn", 0)): row["loss"] for row in rows if row.get("selector") == "dense"}
    for row in rows:  # paired, window by window
        if row["section"] in ("main", "rules", "length"):
            own = dense.get((row["length"], row.get("turn", 0)), [])
            row["extra"] = [loss - other for loss, other in zip(row["loss"], own, strict=False)]
    main = grouped("main", "selector", "density")
    for cell in main:
        cell["extra_loss"] = cell.get("extra", float("nan"))
    return {
        "environment": environment,
        "main": main,
        "rules": grouped("rules", "selector", "rule"),
        "ablations": grouped("ablation", "option", "value", "density"),
        "lengths": grouped("length", "length", "selector", "density"),
        "bands": [
            cell | {"kl": row["kl"]} for row, cell in zip(of("bands"), grouped("bands", "kind", "band"), strict=True)
        ],
        "layers": layers(of("layers")),
        "failures": of("failure"),
        "seconds": (of("end") or [{"seconds": None}])[0]["seconds"],
    }


def layers(rows: Sequence[Row]) -> Row:
    """Means by selector and layer; needle counts by layer and head."""
    if not rows:
        return {}
    losses: dict[str, list[Row]] = {}
    for name in rows[0]["names"]:
        by_layer = zip(*(row["losses"][name] for row in rows), strict=True)
        losses[name] = []
        for cells in by_layer:
            strong = sum(cell["strong"] for cell in cells)
            kept = sum(cell["strong_kept"] * cell["strong"] for cell in cells)
            losses[name].append({
                "error": float(np.mean([cell["error"] for cell in cells])),
                "mass": float(np.mean([cell["mass"] for cell in cells])),
                "strong": strong, "strong_kept": kept / max(1, strong),
            })  # fmt: skip
    counts = np.sum([row["needles"] for row in rows], axis=0)
    heads = [
        {"layer": layer, "head": head, "strong": int(cell[0]),
         "kept": {name: int(n) for name, n in zip(rows[0]["names"], cell[1:], strict=True)}}
        for layer, by_head in enumerate(counts) for head, cell in enumerate(by_head) if cell[0]
    ]  # fmt: skip
    heads.sort(key=lambda cell: -cell["strong"])
    return {"density": rows[0]["density"], "losses": losses, "heads": heads}


# ---- tables ------------------------------------------------------------------------------------------------------


def by_density(result: Row) -> tuple[list[float], dict[tuple[str, float], Row], list[str]]:
    """Densities, the main cells by selector and density, and the selectors, dense apart."""
    cells = {(cell["selector"], cell["density"]): cell for cell in result["main"]}
    densities = sorted({density for _, density in cells if density < 1})
    shown = [name for name in dict.fromkeys(name for name, _ in cells) if name != "dense"]
    return densities, cells, shown


def main_cells(result: Row) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the main table: protocol by selector and density."""
    densities, cells, shown = by_density(result)
    columns = ["selector", "protocol", *(f"{density:.0%}" for density in densities)]
    table = []
    for protocol in (*PROTOCOLS, "text"):
        dense = cells.get(("dense", 1.0))
        if dense:
            value = f"{dense['loss']:.3f} nats" if protocol == "text" else share(dense[protocol])
            table.append(["dense (100 %)", protocol, value, *[""] * (len(densities) - 1)])
        for name in shown:
            line = [name, protocol]
            for density in densities:
                cell = cells.get((name, density))
                if cell is None:
                    line.append("")
                else:
                    line.append(f"{cell['extra_loss']:+.3f}" if protocol == "text" else share(cell[protocol]))
            table.append(line)
    return columns, table


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def markdown(result: Row) -> str:
    """The generated page."""
    info = result["environment"]
    length = short(info.get("length", 0))
    text = f"""# Accuracy against density

Generated by `{info.get("command")}` on {info.get("gpu") or "a CPU"},
torch {info.get("torch")}, {info.get("date")}.
Model: {info.get("model", "`examples/needle_lm`")}.
Prompts of {length} tokens, families {", ".join(info.get("families", []))}.
Density = computed part of the causal block pairs, forced blocks ({info.get("sink")} sink, {info.get("local")} local)
included, equal for all selectors. Share of prompts whose answer is exactly right, with 95 % Wilson interval.
"prompt": the prompt's rows are sparse, the answer is decoded densely; "all": every row is sparse. "text": added loss
on unseen text, nats a token.

"""
    columns, table = main_cells(result)
    text += _table(columns, table)
    text += _rule_text(result) + _family_text(result)
    shown = [name for name in by_density(result)[2] if name in names()]
    text += "\n## Selectors\n" + _table(["name", "looks at"], [[name, get(name).note] for name in shown])
    for title, key in (("Ablations", "ablations"), ("Other lengths", "lengths")):
        if result[key]:
            keys = ("option", "value") if key == "ablations" else ("length", "selector")
            text += f"\n## {title}\n"
            lines = [
                [*(str(cell[k]) for k in keys), f"{cell['density']:.0%}", *map(share, (cell["prompt"], cell["all"])),
                 f"{cell['loss']:.3f}"]
                for cell in result[key]
            ]  # fmt: skip
            text += _table([*keys, "density", "prompt", "all", "text, nats"], lines)
    return text + _layer_text(result) + _band_text(result)


def interval(cell: Row, key: str) -> str:
    """A mean with its bootstrap interval; empty where it was not measured."""
    if key not in cell:
        return ""
    sign = "+" if key == "extra" else ""
    value, low, high = (f"{x:{sign}.3f}" for x in (cell[key], *cell[f"{key}_interval"]))
    return f"{value} [{low}, {high}]"


def _rule_text(result: Row) -> str:
    """Added loss and divergence with their intervals, and the budget rules."""
    rows = []
    for cell in (*result["main"], *result.get("rules", [])):
        if "kl" in cell:
            label = cell.get("rule") or f"{cell['density']:.0%}"
            rows.append([cell["selector"], label, f"{cell['computed']:.1%}", f"{cell['prompt'].get('computed', 1):.1%}",
                         share(cell["prompt"]), share(cell["all"]), interval(cell, "extra"),
                         interval(cell, "kl")])  # fmt: skip
    if not rows:
        return ""
    columns = ["selector", "budget", "of text", "of prompts", "prompt", "all", "added loss", "KL to dense"]
    return (
        "\n## Text and budget rules\nComputed part of the block pairs of text and of prompts; a rule's is as it falls. "
        "Added loss and KL divergence from dense, nats a token, mean over windows with 95 % bootstrap intervals.\n\n"
        + _table(columns, rows)
    )


def _family_text(result: Row) -> str:
    """Shares of right answers by family, where the families are not all alike."""
    cells = [cell for cell in (*result["main"], *result.get("rules", [])) if set(HARDER) & set(cell["all"]["families"])]
    if not cells:
        return ""
    shown = list(cells[0]["all"]["families"])
    rows = []
    for cell in cells:
        for protocol in PROTOCOLS:
            counts = [cell[protocol]["families"][family] for family in shown]
            label = cell.get("rule") or f"{cell['density']:.0%}"
            rows.append([cell["selector"], label, protocol, *(f"{right}/{samples}" for right, samples in counts)])
    text = f"\n## By family\nAll but {', '.join(HARDER)} make up the shares above.\n\n"
    return text + _table(["selector", "budget", "protocol", *shown], rows)


def _layer_text(result: Row) -> str:
    found = result["layers"]
    if not found:
        return ""
    count = len(next(iter(found["losses"].values())))
    text = f"\n## What each layer loses at {found['density']:.0%}, on dense activations\n"
    for key, title in (
        ("error", "Relative error of the attention output"),
        ("mass", "Attention mass on computed blocks"),
        (
            "strong_kept",
            "Share kept of the pairs (row, block), not forced, where some token puts a quarter of its attention",
        ),
    ):
        rows = [[name, *(f"{cell[key]:.2f}" for cell in by_layer)] for name, by_layer in found["losses"].items()]
        text += f"\n{title}:\n\n" + _table(["selector", *(f"layer {i}" for i in range(count))], rows)
    shown = list(found["losses"])
    rows = [
        [f"{c['layer']}.{c['head']}", str(c["strong"]), *(f"{c['kept'][n] / c['strong']:.2f}" for n in shown)]
        for c in found["heads"][:16]
    ]
    text += (
        "\nWho loses the needle: heads (layer.head) in which a row that predicts the answer puts a quarter of a token's"
    )
    text += " attention on a block of the statement asked for, how often, and the share of those that is computed:\n\n"
    return text + _table(["head", "times", *shown], rows)


def _band_text(result: Row) -> str:
    if not result["bands"]:
        return ""
    text = (
        "\n## Pruning early or late rows\nEach band of rows holds a quarter of the causal pairs; the others are dense."
    )
    text += " KL divergence of the next-token distribution from dense, nats, mean over positions.\n\n"
    rows = []
    for cell in result["bands"]:
        first, last = cell["band"]
        kl = np.array(cell["kl"])
        after = f"{kl[last:].mean():.4f}" if last < len(kl) else ""
        rows.append([cell["kind"], f"{first / len(kl):.0%} to {last / len(kl):.0%}", f"{kl.mean():.4f}",
                     f"{kl[first:last].mean():.4f}", after, share(cell["prompt"]), share(cell["all"])])  # fmt: skip
    return text + _table(["rows keep", "band", "all positions", "in the band", "after it", "prompt", "all"], rows)
