"""Budgets of estimated mass: density, answers and text loss against threshold and length, for any model.

    python -m bench.thresholds --lengths 4K,8K,16K,32K --thresholds 0.02,0.05,0.1

Every layer chooses its blocks by :func:`stem_flex.stem_block_mask` with the given configuration, so the density is as
it falls. "prompt": the prompt's rows are sparse, answers are decoded densely; "all": every row is sparse; "text": nats
a token added to dense attention on unseen text, on the same windows, with a 95 % interval of the paired difference.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from stem_flex import StemConfig, stem_block_mask

from . import attend, families, models, report, ruler, tasks


@dataclass
class Configured:
    """Every layer attends to the blocks that a configuration chooses; rows of a tail attend to everything.

    Attributes:
        kept: computed and causal block pairs of every call, on the device.
    """

    name: str
    config: StemConfig
    dense_tail: int = 0
    kept: list[tuple[Tensor, int]] = field(default_factory=list, repr=False)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        seen = q.shape[2] - self.dense_tail
        parts = [self.sparse(*(x[:, :, :seen] for x in (q, k, v)), scale)]
        if self.dense_tail:
            rows = torch.arange(seen, q.shape[2], device=q.device)[:, None]
            mask = torch.arange(q.shape[2], device=q.device) <= rows
            tail = scaled_dot_product_attention(q[:, :, seen:], k, v, attn_mask=mask, scale=scale, enable_gqa=True)
            parts.append(tail)
        return torch.cat(parts, 2)

    def sparse(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """The sparse rows."""
        mask = stem_block_mask(q, k, v, self.config)
        rows = mask.kv_num_blocks.shape[2]
        counts = mask.kv_num_blocks if mask.full_kv_num_blocks is None else mask.kv_num_blocks + mask.full_kv_num_blocks
        self.kept.append((counts.sum(), counts.shape[0] * counts.shape[1] * rows * (rows + 1) // 2))
        return attend.attend(q, k, v, mask, scale, self.config.correction)

    def density(self) -> float:
        """Computed part of the causal block pairs so far."""
        return sum(int(x) for x, _ in self.kept) / max(1, sum(pairs for _, pairs in self.kept))


def measure(model: Any, corpus: ruler.Corpus, length: int, policy: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Answers under both protocols, text losses and density of one policy."""
    start = time.monotonic()
    found: dict[str, Any] = {"policy": policy.name, "length": length}
    for protocol in ("prompt", "all"):
        hits: list[bool] = []
        for first in range(0, options.samples, options.batch):
            seeds = range(options.seed + first, options.seed + min(first + options.batch, options.samples))
            chosen = [options.families[seed % len(options.families)] for seed in seeds]
            batch = ruler.make_batch(corpus, chosen, seeds, length, protocol)
            used = replace(policy, dense_tail=batch.tail) if isinstance(policy, Configured) else policy
            hits += ruler.right_answers(model, batch, used)
        found[protocol] = [sum(hits), len(hits)]
    windows = torch.from_numpy(tasks.text_windows(corpus.tokens, length, options.text, seed=options.seed))
    found["losses"] = [x for part in windows.split(options.batch) for x in ruler.text_losses(model, part, policy)]
    found["density"] = policy.density() if isinstance(policy, Configured) else 1.0
    found["seconds"] = round(time.monotonic() - start, 2)
    return found


def difference(losses: list[float], dense: list[float]) -> tuple[float, float]:
    """Mean of the paired differences and half of its 95 % interval."""
    delta = np.array(losses) - np.array(dense)
    half = 1.96 * delta.std(ddof=1) / math.sqrt(len(delta)) if len(delta) > 1 else math.inf
    return float(delta.mean()), float(half)


def policies(options: argparse.Namespace) -> list[Any]:
    """Dense, the mass budget at every threshold, and Stem's fixed budgets to compare with."""
    base = StemConfig.mass()
    sketch = tuple(options.sketch) if options.sketch else base.sketch
    size = (128, options.key_block)
    found: list[Any] = [attend.Dense()]
    for threshold in options.thresholds:
        config = replace(base, threshold=threshold, sketch=sketch, block_size=size)
        found += corrected(f"mass > {threshold:g}", config, options.corrections)
        if options.coarse:
            coarse = replace(config, coarse=tuple(options.coarse))
            found += corrected(f"mass > {threshold:g}, coarse {coarse.coarse}", coarse, options.corrections)
    for density in options.stem:
        config = StemConfig(schedule="fixed", k_start=density, sink_blocks=1, local_blocks=2)
        found += corrected(f"Stem {density:.0%}", config, options.corrections)
    return found


def corrected(name: str, config: StemConfig, corrections: list[str]) -> list[Configured]:
    """The configuration with each correction, "none" for without."""
    named = {"none": name}
    return [
        Configured(named.get(x, f"{name}, {x}"), replace(config, correction=None if x == "none" else x))  # type: ignore
        for x in corrections
    ]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The measurements as lines of Markdown."""
    lines = ["| tokens | policy | density | prompt | all | text |", "| ---: | --- | ---: | ---: | ---: | ---: |"]
    for row in rows:
        dense = next(r for r in rows if r["length"] == row["length"] and r["policy"] == "dense")
        delta, half = difference(row["losses"], dense["losses"])
        shares = []
        for protocol in ("prompt", "all"):
            hits, count = row[protocol]
            low, high = ruler.wilson(hits, count)
            shares.append(f"{hits / count:.2f} [{low:.2f}, {high:.2f}]")
        text = "0" if row["policy"] == "dense" else f"{delta:+.3f} ± {half:.3f}"
        lines.append(
            f"| {row['length'] // 1024}K | {row['policy']} | {row['density']:.1%} | {' | '.join(shares)} | {text} |"
        )
    return lines


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.thresholds", description=(__doc__ or "").split("\n\n")[0])
    floats = lambda text: [float(part) for part in text.split(",") if part]  # noqa: E731
    models.add_argument(parser)
    parser.add_argument("--lengths", type=report.parse_lengths, default=[8192])
    parser.add_argument("--thresholds", type=floats, default=[0.05])
    parser.add_argument("--stem", type=floats, default=[0.25], help="fixed parts of the blocks, to compare with")
    parser.add_argument("--sketch", type=lambda text: [int(x) for x in text.split(",")], help="four sizes")
    parser.add_argument("--coarse", type=lambda text: [int(x) for x in text.split(",")], help="two sizes: also so")
    parser.add_argument("--corrections", nargs="+", choices=["none", "mean"], default=["none"])
    parser.add_argument("--key-block", type=int, default=128)
    parser.add_argument("--families", nargs="+", help="of bench.ruler; by default those that suit the model")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--text", type=int, default=8, help="windows of text")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seed", type=int, default=ruler.FIRST_SEED)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("bench/out/thresholds.json"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print and write."""
    options = parse(arguments)
    model, tokenizer = ruler.load_model(options.model, torch.device(options.device))
    corpus = ruler.read_corpus(tokenizer)
    if not options.families:
        short = (*families.FACTS, "fact_numbers")
        options.families = list(families.SINGLE + families.MULTI if corpus.frame.between is None else short)
    rows = []
    environment = report.environment()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for length in options.lengths:
        for policy in policies(options):
            rows.append(measure(model, corpus, length, policy, options))
            print({k: v for k, v in rows[-1].items() if k != "losses"}, flush=True)
            # a run that is cut short keeps what it has
            options.out.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
    print("\n".join(table(rows)))
    return rows


if __name__ == "__main__":
    main()
