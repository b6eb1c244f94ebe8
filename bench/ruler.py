"""Answers found in long prompts: the tasks of bench.tasks, densely or with any block selector.

    python -m bench.ruler                                        # the shipped model, dense, 4K to 32K
    python -m bench.ruler --selector stem --density 0.25
    python -m bench.ruler --model DIR --selector sketch --protocol all --lengths 16K --samples 100
    python -m bench.ruler --model smollm2 --lengths 4K,8K --selector sketch --budget mass --threshold 0.05

Protocols: "prompt" is RULER's, the prompt's rows are sparse and the answer is decoded densely; "all": the rows of
the answer are sparse too. Both are scored by teacher forcing, which is right exactly where greedy decoding is:
one forward over prompt and answer. Under "prompt" the prompt ends with a block, the answer fills the next one,
whose rows are dense and which the selector does not see, so that nothing about the prompt's rows differs from a
prefill of the prompt alone. Under "all" the answer ends with the last block.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stem_flex.budget import Budget
from stem_flex.config import StemConfig
from stem_flex.selectors import get, names

from . import attend, families, models, report, tasks

FAMILIES = (*families.SINGLE, *families.MULTI, "variable_tracking", "common_words", "frequent_words")
SHORT_FAMILIES = (*families.FACTS, *families.HARDER)  # for models with a chat format
FIRST_SEED = 20_000  # the model's own evaluation took 10,000 and up
Z95 = 1.959964


def wilson(hits: int, count: int, z: float = Z95) -> tuple[float, float]:
    """The 95 % Wilson interval of a share of ``hits`` in ``count``."""
    if count == 0:
        return 0.0, 1.0
    p, square = hits / count, z * z / count
    center = (p + square / 2) / (1 + square)
    half = z * math.sqrt(p * (1 - p) / count + square / (4 * count)) / (1 + square)
    return max(0.0, center - half), min(1.0, center + half)


@dataclass(frozen=True)
class Corpus:
    """Real text as tokens, and how to make tokens."""

    tokens: np.ndarray
    breaks: np.ndarray
    encode: Callable[[str], list[int]]
    frame: tasks.Frame
    filler: int


@dataclass(frozen=True)
class Batch:
    """Examples of equal length.

    ids: int64 (n, length). starts: first answer token of each; scored: which answer tokens count.
    tail: tokens after the prompt, a multiple of 128, under protocol "prompt"; 0 under "all".
    """

    ids: Tensor
    families: tuple[str, ...]
    starts: tuple[int, ...]
    scored: tuple[np.ndarray, ...]
    tail: int
    examples: tuple[tasks.Example, ...]

    def __len__(self) -> int:
        return len(self.starts)


def load_model(name: Path | str, device: torch.device) -> tuple[Any, Any]:
    """(model, tokenizer) of a causal LM, by name or folder (:mod:`bench.models`); bf16 on CUDA, float32 on a CPU."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers import logging as transformers_logging

    folder = models.model_folder(name)
    transformers_logging.disable_progress_bar()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    return attend.prepare(model), AutoTokenizer.from_pretrained(folder)


def read_corpus(tokenizer: Any, limit_bytes: int = 4_000_000) -> Corpus:
    """Real text as tokens, and the frame of prompts.

    With a chat template: English about Python (:func:`tasks.prose_texts`) inside a user's message. Without: the running
    Python's standard library, which the shipped model never saw, after a beginning of text.
    """

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    chat = getattr(tokenizer, "chat_template", None) is not None
    texts = tasks.prose_texts(min(limit_bytes, 1_000_000)) if chat else tasks.library_texts(limit_bytes)
    tokens = np.array([token for text in texts for token in encode(text)])
    size = max(len(tokenizer), int(tokens.max()) + 1)
    bos, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    frame = tasks.chat_frame(tokenizer) if chat else tasks.Frame(() if bos is None else (bos,))
    filler = end if end is not None else bos or 0
    return Corpus(tokens, tasks.break_table(tokenizer.decode, size), encode, frame, filler)


