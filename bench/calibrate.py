"""The threshold of the mass budget for a wanted text loss, on any model and text: :func:`stem_flex.calibrate`.

    python -m bench.calibrate --lengths 8K,16K,32K                                # the shipped model
    python -m bench.calibrate --model smollm2 --text FILE FILE --loss 0.02 --lengths 4K,8K

Without ``--text`` it reads what the other benchmarks read: the standard library's source for the shipped model, English
about Python for models with a chat format. Writes calibrate.json and calibrate.csv, also where no threshold serves.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from stem_flex import StemConfig, calibrate
from stem_flex.integrations.hf_calibrate import CONFIDENCE, THRESHOLDS, Calibration, CalibrationError, Measured, table

from . import models, report, ruler


def load(name: Path, device: torch.device) -> tuple[Any, Any]:
    """(model, tokenizer), the model with its own attention; bf16 on CUDA, float32 on a CPU."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()
    return model, AutoTokenizer.from_pretrained(name)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.calibrate", description=(__doc__ or "").split("\n\n")[0])
    models.add_argument(parser)
    parser.add_argument("--text", type=Path, nargs="+", help="files of text, a document each")
    parser.add_argument("--loss", type=float, default=0.01, help="nats a token over dense attention")
    parser.add_argument("--thresholds", type=lambda text: [float(x) for x in text.split(",")], default=THRESHOLDS)
    parser.add_argument("--lengths", type=report.parse_lengths, default=[8192])
    parser.add_argument("--windows", type=int, default=8, help="of each length, which do not overlap")
    parser.add_argument("--key-block", type=int, default=128)
    parser.add_argument("--correction", choices=["mean"], help="what becomes of dropped blocks")
    parser.add_argument("--dense-layers", type=int, nargs="*", default=[], help="layers that stay dense")
    parser.add_argument("--every", action="store_true", help="also thresholds past the first that loses too much")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=report.ROOT / "bench" / "out", help="folder for calibrate.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> Calibration:
    """Measure, print and write.

    Raises:
        CalibrationError: no threshold serves; what was measured is written before.
    """
    options = parse(arguments)
    model, tokenizer = load(models.model_folder(options.model), torch.device(options.device))
    if options.text:
        text: Any = [path.read_text(encoding="utf-8", errors="replace") for path in options.text]
    else:
        text = torch.from_numpy(ruler.read_corpus(tokenizer).tokens)
    config = replace(StemConfig.mass(), block_size=(128, options.key_block), correction=options.correction)
    try:
        found = calibrate(
            model,
            text,
            tokenizer=tokenizer,
            loss=options.loss,
            thresholds=options.thresholds,
            lengths=options.lengths,
            windows=options.windows,
            config=config,
            dense_layers=options.dense_layers,
            every=options.every,
        )
    except CalibrationError as error:
        print("\n".join(table(error.rows, CONFIDENCE)))
        write(options.out, error.rows)
        raise
    print(found)
    by_length = {length: config.threshold for length, config in found.by_length.items()}
    write(options.out, found.rows, threshold=found.config.threshold, by_length=by_length, dense=found.dense)
    return found


def write(folder: Path, rows: Iterable[Measured], **found: Any) -> None:
    """What was measured, and what it recommends."""
    report.write(folder, "calibrate", [asdict(row) for row in rows], environment=report.environment(), **found)


if __name__ == "__main__":
    try:
        main()
    except CalibrationError as error:
        sys.exit(str(error))
