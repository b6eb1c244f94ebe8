"""Train the needle LM on one GPU, in stages of growing length, inside a wall-clock budget.

    python examples/needle_lm/train.py --out DIR --budget-minutes 7.5      # one H100
    python examples/needle_lm/train.py --out DIR --budget-minutes 7.5 --resume
    python examples/needle_lm/train.py --out DIR --tiny                    # every code path on a CPU, < 60 s

A run saves the model after every stage and ends in time whatever the machine's speed: stages share the time
that is left, and the learning rate follows the clock. `--resume` continues after the last finished stage; after
the last one it makes a second, shorter round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import time
import traceback
from dataclasses import replace
from pathlib import Path

import journal  # the first of the slow ones: it takes the time
import numpy as np
import torch
from checkpoint import pack, plan, restore, save
from corpus import VOCABULARY, text_files, tokenize_files, train_tokenizer
from data import Batches, Sequences, common_words
from evaluate import evaluate, start_building, tasks, text_loss
from model import SIZES
from stages import Stage, run_stage
from tokenizers import Tokenizer
from trainer import Trainer, choose_attention

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def prepare(args: argparse.Namespace, log: journal.Log) -> tuple[Tokenizer, np.ndarray, np.ndarray]:
    """Tokenizer, training tokens and held-out tokens."""
    train, held = text_files(args.corpus_mb * 1_000_000)
    log(f"corpus: {len(train)} files to train on, {len(held)} held out")
    shipped = Path(__file__).with_name("tokenizer.json")
    path = args.out / "tokenizer.json"
    if args.retrain_tokenizer or not shipped.exists():
        train_tokenizer(train, VOCABULARY, args.corpus_mb * 200_000).save(str(path))
    elif path.resolve() != shipped.resolve():
        shutil.copyfile(shipped, path)
    processes = max(1, args.workers)
    tokens = tokenize_files(train, str(path), processes)
    log(f"corpus: {len(tokens) / 1e6:.1f} M training tokens")
    held_tokens = tokenize_files(held, str(path), processes)
    log(f"corpus: {len(held_tokens) / 1e6:.2f} M held-out tokens")
    return Tokenizer.from_file(str(path)), tokens, held_tokens


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, the state and the log")
    parser.add_argument("--pack", type=Path, help="folder for the weight shards and one tar of the small files")
    parser.add_argument("--budget-minutes", type=float, default=7.5, help="wall clock, everything included")
    parser.add_argument("--eval-seconds", type=float, default=40.0, help="part of the budget kept for the evaluation")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--size", choices=sorted(SIZES), default="small", help="small is the model that is shipped")
    parser.add_argument("--retrain-tokenizer", action="store_true")
    parser.add_argument("--corpus-mb", type=int, default=110)
    parser.add_argument("--samples", type=int, default=32, help="evaluation samples of a family and length")
    parser.add_argument("--tokens-per-step", type=int, default=131072)
    parser.add_argument("--workers", type=int, default=max(1, min(14, (os.cpu_count() or 2) - 2)))
    parser.add_argument("--compile", choices=("auto", "yes", "no"), default="auto", help="auto: on a GPU")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.tiny:
        args.corpus_mb, args.samples, args.tokens_per_step, args.workers, args.size = 2, 2, 1024, 2, "tiny"
        args.budget_minutes, args.eval_seconds = 5.0, 60.0  # steps, not the clock, end a tiny run
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def train(
    trainer: Trainer,
    args: argparse.Namespace,
    batches: Batches,
    stages: tuple[Stage, ...],
    done: int,
    train_end: float,
    stopping: list[bool],
) -> None:
    """Train and save stage after stage, each with its share of the time left; `done` stages came before."""
    log = trainer.log
    for i, stage in enumerate(stages):
        left = train_end - time.monotonic()
        if left < 5 or stopping:
            log("out of time: stages left undone")
            break
        end = time.monotonic() + left * stage.share / sum(s.share for s in stages[i:])
        try:
            run_stage(trainer, batches, i, stage, end, 4 if args.tiny else 10**6, stopping)
        except Exception:
            log("stage failed:\n" + traceback.format_exc()[-3000:])
        save(trainer, args, done + i + 1)
        log("saved")


def finish(
    trainer: Trainer,
    args: argparse.Namespace,
    builders: list,
    lengths: list[int],
    held: np.ndarray,
    deadline: float,
) -> None:
    """Evaluate, print and save the scores."""
    log = trainer.log
    scores: dict = {"updates": trainer.updates, "seed": args.seed}
    try:
        text_length = min(16384, lengths[-1])
        scores["text_loss"] = text_loss(trainer.model, held, text_length, 2 if args.tiny else 8, trainer.device)
        log(f"held-out text loss {scores['text_loss']:.3f} at {text_length} tokens")
        scores["accuracy"] = evaluate(trainer.model, lengths, args.out / "eval", builders, trainer.device, deadline)
        for family, by_length in scores["accuracy"].items():
            cells = [f"{n}: {s['exact']:.3f} ({s['whole']:.3f})" for n, s in by_length.items()]
            log(f"{family:18s} exact (whole answer)  " + "   ".join(cells))
    except Exception:
        log("evaluation failed:\n" + traceback.format_exc()[-2000:])
    scores["seconds"] = time.monotonic() - journal.START
    (args.out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    if args.pack:
        pack(args.out, args.pack)


def main() -> None:
    """Prepare the data, train the stages, evaluate."""
    args = parse()
    log = journal.Log(args.out / "train.log")
    deadline = journal.START + 60 * args.budget_minutes
    lengths = [1024] if args.tiny else [4096, 16384, 32768]
    state, done, stages = plan(args)
    tokenizer, tokens, held = prepare(args, log)
    # Every process is forked here, before CUDA is touched.
    words = common_words(tokens, tokenizer)
    breaks = tasks.break_table(tokenizer.decode, tokenizer.get_vocab_size())
    sequences = Sequences(tokens, tokenizer, words, breaks)
    stage_lengths = [stage.length for stage in stages]
    batches = Batches(sequences, stage_lengths, args.tokens_per_step, args.workers, args.seed + 17 * done)
    builders = start_building(lengths, args.samples, tokenizer, held, args.out / "eval")
    log(f"data workers started, {len(words)} words")
    stopping: list[bool] = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))  # after the forks: theirs must end them

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = SIZES[args.size]
    # Wider models take smaller steps; the stages' learning rates are the small one's.
    narrower = min(1.0, SIZES["small"].hidden_size / config.hidden_size)
    stages = tuple(replace(stage, lr=stage.lr * narrower) for stage in stages)
    compiled = args.compile == "yes" or (args.compile == "auto" and device.type == "cuda")
    trainer = Trainer(config, device, compiled, log, args.seed)
    if args.resume:
        restore(trainer, args, state)
    parameters = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    log(f"{parameters:.2f} M parameters on {device}, torch {torch.__version__}")
    if device.type == "cuda":
        choose_attention(trainer)
    train(trainer, args, batches, stages, done, deadline - args.eval_seconds, stopping)
    batches.close()
    if not stopping:
        finish(trainer, args, builders, lengths, held, deadline)
    log("done")


if __name__ == "__main__":
    main()
