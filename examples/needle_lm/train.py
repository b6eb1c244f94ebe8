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
import math
import os
import shutil
import signal
import sys
import tarfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

START = time.monotonic()
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from corpus import VOCABULARY, text_files, tokenize_files, train_tokenizer
from data import VALUE, Batches, Sequences, common_words
from evaluate import evaluate, start_building, tasks, text_loss
from model import ModelConfig, NeedleLM, head_loss, layer_forward, load_weights, save_pretrained
from tokenizers import Tokenizer


@dataclass(frozen=True)
class Stage:
    """Sequences of `length` tokens for `share` of the training time, from learning rate `lr` down."""

    length: int
    share: float
    lr: float
    final: float = 0.4  # learning rate at the stage's end, as a share of `lr`
    longer: float = (
        0.0  # go on for up to this share of the stage's time while fewer than 60 % of value tokens are right
    )


FIRST_ROUND = (
    Stage(512, 0.28, 3e-3, longer=0.7),
    Stage(2048, 0.19, 2.5e-3),
    Stage(8192, 0.17, 2e-3),
    Stage(16384, 0.14, 1.5e-3),
    Stage(32768, 0.22, 1.2e-3, 0.03),
)
SECOND_ROUND = (
    Stage(1024, 0.2, 2e-3),
    Stage(4096, 0.2, 2e-3),
    Stage(16384, 0.25, 1.5e-3),
    Stage(32768, 0.35, 1.2e-3, 0.03),
)
TINY = (Stage(256, 0.5, 3e-3), Stage(512, 0.5, 1e-3, 0.1))


class Log:
    """Prints lines with the elapsed seconds and keeps them in a file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a", encoding="utf-8")

    def __call__(self, text: str) -> None:
        line = f"[{time.monotonic() - START:6.1f}s] {text}"
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()


class Trainer:
    """Model, optimiser and the fallbacks that keep a run alive: other attention kernels, no compilation, less memory."""

    def __init__(self, config: ModelConfig, device: torch.device, compiled: bool, log: Log, seed: int) -> None:
        self.model = NeedleLM(config)
        self.model.reset_parameters(seed)
        self.model.to(device)
        self.model.eager_layer = layer_forward
        self.device, self.log, self.micro, self.updates = device, log, 1, 0
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim == 1]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, fused=device.type == "cuda")
        self.fallbacks = ["flash", "eager", "micro", "micro"] if device.type == "cuda" else ["eager", "micro"]
        self._compile(compiled)

    def _compile(self, compiled: bool) -> None:
        self.compiled = compiled
        for name in (
            "recompile_limit",
            "cache_size_limit",
            "accumulated_recompile_limit",
            "accumulated_cache_size_limit",
        ):
            if hasattr(torch._dynamo.config, name):
                setattr(torch._dynamo.config, name, 256)
        self.model.layer = torch.compile(layer_forward, dynamic=False) if compiled else layer_forward
        self.model.head = torch.compile(head_loss, dynamic=False) if compiled else head_loss

    def fall_back(self) -> bool:
        """Take the next fallback after a failed step; False when none is left."""
        if not self.fallbacks:
            return False
        name = self.fallbacks.pop(0)
        self.log(f"fallback: {name}")
        self.optimizer.zero_grad(set_to_none=True)
        torch._dynamo.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if name == "flash":
            set_backend("flash")
            self.model.repeat_kv = True
            self._compile(self.compiled)
        elif name == "eager":
            self._compile(False)
        else:
            self.micro *= 4
        return True

    def step(self, tokens: np.ndarray, marks: np.ndarray, lr: float) -> torch.Tensor:
        """One update; returns a tensor [lm loss, answer loss, value accuracy, gradient norm], not synchronised."""
        ids = self._move(tokens.astype(np.int64))
        targets = torch.cat((ids[:, 1:], ids[:, :1]), dim=1)
        flags = self._move(marks.astype(np.int64))
        flags = torch.cat((flags[:, 1:], torch.zeros_like(flags[:, :1])), dim=1)
        answers, values = (flags > 0).float(), (flags == VALUE).float()
        lm = torch.ones_like(answers)
        lm[:, -1] = 0
        lm, answer = lm / lm.sum(), answers / answers.sum().clamp(min=1)
        value = values / values.sum().clamp(min=1)
        report = torch.zeros(3, device=self.device)
        rows = max(1, ids.shape[0] // self.micro)
        for i in range(0, ids.shape[0], rows):
            part = slice(i, i + rows)
            loss, correct = self.model.losses(ids[part], targets[part], self.dtype)
            a, b = (loss * lm[part].flatten()).sum(), (loss * answer[part].flatten()).sum()
            (a + b).backward()
            report += torch.stack((a.detach(), b.detach(), (correct * value[part].flatten()).sum()))
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.device.type == "cuda":
            self.optimizer.found_inf = (~torch.isfinite(norm)).float()  # the fused kernel then skips the update
            self.optimizer.step()
        elif torch.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        return torch.cat((report, norm.detach()[None]))

    def _move(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor


def set_backend(name: str) -> None:
    """Allow one fused attention backend: 'flash' or 'cudnn'."""
    torch.backends.cuda.enable_flash_sdp(name == "flash")
    torch.backends.cuda.enable_cudnn_sdp(name == "cudnn")
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_math_sdp(False)


def choose_attention(trainer: Trainer, length: int = 16384) -> None:
    """Time flash attention with and without repeated KV heads; cuDNN only where flash does not run."""
    c = trainer.model.config
    times: dict[tuple[str, bool], float] = {}
    wanted = None
    for name, repeat in (("flash", True), ("flash", False), ("cudnn", True)):
        if name == "cudnn" and times:
            break
        set_backend(name)
        generator = torch.Generator(trainer.device).manual_seed(0)
        shapes = [(4, heads, length, c.head_dim) for heads in (c.num_attention_heads, *[c.num_key_value_heads] * 2)]
        try:
            q, k, v = (
                torch.randn(s, device=trainer.device, dtype=torch.bfloat16, generator=generator, requires_grad=True)
                for s in shapes
            )
            for i in range(4):
                if i == 1:
                    torch.cuda.synchronize()
                    begin = time.monotonic()
                group = q.shape[1] // k.shape[1]
                pair = (k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)) if repeat else (k, v)
                y = torch.nn.functional.scaled_dot_product_attention(q, *pair, is_causal=True, enable_gqa=not repeat)
                y.backward(torch.full_like(y, 0.5))
            torch.cuda.synchronize()
            seconds = (time.monotonic() - begin) / 3
            found = torch.cat([x.float().flatten()[:100_000] for x in (q.grad, k.grad, v.grad, y.detach())])
            wanted = found if wanted is None else wanted
            close = (found - wanted).abs().max() < 0.05 * wanted.abs().max()
            trainer.log(f"attention {name} repeat_kv={repeat}: {1e3 * seconds:.1f} ms, agrees {bool(close)}")
            if close:
                times[name, repeat] = seconds
        except Exception as error:
            trainer.log(f"attention {name} repeat_kv={repeat}: {type(error).__name__}: {str(error)[:160]}")
    if times:
        name, trainer.model.repeat_kv = min(times, key=times.__getitem__)
        set_backend(name)
    else:
        trainer.model.repeat_kv = True
        for enable in ("flash", "cudnn", "mem_efficient", "math"):
            getattr(torch.backends.cuda, f"enable_{enable}_sdp")(True)
    torch.cuda.empty_cache()


def first_step(trainer: Trainer, batch: tuple[np.ndarray, np.ndarray], lr: float) -> torch.Tensor:
    """A step that survives a failing kernel, compiler or allocation by the trainer's fallbacks."""
    while True:
        try:
            report = trainer.step(*batch, lr)
            report.tolist()
            return report
        except Exception:
            trainer.log("step failed:\n" + traceback.format_exc()[-3000:])
            if not trainer.fall_back():
                raise


