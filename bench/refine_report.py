"""Tables of ``python -m bench.refine``: means, intervals and ratios paired by prompt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stem_flex.config import StemConfig
from stem_flex.selectors.refine import saved

from . import report


def cell(values: list[float], others: list[float] | None = None) -> dict[str, Any]:
    """Mean and its interval over seeds; of the ratio to ``others``, paired, where they are given."""
    found: dict[str, Any] = {"mean": sum(values) / len(values), "interval": report.bootstrap(values)}
    if others is not None:
        ratios = [a / b for a, b in zip(values, others, strict=True)]
        found |= {"ratio": sum(ratios) / len(ratios), "ratio_interval": report.bootstrap(ratios)}
    return found


def table(raw: dict[str, Any], found: list[Any]) -> list[dict[str, Any]]:
    """One row for each method and policy: what it saves, errors with intervals, ratios to the uniform cut."""
    rows = []
    for method in found:
        for policy in method.policies:
            row: dict[str, Any] = {"method": method.name, "policy": policy.name, "saved": method.savings[policy.name]}
            for part in ("layer", "quarters", "deep"):
                mine, cut = (raw[part].get(f"{method.name}/{p}") for p in (policy.name, "uniform"))
                for name in mine or ():
                    row[f"{part} {name}"] = cell(mine[name], cut[name])
            rows.append(row)
    return rows


def errors_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """What each policy saves, and its errors with their ratios to the uniform cut's."""
    lines = []
    for row in rows:
        cells = [row["method"], row["policy"], f"{row['saved']:.1%}"]
        for name in ("layer all", "deep error", "deep kl"):
            entry = row.get(name)
            cells += ["", ""] if entry is None else [f"{entry['mean']:.4f}", _ratio(entry)]
        lines.append(cells)
    ratio = "to uniform"
    return ["method", "policy", "saved", "layer error", ratio, "last hidden", ratio, "KL, nats", ratio], lines


def markdown(rows: list[dict[str, Any]], header: dict[str, Any]) -> str:
    """The table and what holds in each layer."""
    lines = [
        f"Output error of Stem on trained sparsity: layers at {report.short(header['length'])} tokens, "
        f"{header['seeds']} prompts; the whole model at {report.short(header['deep_length'])}, {header['deep_seeds']} "
        "prompts. Relative L2 errors against dense attention; in "
        "brackets 95 % bootstrap intervals of the ratio to the uniform cut, paired by prompt.",
        "",
    ]
    columns, cells = errors_table(rows)
    lines += [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *cells)]
    lines += ["", "Ratio of the layer error to the uniform cut's, by layer and by quarter of the prompt:", ""]
    names = [name for name in rows[0] if name.startswith(("layer ", "quarters ")) and name != "layer all"]
    lines.append("| method | policy | " + " | ".join(name.replace("quarters", "quarter") for name in names) + " |")
    lines.append("|" + "---|" * (len(names) + 2))
    for row in rows:
        if row["policy"].startswith("decay"):
            lines.append(f"| {row['method']} | {row['policy']} | {' | '.join(_ratio(row[n]) for n in names)} |")
    paper = StemConfig.paper()
    lines += ["", "What the decay saves by the prompt's length, at the published budgets:", ""]
    lines += [
        "| tokens | DSA, mu 0.7 | by the operator's decay | InfLLM-v2, mu 0.62 | InfLLM-v2, mu 0.7 |",
        "|---|---|---|---|---|",
    ]
    for length in (4096, 8192, 16384, 32768, 65536, 131072, 262144, 524288, 1048576):
        shares = [
            saved(length, paper, keep=2048).share,
            saved(length, StemConfig.operator(), keep=2048).share,
            saved(length, replace(paper, mu=0.62), keep=96, key_size=64, floor=34).share,
            saved(length, paper, keep=96, key_size=64, floor=34).share,
        ]
        lines.append(f"| {report.short(length)} | {' | '.join(f'{share:.2%}' for share in shares)} |")
    return "\n".join(lines) + "\n"


def _ratio(entry: dict[str, Any]) -> str:
    low, high = entry["ratio_interval"]
    return f"{entry['ratio']:.3f} [{low:.3f}, {high:.3f}]"
