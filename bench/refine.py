"""Stem on trained sparsity: what its decay saves of DSA and of InfLLM-v2, and the output error for it.

    python -m bench.refine                                  # the shipped model, 8K tokens, a CPU
    python -m bench.refine --device cuda --seeds 16 --deep-seeds 8 --deep-length 8K

Two trained selections, stood in for on the shipped model, which has neither:

- DSA. The lightning indexer has 8 heads with the layer's own queries and keys (each query head against its KV head, so
  relu(q k) is its logit's positive part), and weights w(t) = W x(t) + c of the layer's input x, fitted per layer as DSA
  trains its indexer: the KL divergence of softmax(I) from the heads' mean attention, on text that no measurement sees.
  "unfitted" has random weights instead: an indexer that ranks badly.
- InfLLM-v2: its own rule; it has no parameters.

``keep`` is scaled with the length, as 2048 tokens and 96 blocks (33 of them local) are to 32K. Compared at equal
numbers of computed pairs: Stem's decay, with and without value magnitude (OAM), and a uniform cut, the same for every
row. "mass" keeps the keys whose own share of attention exceeds a threshold (``refine(..., budget=Mass(...))``), one for
all layers, heads and rows, found on other text than is measured; what it saves depends on the prompt, so "uniform=mass"
keeps the same number of pairs of each prompt. "native" is the uncut method. Errors are relative L2 errors against dense
attention:

- layer: of one layer's attention output on the dense model's q, k, v; of every eighth 64 rows.
- deep: of the last hidden states with every layer sparse, and the KL divergence of the next-token distributions.

Intervals are bootstraps over seeds (one prompt each); ratios to the uniform cut of the same size are paired by prompt.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stem_flex.budget import Mass

from . import attend, models, refine_report, report, ruler, tasks
from .refine_methods import Inputs, fit_indexers, future_of, logits_of, methods
from .refine_policies import STRIP, Method, Policy, best_shares, chosen, equal_cuts, strips, threshold_for, tokens

FIT_SEED, FIT_STEPS, FIT_PROMPTS = 27_000, 200, 16  # prompts are for thresholds
FLOOR = {"dsa": 0.7, "infllm": 0.0}  # of "keep"; forced blocks are kept anyway
SAVE = {"dsa": 0.15, "infllm": 0.18}
MARGIN = 0.02  # more than that on the text that thresholds are found on: single prompts differ by several percent


Sizes = dict[tuple[str, str], float]  # by method and policy: pairs kept by a head and layer, their mean


def layer_errors(
    model: Any, ids: Tensor, found: list[Method], every: int, first: int
) -> tuple[dict[tuple[str, str], list[list[float]]], Sizes]:
    """By method and policy, the relative error of every layer: of all sampled rows, then by quarter of the prompt.
    And how many pairs of these rows were kept."""
    length = ids.shape[1]
    results: dict[tuple[str, str], list[Tensor]] = {(m.name, p.name): [] for m in found for p in m.policies}
    pairs = {key: torch.zeros((), dtype=torch.float64, device=model.device) for key in results}

    def measure(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        values = v[0].float().repeat_interleave(q.shape[1] // k.shape[1], 0)
        energy = torch.zeros(4, device=q.device)
        errors = {key: torch.zeros(4, device=q.device) for key in results}
        for rows in strips(length, every, first):
            quarter = 4 * rows.start // length
            logits = logits_of(q, k, rows, scale)
            mass = logits.masked_fill(future_of(rows, q.device), -math.inf).softmax(-1)
            dense = mass @ values[:, : rows.stop]
            energy[quarter] += dense.square().sum()
            for method in found:
                scores = method.scores(layer, q, k, logits, rows, scale)
                for policy in method.policies:
                    keep = chosen(method, policy, scores, v, rows, length)
                    pairs[method.name, policy.name] += keep.sum() / keep.shape[0]
                    part = mass * tokens(keep, method, q.shape[1], rows.stop)
                    out = part @ values[:, : rows.stop] / part.sum(-1, keepdim=True)
                    errors[method.name, policy.name][quarter] += (out - dense).square().sum()
        for key, error in errors.items():
            results[key].append(torch.cat([error.sum()[None] / energy.sum(), error / energy]).sqrt())
        return attend.Dense()(layer, q, k, v, scale)

    with torch.inference_mode(), attend.attending(measure):
        model.model(ids.to(model.device), use_cache=False)
    layers = len(model.model.layers)
    sizes = {key: total.item() / layers for key, total in pairs.items()}
    return {key: torch.stack(errors).tolist() for key, errors in results.items()}, sizes


def attention_shares(model: Any, ids: Tensor, found: list[Method], every: int, first: int) -> dict[str, Tensor]:
    """By method, :func:`best_shares` of every layer and head: (layers x heads, sampled rows, keep)."""
    shares: dict[str, list[Tensor]] = {method.name: [] for method in found}

    def record(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        parts: dict[str, list[Tensor]] = {method.name: [] for method in found}
        for rows in strips(ids.shape[1], every, first):
            logits = logits_of(q, k, rows, scale)
            for method in found:
                scores = method.scores(layer, q, k, logits, rows, scale)
                parts[method.name].append(best_shares(method, scores, rows))
        for name, part in parts.items():
            shares[name].append(torch.cat(part, 1))
        return attend.Dense()(layer, q, k, v, scale)

    with torch.inference_mode(), attend.attending(record):
        model.model(ids.to(model.device), use_cache=False)
    return {name: torch.cat(part) for name, part in shares.items()}


def add_mass(model: Any, prompts: list[Tensor], found: list[Method], every: int) -> dict[str, dict[str, float]]:
    """Give every method the policy "mass", whose threshold saves of ``prompts`` what :data:`SAVE` says; its settings.

    Strips of the prompts are sampled like the measured ones', each prompt other ones, 4 of a prompt at least.
    """
    every = max(1, min(every, prompts[0].shape[1] // (4 * STRIP)))
    shares: dict[str, list[Tensor]] = {method.name: [] for method in found}
    rows = []
    for number, ids in enumerate(prompts):
        first = number * every // len(prompts)
        rows += [torch.arange(part.start, part.stop) for part in strips(ids.shape[1], every, first)]
        for name, part in attention_shares(model, ids, found, every, first).items():
            shares[name].append(part)
    settings = {}
    for method in found:
        kind = method.name.split()[0]
        candidates = torch.cat(rows).to(model.device) // method.key_size + 1
        floor = max(method.floor, math.ceil(FLOOR[kind] * method.keep))
        wanted = max(method.savings["decay"], SAVE[kind]) + MARGIN
        threshold = threshold_for(torch.cat(shares[method.name], 1), candidates, floor, wanted)
        native = method.policies[0]
        method.policies.append(Policy("mass", native.counts, budget=Mass(threshold, floor=floor, cap=method.keep)))
        settings[method.name] = {"threshold": threshold, "floor": floor, "wanted": wanted}
    return settings


DEEP_STRIP = 512  # rows at a time


@dataclass
class Cut:
    """Every layer attends to what a policy keeps; ``kept`` counts its pairs, of a head's mean."""

    method: Method
    policy: Policy
    kept: Tensor | float = 0.0

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        length, out = q.shape[2], torch.empty_like(q)
        values = v[0].repeat_interleave(q.shape[1] // k.shape[1], 0)
        for rows in strips(length, 1, 0, size=DEEP_STRIP):
            logits = logits_of(q, k, rows, scale)
            scores = self.method.scores(layer, q, k, logits, rows, scale)
            keep = chosen(self.method, self.policy, scores, v, rows, length)
            self.kept = self.kept + keep.sum(dtype=torch.float64) / keep.shape[0]
            keep = tokens(keep, self.method, q.shape[1], rows.stop) & ~future_of(rows, q.device)
            weights = logits.masked_fill_(~keep, -math.inf).softmax(-1).to(v.dtype)
            out[0, :, rows] = weights @ values[:, : rows.stop]
        return out


DEEP = {name: ("native", "uniform", "decay", "decay+oam", "mass") for name in ("dsa", "infllm")}


def deep_errors(model: Any, ids: Tensor, found: list[Method]) -> tuple[dict[tuple[str, str], dict[str, float]], Sizes]:
    """By method and policy: error of the last hidden states, of those of the last 128 tokens, and the divergence.
    And how many pairs of all rows were kept."""
    results: dict[tuple[str, str], dict[str, float]] = {}
    sizes: Sizes = {}

    def states(policy: Any) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(), attend.attending(policy):
            hidden = model.model(ids.to(model.device), use_cache=False).last_hidden_state[0]
            return hidden.float(), model.lm_head(hidden[-1024:]).float().log_softmax(-1)

    hidden, said = states(attend.Dense())

    def measure(method: Method, policy: Policy) -> None:
        cut = Cut(method, policy)
        states_of, other = states(cut)
        tail = slice(-128, None)
        results[method.name, policy.name] = {
            "error": ((states_of - hidden).norm() / hidden.norm()).item(),
            "tail_error": ((states_of[tail] - hidden[tail]).norm() / hidden[tail].norm()).item(),
            "kl": (said.exp() * (said - other)).sum(-1).mean().item(),
        }
        sizes[method.name, policy.name] = float(cut.kept) / len(model.model.layers)

    for method in found:
        for policy in method.named(DEEP.get(method.name, ())).policies:
            measure(method, policy)
    for method in equal_cuts(found, sizes, ids.shape[1], [slice(0, ids.shape[1])]):
        measure(method, method.policies[0])
    return results, sizes


def split(corpus: ruler.Corpus, parts: int = 64) -> tuple[ruler.Corpus, ruler.Corpus]:
    """The text for fitting, every fourth of ``parts`` pieces, and the text for measuring, the others."""
    pieces = np.array_split(corpus.tokens, parts)
    fitting, measuring = ([x for i, x in enumerate(pieces) if (i % 4 == 0) == fits] for fits in (True, False))
    return replace(corpus, tokens=np.concatenate(fitting)), replace(corpus, tokens=np.concatenate(measuring))


def prompt_ids(corpus: ruler.Corpus, seed: int, length: int) -> Tensor:
    """Text with hidden statements and a question for even seeds, plain text for odd ones; (1, length)."""
    if seed % 2:
        return torch.from_numpy(tasks.text_windows(corpus.tokens, length, 1, seed=seed)).long().reshape(1, -1)
    return ruler.make_batch(corpus, ["multi_key"], [ruler.FIRST_SEED + seed], length, "all").ids


def prepare(
    model: Any, corpus: ruler.Corpus, inputs: Inputs, length: int, options: argparse.Namespace
) -> tuple[list[Method], dict[str, Any]]:
    """The methods at a length with all that is fitted: indexers, then thresholds on other text. And what was found."""
    indexers = fit_indexers(model, prompt_ids(corpus, FIT_SEED + 1, length), inputs, options.fit_steps)
    found = methods(length, indexers, inputs, model.device)
    prompts = [prompt_ids(corpus, FIT_SEED + 2 + seed, length) for seed in range(FIT_PROMPTS)]
    settings = add_mass(model, prompts, found, options.every)
    return found, {"kl": [indexers[layer]["kl"] for layer in sorted(indexers)], "mass": settings}


def collect(model: Any, corpus: ruler.Corpus, options: argparse.Namespace) -> tuple[dict, list[Method], dict]:
    """All measurements by seed."""
    inputs = Inputs(model)
    raw: dict[str, Any] = {"layer": {}, "quarters": {}, "deep": {}, "pairs layer": {}, "pairs deep": {}}
    start = time.perf_counter()
    fitting, measuring = split(corpus)
    lengths = {options.length, options.deep_length}
    ready = {length: prepare(model, fitting, inputs, length, options) for length in lengths}
    extra = {f"{name} {length}": value for length in ready for name, value in ready[length][1].items()}
    print(f"fitted: {time.perf_counter() - start:.0f} s", flush=True)
    for part, length, seeds in (
        ("layer", options.length, options.seeds),
        ("deep", options.deep_length, options.deep_seeds),
    ):
        start = time.perf_counter()
        here = ready[length][0]
        for seed in range(seeds):
            ids = prompt_ids(measuring, seed, length)
            if part == "layer":
                sizes = _note_layers(raw, model, ids, here, options.every, seed % options.every)
            else:
                errors, sizes = deep_errors(model, ids, here)
                for key, values in errors.items():
                    _note(raw["deep"], key, values)
            for key, size in sizes.items():
                _note(raw[f"pairs {part}"], key, {"kept": size})
            (options.out / "refine.partial.json").write_text(json.dumps(raw))
            print(f"{part} {length} seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    return raw, ready[options.length][0], extra


def _note_layers(raw: dict[str, Any], model: Any, ids: Tensor, found: list[Method], every: int, first: int) -> Sizes:
    """The layers' errors of a prompt, of "mass" and of its uniform cut as well, and sizes."""
    rows = list(strips(ids.shape[1], every, first))
    errors, sizes = layer_errors(model, ids, found, every, first)
    more, others = layer_errors(model, ids, equal_cuts(found, sizes, ids.shape[1], rows), every, first)
    for key, layers in (errors | more).items():
        _note(raw["layer"], key, {"all": _root_mean(layers, 0)} | {str(i): x[0] for i, x in enumerate(layers)})
        _note(raw["quarters"], key, {str(i): _root_mean(layers, i) for i in range(1, 5)})
    return sizes | others


def _root_mean(layers: list[list[float]], index: int) -> float:
    return math.sqrt(sum(layer[index] ** 2 for layer in layers) / len(layers))


def _note(into: dict[str, Any], key: tuple[str, str], values: dict[str, float]) -> None:
    cells = into.setdefault("/".join(key), {})
    for name, value in values.items():
        cells.setdefault(name, []).append(value)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models.add_argument(parser)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--length", default="8K", help="of the layers' prompts")
    parser.add_argument("--deep-length", default="4K", help="of the prompts that run through cut layers")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--deep-seeds", type=int, default=4)
    parser.add_argument("--every", type=int, default=8, help="one in this many strips of 64 rows is measured")
    parser.add_argument("--fit-steps", type=int, default=FIT_STEPS)
    parser.add_argument("--out", type=Path, default=report.ROOT / "bench" / "results")
    options = parser.parse_args(arguments)
    options.length, options.deep_length = (report.parse_lengths(x)[0] for x in (options.length, options.deep_length))
    return options


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, and write refine.json and refine.md."""
    options = parse(arguments)
    model, tokenizer = ruler.load_model(options.model, torch.device(options.device))
    corpus = ruler.read_corpus(tokenizer)
    options.out.mkdir(parents=True, exist_ok=True)
    raw, found, extra = collect(model, corpus, options)
    header = {name: getattr(options, name) for name in ("length", "deep_length", "seeds", "deep_seeds", "every")}
    rows = refine_report.table(raw, found)
    text = refine_report.markdown(rows, header)
    data = {"environment": report.environment(), **header, **extra, "rows": rows, "raw": raw}
    (options.out / "refine.json").write_text(json.dumps(data, indent=1) + "\n")
    (options.out / "refine.md").write_text(text)
    (options.out / "refine.partial.json").unlink()
    print(text)
    return rows


if __name__ == "__main__":
    main()