def run_stage(
    trainer: Trainer,
    batches: Batches,
    index: int,
    stage: Stage,
    end: float,
    max_steps: int,
    stopping: list[bool],
) -> None:
    """Train `stage` until the clock says `end`."""
    batches.begin(index)
    log, cuda = trainer.log, trainer.device.type == "cuda"
    warmup = 40 if trainer.updates == 0 else 10
    begin = time.monotonic()
    report = first_step(trainer, batches.next(index), stage.lr / warmup)
    first = time.monotonic()
    log(f"length {stage.length}: first step {first - begin:.1f} s, {end - first:.0f} s to train")
    waited, steps, events, kept, accuracy = 0.0, 1, [], [report], 0.0
    last = end + stage.longer * (end - first)
    while steps < max_steps and not stopping and time.monotonic() < (end if accuracy > 0.6 else last):
        t = time.monotonic()
        batch = batches.next(index)
        waited += time.monotonic() - t
        progress = min(1.0, (time.monotonic() - first) / max(end - first, 1e-3))
        if max_steps < 10**6:
            progress = max(progress, steps / max_steps)
        lr = stage.lr * (stage.final + (1 - stage.final) * 0.5 * (1 + math.cos(math.pi * progress)))
        report = trainer.step(*batch, lr * min(1.0, (steps + 1) / warmup))
        steps += 1
        kept.append(report)
        if cuda:  # stay one step ahead of the GPU, no more: the clock must mean something
            events.append(torch.cuda.Event())
            events[-1].record()
            if len(events) > 1:
                events.pop(0).synchronize()
        if steps % 20 == 0:
            lm, answer, accuracy, norm = torch.stack(kept[-20:]).mean(0).tolist()
            speed = (steps - 1) * batch[0].size / (time.monotonic() - first)
            log(
                f"length {stage.length} step {steps} (all {trainer.updates}): text {lm:.3f} answer {answer:.3f} "
                f"value tokens right {accuracy:.3f} norm {norm:.2f} lr {lr:.1e} {speed / 1e3:.0f} ktok/s wait {waited:.1f} s"
            )
            kept = kept[-1:]
    report.tolist()
    log(f"length {stage.length}: {steps} steps in {time.monotonic() - begin:.1f} s")