def make_batch(corpus: Corpus, families: Sequence[str], seeds: Iterable[int], length: int, protocol: str) -> Batch:
    """One example for each (family, seed) pair, all of ``length`` tokens."""
    tail = 128 if protocol == "prompt" else 0
    pairs = list(zip(families, seeds, strict=True))
    while True:
        try:
            examples = [
                tasks.assemble(family, seed, length, corpus.encode, corpus.tokens, corpus.breaks, frame=corpus.frame,
                               answer_room=tail or None)
                for family, seed in pairs
            ]  # fmt: skip
            break
        except tasks.AnswerTooLongError:
            tail += 128
    ids = np.full((len(examples), length), corpus.filler, np.int64)
    for row, example in zip(ids, examples, strict=True):
        row[: len(example.ids)] = example.ids
    return Batch(
        torch.from_numpy(ids),
        tuple(families),
        tuple(e.answer_start for e in examples),
        tuple(e.scored for e in examples),
        tail,
        tuple(examples),
    )


@torch.inference_mode()
def answers(model: Any, batch: Batch, policy: attend.Attend) -> list[tuple[bool, float]]:
    """For each example whether every scored token is the likeliest one, and their mean loss in nats."""
    ids = batch.ids.to(model.device)
    length = ids.shape[1]
    kept = length - min(batch.starts) + 1
    with attend.attending(policy):
        logits = model(ids, use_cache=False, logits_to_keep=kept).logits
    found = []
    for row, (start, scored) in enumerate(zip(batch.starts, batch.scored, strict=True)):
        first = start - 1 - (length - kept)
        counts = torch.from_numpy(scored).to(logits.device)
        said = logits[row, first : first + len(scored)][counts].float()
        wanted = ids[row, start : start + len(scored)][counts]
        right = (said.argmax(-1) == wanted).all()
        found.append(torch.stack([right.float(), torch.nn.functional.cross_entropy(said, wanted)]))
    return [(right > 0, nats) for right, nats in torch.stack(found).tolist()]


def right_answers(model: Any, batch: Batch, policy: attend.Attend) -> list[bool]:
    """For each example whether every scored token of the answer is the likeliest one."""
    return [right for right, _ in answers(model, batch, policy)]


def _row_loss(logits: Tensor, ids: Tensor) -> Tensor:
    parts = [
        torch.nn.functional.cross_entropy(x.float(), y, reduction="sum")
        for x, y in zip(logits[:-1].split(2048), ids[1:].split(2048), strict=True)
    ]
    return torch.stack(parts).sum() / (len(ids) - 1)


@torch.inference_mode()
def text_losses(model: Any, windows: Tensor, policy: attend.Attend) -> list[float]:
    """Mean next-token loss in nats of each window (n, length)."""
    ids = windows.to(model.device)
    with attend.attending(policy):
        logits = model(ids, use_cache=False).logits
    return torch.stack([_row_loss(row, target) for row, target in zip(logits, ids, strict=True)]).tolist()


@torch.inference_mode()
def text_divergence(model: Any, windows: Tensor, policy: attend.Attend) -> tuple[list[float], list[float]]:
    """Of each window (n, length): mean next-token loss, and mean KL divergence from dense attention's, in nats.

    Goes window by window, so that two sets of logits are held, whatever the vocabulary.
    """
    found = []
    for ids in windows.to(model.device).split(1):
        with attend.attending(policy):
            logits = model(ids, use_cache=False).logits[0]
        apart = torch.zeros((), device=logits.device)
        if not isinstance(policy, attend.Dense):
            with attend.attending(attend.Dense()):
                dense = model(ids, use_cache=False).logits[0]
            for rows, others in zip(dense.split(2048), logits.split(2048), strict=True):
                p, r = rows.float().log_softmax(-1), others.float().log_softmax(-1)
                apart += (p.exp() * (p - r)).sum()
        found.append(torch.stack([_row_loss(logits, ids[0]), apart / len(logits)]))
    losses, divergences = torch.stack(found).T.tolist()
    return losses, divergences


def policy_of(
    name: str,
    density: float,
    config: StemConfig,
    tail: int = 0,
    dense_layers: Sequence[int] = (),
    rule: Budget | None = None,
) -> attend.Dense | attend.Sparse:
    """Dense attention, or the selector ``name`` at ``density`` of the causal block pairs, or by a budget rule."""
    if name == "dense":
        return attend.Dense()
    selector = get(name)
    return attend.Sparse(
        selector, selector.configured(config), density, tail, dense_layers=tuple(dense_layers), rule=rule
    )


