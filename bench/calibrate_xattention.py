"""Thresholds of XAttention for each layer and head, so that they hold a share of a model's true attention mass.

    python -m bench.calibrate_xattention --length 16K --out thresholds.json          # the shipped model
    python -m bench.calibrate_xattention --model DIR --stride 8 --coverage 0.95

`stem_flex.selectors.antidiagonals.from_file(path, layer)` makes a selector of what it writes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stem_flex.config import StemConfig
from stem_flex.selectors import antidiagonals
from stem_flex.selectors.oracle import block_mass

from . import attend, models, report, ruler, tasks


@dataclass
class Calibration:
    """Dense attention that also finds each layer's thresholds: ``found[layer]`` is a list of (Hq,), one a prompt."""

    config: StemConfig
    coverage: float
    found: dict[int, list[Tensor]] = field(default_factory=dict)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        mass, _ = block_mass(q, k, (self.config.query_block, self.config.key_block), scale=scale)
        scores = antidiagonals.xattention(q, k, v, self.config)
        self.found.setdefault(layer, []).append(antidiagonals.threshold_for(scores, mass, self.coverage))
        return attend.Dense()(layer, q, k, v, scale)

    def thresholds(self) -> list[list[float]]:
        """Means over the prompts, by layer and head."""
        return [torch.stack(self.found[layer]).mean(0).tolist() for layer in sorted(self.found)]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.calibrate_xattention", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", type=Path, default=models.SHIPPED)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--length", type=lambda text: report.parse_lengths(text)[0], default=16384)
    parser.add_argument("--prompts", type=int, default=4, help="windows of text")
    parser.add_argument("--coverage", type=float, default=0.9, help="share of the true mass to hold")
    parser.add_argument("--stride", type=int, default=16)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--out", type=Path, default=report.ROOT / "bench" / "out" / "xattention.json")
    return parser.parse_args(arguments)


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Calibrate, print the range of each layer, write the file."""
    options = parse(arguments)
    model, tokenizer = ruler.load_model(options.model, torch.device(options.device))
    corpus = ruler.read_corpus(tokenizer)
    windows = torch.from_numpy(tasks.text_windows(corpus.tokens, options.length, options.prompts, seed=0))
    config = StemConfig(block_size=options.block_size, stride=options.stride)
    calibration = Calibration(config, options.coverage)
    with attend.attending(calibration):
        for window in windows:
            model(window[None].to(model.device), use_cache=False, logits_to_keep=1)
    found = {"model": options.model.name, "length": options.length, "coverage": options.coverage,
             "stride": options.stride, "block_size": options.block_size}  # fmt: skip
    found |= {"thresholds": calibration.thresholds()}
    rows = [
        [str(i), f"{min(x):.3f}", f"{sum(x) / len(x):.3f}", f"{max(x):.3f}"] for i, x in enumerate(found["thresholds"])
    ]
    report.show("XAttention's thresholds by layer", ["layer", "least", "mean", "largest"], rows)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {options.out}")
    return found


if __name__ == "__main__":
    main()
