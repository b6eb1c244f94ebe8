"""What the mean correction gains: text loss and KL divergence with and without it, on the same windows.

    python -m bench.correction --lengths 4K,8K --windows 6             # the shipped model; a CPU will do
    python -m bench.correction --model smollm2 --lengths 4K

Every layer is sparse. Loss and divergence from dense attention are of the second half of each window's tokens, nats a
token; the gain is the paired difference, with Student's 95 % interval. Writes correction.json as windows are measured.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stem_flex import StemConfig
from stem_flex.integrations.hf_calibrate import student

from . import attend, models, report, ruler, tasks
from .thresholds import Configured


def configurations(thresholds: list[float], density: float) -> dict[str, StemConfig]:
    """The budgets compared, by name."""
    found = {f"mass > {threshold:g}": StemConfig.mass(threshold) for threshold in thresholds}
    fixed = StemConfig(schedule="fixed", k_start=density, sink_blocks=1, local_blocks=2)
    return found | {f"Stem {density:.0%}": fixed}


@torch.inference_mode()
def scored(model: Any, ids: Tensor, policy: Any) -> Tensor:
    """Log-probabilities, float32 (tokens, vocabulary), of the second half of ``ids`` (tokens,)."""
    kept = len(ids) - len(ids) // 2 + 1
    with attend.attending(policy):
        logits = model(ids[None].to(model.device), use_cache=False, logits_to_keep=kept).logits
    return logits[0, :-1].float().log_softmax(-1)


def measure(model: Any, ids: Tensor, configs: dict[str, StemConfig]) -> list[dict[str, Any]]:
    """A row for each configuration, without and with the correction, of one window."""
    dense = scored(model, ids, attend.Dense())
    said = ids[-len(dense) :, None].to(dense.device)
    rows = []
    for name, config in configs.items():
        row: dict[str, Any] = {"policy": name, "length": len(ids)}
        for label, correction in (("none", None), ("mean", "mean")):
            policy = Configured(name, replace(config, correction=correction))
            found = scored(model, ids, policy)
            row[f"loss_{label}"] = float((dense - found).gather(-1, said).mean())
            row[f"kl_{label}"] = float((dense.exp() * (dense - found)).sum(-1).mean())
            row[f"density_{label}"] = policy.density()
        rows.append(row)
    return rows


def interval(values: list[float]) -> str:
    """Mean and half of Student's 95 % interval."""
    half = statistics.stdev(values) / len(values) ** 0.5 * student(0.95, len(values) - 1)
    return f"{statistics.fmean(values):+.4f} ± {half:.4f}"


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A line for each length and configuration."""
    lines = []
    for length, name in dict.fromkeys((row["length"], row["policy"]) for row in rows):
        own = [row for row in rows if (row["length"], row["policy"]) == (length, name)]
        cells = [report.short(length), name, f"{statistics.fmean(row['density_none'] for row in own):.1%}"]
        for what in ("loss", "kl"):
            cells.append(f"{statistics.fmean(row[f'{what}_none'] for row in own):+.4f}")
            cells.append(interval([row[f"{what}_mean"] - row[f"{what}_none"] for row in own]))
        lines.append(cells)
    return lines


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.correction", description=(__doc__ or "").split("\n\n")[0])
    models.add_argument(parser)
    parser.add_argument("--lengths", type=report.parse_lengths, default=[4096])
    parser.add_argument("--thresholds", type=lambda text: [float(x) for x in text.split(",")], default=[0.05, 0.1, 0.2])
    parser.add_argument("--density", type=float, default=0.25, help="of Stem's fixed schedule")
    parser.add_argument("--windows", type=int, default=4, help="of each length, 2 or more")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=report.ROOT / "bench" / "out", help="folder for correction.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print and write."""
    options = parse(arguments)
    model, tokenizer = ruler.load_model(options.model, torch.device(options.device))
    corpus, configs = ruler.read_corpus(tokenizer), configurations(options.thresholds, options.density)
    rows: list[dict[str, Any]] = []
    environment = report.environment()
    for length in options.lengths:
        windows = tasks.text_windows(corpus.tokens, length, options.windows, seed=options.seed)
        for number, ids in enumerate(torch.from_numpy(windows)):
            rows += [row | {"window": number} for row in measure(model, ids, configs)]
            report.write(options.out, "correction", rows, environment=environment, model=options.model.name)
            print(f"{report.short(length)}: window {number + 1} of {options.windows}", flush=True)
    columns = ["tokens", "budget", "density", "loss", "gain by means", "KL", "gain by means"]
    notes = ["nats a token over dense attention; gains below 0 are better"]
    report.show(f"{options.model.name}, mean correction", columns, table(rows), notes)
    return rows


if __name__ == "__main__":
    main()