def run_length(model: Any, corpus: Corpus, length: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every family at one length, and one for held-out text."""
    rows: list[dict[str, Any]] = []
    base = {"length": length, "selector": options.selector, "protocol": options.protocol, "budget": options.budget}

    def policy(tail: int) -> attend.Dense | attend.Sparse:
        return policy_of(
            options.selector, options.density, options.config, tail, options.dense_layers, attend.rule_of(options)
        )

    for family in options.families or default_families(corpus):
        found: list[tuple[bool, float]] = []
        computed = []
        for first in range(0, options.samples, options.batch):
            count = min(options.batch, options.samples - first)
            seeds = range(options.seed + first, options.seed + first + count)
            batch = make_batch(corpus, [family] * count, seeds, length, options.protocol)
            used = policy(batch.tail)
            found += answers(model, batch, used)
            computed.append(used.computed(length))
        hits = sum(right for right, _ in found)
        low, high = wilson(hits, len(found))
        rows.append(base | {"family": family, "right": hits, "samples": len(found), "share": hits / len(found),
                            "low": low, "high": high, "nats": float(np.mean([nats for _, nats in found])),
                            "density": float(np.mean(computed))})  # fmt: skip
    if options.text:
        windows = torch.from_numpy(tasks.text_windows(corpus.tokens, length, options.text, seed=options.seed))
        used = policy(0)
        losses, apart = text_divergence(model, windows, used)
        rows.append(base | {"family": "text", "loss": float(np.mean(losses)), "kl": float(np.mean(apart)),
                            "samples": len(losses), "density": used.computed(length)})  # fmt: skip
    return rows


def default_families(corpus: Corpus) -> tuple[str, ...]:
    """The short families for models with a chat format, RULER's for others."""
    return FAMILIES if corpus.frame.between is None else SHORT_FAMILIES


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.ruler", description=(__doc__ or "").split("\n\n")[0])
    models.add_argument(parser)
    parser.add_argument("--lengths", type=report.parse_lengths, default=report.parse_lengths("4K,8K,16K,32K"))
    parser.add_argument("--families", type=lambda text: text.split(","), help="default: those that suit the model")
    parser.add_argument("--samples", type=int, default=32, help="prompts of a family and length")
    parser.add_argument("--text", type=int, default=4, help="windows of held-out text")
    parser.add_argument("--selector", default="dense", choices=names())
    attend.add_budget(parser)
    parser.add_argument("--protocol", default="prompt", choices=("prompt", "all"))
    parser.add_argument("--dense-layers", type=int, nargs="*", default=[], help="layers that stay dense")
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--sink", type=int, default=1, help="first blocks always kept, counted in the density")
    parser.add_argument("--local", type=int, default=2, help="last blocks always kept, counted in the density")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seed", type=int, default=FIRST_SEED)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=report.ROOT / "bench" / "out", help="folder for ruler.json")
    options = parser.parse_args(arguments)
    for family in options.families or ():
        if family not in families.ALL:
            parser.error(f"--families must be of {sorted(families.ALL)}, got {family!r}")
    if any(length % 128 for length in options.lengths):
        parser.error(f"--lengths must be multiples of 128, got {options.lengths}")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.selector == "dense":
        options.budget, options.density = "density", 1.0
    options.config = StemConfig(block_size=options.block_size, sink_blocks=options.sink, local_blocks=options.local)
    return options


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print, write ruler.json."""
    options = parse(arguments)
    model, tokenizer = load_model(options.model, torch.device(options.device))
    corpus = read_corpus(tokenizer)
    rows = [row for length in options.lengths for row in run_length(model, corpus, length, options)]
    found = {(row["family"], row["length"]): row for row in rows}
    columns = [report.short(length) for length in options.lengths]
    table = []
    for family in dict.fromkeys(row["family"] for row in rows):
        cells = [found[family, length] for length in options.lengths]
        table.append([family, *(_cell(cell) for cell in cells)])
    density = float(np.mean([row["density"] for row in rows]))
    title = f"{options.model.name}, {options.selector} at {density:.0%} of the blocks, protocol {options.protocol}"
    report.show(title, ["family", *columns], table, ["share of prompts answered exactly [95 % interval]; text: nats"])
    report.write(options.out, "ruler", rows, environment=report.environment())
    return rows


def _cell(row: dict[str, Any]) -> str:
    if "loss" in row:
        return f"{row['loss']:.3f}, KL {row['kl']:.3f}"
    return f"{row['share']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


if __name__ == "__main__":
    main()