def prepare(args: argparse.Namespace, log: Log) -> tuple[Tokenizer, np.ndarray, np.ndarray]:
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


def pack(folder: Path, target: Path) -> None:
    """Copy the weight shards and put the small files into one tar: at most a handful of files of < 16 MB."""
    target.mkdir(parents=True, exist_ok=True)
    with tarfile.open(target / "needle_lm_small_files.tar", "w") as archive:
        for path in sorted(folder.iterdir()):
            if path.suffix == ".safetensors":
                shutil.copyfile(path, target / path.name)
            elif path.suffix in (".json", ".log"):
                archive.add(path, arcname=path.name)


def save(trainer: Trainer, args: argparse.Namespace, stages_done: int) -> None:
    """Hugging Face directory, training state, and the packed copy."""
    save_pretrained(trainer.model, args.out, (args.out / "tokenizer.json").read_text(encoding="utf-8"))
    state = {"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()}
    state |= {"stages_done": stages_done, "updates": trainer.updates}
    torch.save(state, args.out / "state.pt.new")
    (args.out / "state.pt.new").replace(args.out / "state.pt")
    if args.pack:
        pack(args.out, args.pack)


def plan(args: argparse.Namespace) -> tuple[dict | None, int, tuple[Stage, ...]]:
    """The saved state if resuming, the finished stages, and the stages to run now."""
    first, second = (TINY, TINY) if args.tiny else (FIRST_ROUND, SECOND_ROUND)
    if not args.resume:
        return None, 0, first
    path = args.out / "state.pt"
    state = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
    done = len(first) if state is None else state["stages_done"]
    return state, done, first[done:] or second


def restore(trainer: Trainer, args: argparse.Namespace, state: dict | None) -> None:
    """Load a state, or the saved weights where only those are left."""
    if state is None:
        load_weights(trainer.model, args.out)
        trainer.updates = 1
        trainer.log("resume: weights only")
        return
    trainer.model.load_state_dict(state["model"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.updates = state["updates"]
    trainer.log(f"resume: {state['stages_done']} stages and {trainer.updates} updates done")


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, the state and the log")
    parser.add_argument("--pack", type=Path, help="folder for the weight shards and one tar of the small files")
    parser.add_argument("--budget-minutes", type=float, default=7.5, help="wall clock, everything included")
    parser.add_argument("--eval-seconds", type=float, default=40.0, help="part of the budget kept for the evaluation")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--retrain-tokenizer", action="store_true")
    parser.add_argument("--corpus-mb", type=int, default=110)
    parser.add_argument("--samples", type=int, default=32, help="evaluation samples of a family and length")
    parser.add_argument("--tokens-per-step", type=int, default=131072)
    parser.add_argument("--workers", type=int, default=max(1, min(14, (os.cpu_count() or 2) - 2)))
    parser.add_argument("--compile", choices=("auto", "yes", "no"), default="auto", help="auto: on a GPU")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.tiny:
        args.corpus_mb, args.samples, args.tokens_per_step, args.workers = 2, 2, 1024, 2
        args.budget_minutes, args.eval_seconds = 5.0, 60.0  # steps, not the clock, end a tiny run
    args.out.mkdir(parents=True, exist_ok=True)
    return args


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
    scores["seconds"] = time.monotonic() - START
    (args.out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    if args.pack:
        pack(args.out, args.pack)


def main() -> None:
    """Prepare the data, train the stages, evaluate."""
    args = parse()
    log = Log(args.out / "train.log")
    deadline = START + 60 * args.budget_minutes
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
    config = ModelConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=16, intermediate_size=64)
    config = config if args.tiny else ModelConfig()
    compiled = args.compile == "yes" or (args.compile == "auto" and device.type == "cuda")
    trainer = Trainer(config, device, compiled, log, args.seed)
    if args.resume:
        restore(trainer, args, state)
    log(
        f"{sum(p.numel() for p in trainer.model.parameters()) / 1e6:.2f} M parameters on {device}, torch {torch.__version__}"
    )
    if device.type == "cuda":
        choose_attention(trainer)
    train_end = deadline - args.eval_seconds
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
    batches.close()
    if not stopping:
        finish(trainer, args, builders, lengths, held, deadline)
    log("done")


if __name__ == "__main__":
    main()
