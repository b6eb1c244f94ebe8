"""Tables of ``python -m bench.refine``: means, intervals and ratios paired by prompt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stem_flex.config import StemConfig
from stem_flex.selectors.refine import saved

from . import report
from .refine_policies import EQUAL


def cell(values: list[float], others: list[float] | None = None) -> dict[str, Any]:
    """Mean and its interval over seeds; of the ratio to ``others``, paired, where they are given."""
    found: dict[str, Any] = {"mean": sum(values) / len(values), "interval": report.bootstrap(values)}
    if others is not None:
        ratios = [a / b for a, b in zip(values, others, strict=True)]
        found |= {"ratio": sum(ratios) / len(ratios), "ratio_interval": report.bootstrap(ratios)}
    return found


def table(raw: dict[str, Any], found: list[Any]) -> list[dict[str, Any]]:
    """One row for each method and policy: what it saves, errors with intervals, ratios to the uniform cut.

    "mass" saves what it happens to, so that it has a uniform cut of its own, of the same size on every prompt.
    """
    rows = []
    for method in found:
        for policy in [*(policy.name for policy in method.policies), EQUAL]:
            own = policy in ("mass", EQUAL)
            shares = {part: _saved(raw, part, method.name, policy) for part in ("layer", "deep")} if own else {}
            row: dict[str, Any] = {"method": method.name, "policy": policy}
            row["saved"] = shares["layer"]["all"] if own else method.savings[policy]
            row |= {f"saved {part}": share for part, share in shares.items() if share}
            for part in ("layer", "quarters", "deep"):
                mine, cut = (raw[part].get(f"{method.name}/{p}") for p in (policy, EQUAL if own else "uniform"))
                for name in mine or ():
                    row[f"{part} {name}"] = cell(mine[name], cut[name])
            rows.append(row)
    return rows


def _saved(raw: dict[str, Any], part: str, method: str, policy: str) -> dict[str, float]:
    """What a policy really saved of the pairs: of all prompts, of the one with the least and the most."""
    kept, native = (raw[f"pairs {part}"].get(f"{method}/{p}", {}).get("kept") for p in (policy, "native"))
    if kept is None or native is None:
        return {}
    shares = [1 - mine / all_of_it for mine, all_of_it in zip(kept, native, strict=True)]
    return {"all": 1 - sum(kept) / sum(native), "least": min(shares), "most": max(shares)}


def errors_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """What each policy saves, and its errors with their ratios to the uniform cut's."""
    lines = []
    for row in rows:
        cells = [row["method"], row["policy"], _shares(row)]
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
        "brackets 95 % bootstrap intervals of the ratio to the uniform cut of the same size, paired by prompt. Two "
        "savings: of the layers' prompts and of the whole model's.",
        "",
    ]
    columns, cells = errors_table(rows)
    lines += [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *cells)]
    lines += ["", "Ratio of the layer error to the uniform cut's, by layer and by quarter of the prompt:", ""]
    names = [name for name in rows[0] if name.startswith(("layer ", "quarters ")) and name != "layer all"]
    lines.append("| method | policy | " + " | ".join(name.replace("quarters", "quarter") for name in names) + " |")
    lines.append("|" + "---|" * (len(names) + 2))
    for row in rows:
        if row["policy"].startswith(("decay", "mass")):
            lines.append(f"| {row['method']} | {row['policy']} | {' | '.join(_ratio(row[n]) for n in names)} |")
    lines += _by_prompt(rows)
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


def _by_prompt(rows: list[dict[str, Any]]) -> list[str]:
    """What "mass" saved of single prompts; nothing where it was not measured."""
    said = []
    for row in [row for row in rows if row["policy"] == "mass"]:
        for part, name in (("layer", "layers"), ("deep", "whole model")):
            if share := row.get(f"saved {part}"):
                spread = f"{share['least']:.1%} to {share['most']:.1%}"
                said.append(f"{row['method']}, {name}: {share['all']:.1%} ({spread})")
    return ["", f'Saved by "mass" of all prompts (of single ones): {"; ".join(said)}.'] if said else []


def _shares(row: dict[str, Any]) -> str:
    """What is saved of the layers' prompts, and of the whole model's where that is not the same."""
    return "; ".join(f"{share:.1%}" for share in [row["saved"]] + [x["all"] for x in [row.get("saved deep")] if x])


def _ratio(entry: dict[str, Any]) -> str:
    low, high = entry["ratio_interval"]
    return f"{entry['ratio']:.3f} [{low:.3f}, {high:.3f}]"
