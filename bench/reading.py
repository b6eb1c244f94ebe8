"""Summaries, code completion, few-shot learning and questions on long documents, densely and with any selector.

    python -m bench.reading --model smollm2 --length 4K                     # every selector at a quarter of the blocks
    python -m bench.reading --model smollm2 --length 7936 --selectors stem,sketch --densities 0.15 --rules mass:0.05

The questions are those of `bench.documents`. The prompt's rows are sparse; the answer is decoded greedily with dense
attention over the prompt's cache, all prompts of a batch at once, which their equal length allows. Scores are the
published metrics' (F1, ROUGE-L, edit similarity), by torchmetrics and rapidfuzz (the extra ``models``), with bootstrap
intervals of the mean and of its difference from dense attention's, prompt by prompt.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stem_flex.config import StemConfig
from stem_flex.selectors import get, names

from . import attend, documents, models, report, ruler

Policy = attend.Dense | attend.Sparse
SHOWN = 3  # answers kept in the results, of each kind and policy


@torch.inference_mode()
def greedy(model: Any, prompts: Tensor, policy: Policy, tokens: int, end: set[int]) -> list[list[int]]:
    """Up to ``tokens`` greedy tokens after each prompt of (n, length), without the one of ``end`` that ends them."""
    from stem_flex.integrations.hf_versions import cache_of, with_cache

    ids = prompts.to(model.device)
    with attend.attending(policy):
        out = model(ids, use_cache=True, logits_to_keep=1)
        last = out.logits[:, -1].argmax(-1, keepdim=True)
        said = [last]
        for step in range(1, tokens):
            # a look at every eighth token: fewer waits for the device
            if step % 8 == 0 and all(end & set(row) for row in torch.cat(said, 1).tolist()):
                break
            out = model(last, use_cache=True, **with_cache(model, cache_of(out)))
            last = out.logits[:, -1].argmax(-1, keepdim=True)
            said.append(last)
    rows = torch.cat(said, 1).tolist()
    return [row[: next((i for i, token in enumerate(row) if token in end), len(row))] for row in rows]


def ends(tokenizer: Any, breaks: np.ndarray, kind: str) -> set[int]:
    """Tokens that end an answer: the end of text, and a line break where the answer is the rest of a line."""
    found = {token for token in (tokenizer.eos_token_id,) if token is not None}
    return found | (set(np.flatnonzero(breaks).tolist()) if kind in ("few_shot", "answer") else set())


def policies(options: argparse.Namespace) -> Iterator[tuple[str, Policy]]:
    """(budget, policy), dense attention first."""
    base = StemConfig(sink_blocks=options.sink, local_blocks=options.local)
    yield "100%", attend.Dense()
    for name in options.selectors:
        selector = get(name)
        config = selector.configured(base)
        for density in options.densities:
            yield f"{density:.0%}", attend.Sparse(selector, config, density)
        for label in options.rules:
            rule = attend.rule_named(label, selector)
            if rule is not None:
                yield label, attend.Sparse(selector, config, 1.0, rule=rule)


def measure(model: Any, tokenizer: Any, corpus: ruler.Corpus, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every kind and policy."""
    rows = []
    for kind in options.kinds:
        seeds = range(options.seed, options.seed + options.samples)
        questions = [documents.make_question(kind, seed, options.length, corpus.encode, corpus.frame) for seed in seeds]
        prompts = torch.from_numpy(np.stack([question.ids for question in questions]).astype(np.int64))
        end = ends(tokenizer, corpus.breaks, kind)
        dense: list[float] = []
        for budget, policy in policies(options):
            said: list[str] = []
            for part in prompts.split(options.batch):
                said += [tokenizer.decode(row) for row in greedy(model, part, policy, options.tokens, end)]
            scores = [documents.score(question, text) for question, text in zip(questions, said, strict=True)]
            dense = dense or scores
            apart = [own - other for own, other in zip(scores, dense, strict=True)]
            rows.append({
                "kind": kind, "metric": documents.METRICS[kind], "selector": policy.name, "budget": budget,
                "computed": policy.computed(options.length), "samples": len(scores), "mean": float(np.mean(scores)),
                "interval": report.bootstrap(scores), "difference": float(np.mean(apart)),
                "difference_interval": report.bootstrap(apart), "scores": [round(score, 4) for score in scores],
                "said": said[:SHOWN], "true": [question.reference for question in questions[:SHOWN]],
            })  # fmt: skip
            print(f"{kind}: {policy.name} {budget}: {rows[-1]['mean']:.3f}", flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines: a line for every policy, a column for every kind."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["selector"], row["budget"]), {})[row["kind"]] = row
    lines = []
    for (selector, budget), by_kind in found.items():
        computed = np.mean([row["computed"] for row in by_kind.values()])
        cells = [by_kind[kind] for kind in kinds]
        label = budget if budget.endswith("%") else f"{budget} ({computed:.0%})"
        texts = [
            f"{cell['mean']:.3f}"
            if selector == "dense"
            else "{:.3f} ({:+.3f} [{:+.3f}, {:+.3f}])".format(
                cell["mean"], cell["difference"], *cell["difference_interval"]
            )
            for cell in cells
        ]
        lines.append([selector, label, *texts, f"{np.mean([cell['mean'] for cell in cells]):.3f}"])
    heads = [f"{kind}, {next(row['metric'] for row in rows if row['kind'] == kind)}" for kind in kinds]
    return ["selector", "blocks", *heads, "mean"], lines


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.reading", description=(__doc__ or "").split("\n\n")[0])
    models.add_argument(parser)

    def words(text: str) -> list[str]:
        return text.split(",")

    parser.add_argument("--length", type=lambda text: report.parse_lengths(text)[0], default=4096)
    parser.add_argument("--kinds", type=words, default=list(documents.KINDS))
    parser.add_argument("--selectors", type=words, default=names())
    parser.add_argument("--densities", type=lambda text: [float(x) for x in words(text)], default=[0.25])
    parser.add_argument("--rules", type=words, default=[], help="also budget rules: own, or NAME:THRESHOLD")
    parser.add_argument("--samples", type=int, default=32, help="prompts of a kind")
    parser.add_argument("--tokens", type=int, default=48, help="most tokens of an answer")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sink", type=int, default=1)
    parser.add_argument("--local", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=report.ROOT / "bench" / "out", help="folder for reading.json")
    options = parser.parse_args(arguments)
    for kind in options.kinds:
        if kind not in documents.KINDS:
            parser.error(f"--kinds must be of {sorted(documents.KINDS)}, got {kind!r}")
    if options.length % 128:
        parser.error(f"--length must be a multiple of 128, got {options.length}")
    for name in options.selectors:
        get(name)
    return options


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print, write reading.json."""
    options = parse(arguments)
    model, tokenizer = ruler.load_model(options.model, torch.device(options.device))
    corpus = ruler.read_corpus(tokenizer, 200_000)
    rows = measure(model, tokenizer, corpus, options)
    columns, lines = table(rows)
    report.show(f"{options.model.name}, {report.short(options.length)} tokens", columns, lines,
                ["in brackets: difference from dense attention with its 95 % interval"])  # fmt: skip
    header = {"environment": report.environment(), "model": options.model.name, "length": options.length}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "reading.json").write_text(json.dumps({**header, "rows": rows}, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
