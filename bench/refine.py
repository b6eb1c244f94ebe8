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
row. "native" is the uncut method. Errors are relative L2 errors against dense attention:

- layer: of one layer's attention output on the dense model's q, k, v; of every eighth 64 rows.
- deep: of the last hidden states with every layer sparse, and the KL divergence of the next-token distributions.

Intervals are bootstraps over seeds (one prompt each); ratios to the uniform cut are paired by prompt.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stem_flex.config import StemConfig
from stem_flex.selectors.infllm import InfLLM, block_attention, compressed_keys
from stem_flex.selectors.refine import best, decayed_budget, refine

from . import attend, models, refine_report, report, ruler, tasks

PLAIN = StemConfig(schedule="paper", mu=1.0, value_weight=0.0)
WEIGHTS = {"+oam": ("zscore", 0.2), "+oam log": ("log", 0.2)}
MU = {"dsa": 0.7, "infllm": 0.62}
STRIP = 64  # rows at a time
FIT_SEED, FIT_ROWS, FIT_STEPS = 27_000, 32, 200


@dataclass
class Policy:
    """How many keys each row keeps, and by which scores."""

    name: str
    counts: Tensor
    config: StemConfig


@dataclass
class Method:
    """A selection: ``scores(layer, logits, rows)`` of a strip, and the policies that use them."""

    name: str
    unit: str
    key_size: int
    keep: int
    floor: int
    policies: list[Policy]
    scores: Callable[..., Tensor]
    savings: dict[str, float] = field(default_factory=dict)


def uniform_counts(counts: Tensor, candidates: Tensor) -> Tensor:
    """One number for every row, with the same sum of min(number, candidates) as ``counts``: fractions are spread."""
    target = torch.minimum(counts, candidates).sum().item()
    low, high = 0.0, float(counts.max())
    for _ in range(60):
        middle = (low + high) / 2
        total = candidates.clamp(max=middle).double().sum().item() if middle else 0
        low, high = (middle, high) if total < target else (low, middle)
    wanted = torch.minimum(candidates.double(), torch.tensor(high, dtype=torch.float64))
    return wanted.cumsum(0).round().diff(prepend=torch.zeros(1, dtype=torch.float64)).clamp(min=1).int()


def policies(name: str, length: int, keep: int, key_size: int, floor: int) -> tuple[list[Policy], dict[str, float]]:
    """native, uniform, and decays, the cut ones at the same number of pairs; what each saves."""
    position = torch.arange(length) // key_size
    candidates = (position + 1).int()
    stem = replace(PLAIN, mu=MU[name])
    decay = decayed_budget(position, torch.full_like(position, -(-length // key_size)), stem, keep=keep)
    decay = decay.clamp(min=floor)
    uniform = uniform_counts(decay, candidates)
    native = torch.full_like(decay, keep)
    found = [Policy("native", native, PLAIN), Policy("uniform", uniform, PLAIN), Policy("decay", decay, PLAIN)]
    for suffix, (metric, weight) in WEIGHTS.items():
        weighted = replace(PLAIN, metric=metric, value_weight=weight)
        found.append(Policy(f"decay{suffix}", decay, weighted))
    found.append(Policy("uniform+oam", uniform, replace(PLAIN, metric="zscore", value_weight=0.2)))
    all_pairs = torch.minimum(native, candidates).sum().item()
    savings = {p.name: 1 - torch.minimum(p.counts, candidates).sum().item() / all_pairs for p in found}
    return found, savings


class Inputs:
    """Keeps every layer's input, which the indexer's weights read."""

    def __init__(self, model: Any):
        self.of: dict[int, Tensor] = {}
        for layer, block in enumerate(model.model.layers):
            block.self_attn.register_forward_pre_hook(self._keeper(layer), with_kwargs=True)

    def _keeper(self, layer: int) -> Callable:
        def keep(module, args, kwargs):
            self.of[layer] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

        return keep


def logits_of(q: Tensor, k: Tensor, rows: slice, scale: float) -> Tensor:
    """float32 (Hq, rows, keys up to the last row), not masked; one batch row."""
    group = q.shape[1] // k.shape[1]
    keys = k[0, :, : rows.stop].float().repeat_interleave(group, 0)
    return q[0, :, rows].float() @ keys.mT * scale


def fit_indexers(model: Any, ids: Tensor, inputs: Inputs, steps: int) -> dict[int, dict[str, Any]]:
    """Weights of the indexer of every layer, and the divergence they leave, in nats."""
    found: dict[int, dict[str, Any]] = {}

    def fit(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            found[layer] = _fit(q.clone(), k.clone(), inputs.of[layer].clone(), scale, steps)
        return attend.Dense()(layer, q, k, v, scale)

    with torch.inference_mode(), attend.attending(fit):
        model.model(ids.to(model.device), use_cache=False)
    return found


def _fit(q: Tensor, k: Tensor, x: Tensor, scale: float, steps: int) -> dict[str, Any]:
    heads, length = q.shape[1], q.shape[2]
    keys = k[0].float().repeat_interleave(heads // k.shape[1], 0)
    key = torch.arange(length, device=q.device)
    weight = torch.zeros(x.shape[-1], heads, device=q.device, requires_grad=True)
    constant = torch.full((heads,), 0.2, device=q.device, requires_grad=True)
    optimizer = torch.optim.Adam([{"params": [weight], "lr": 1e-3}, {"params": [constant], "lr": 1e-2}])
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    generator = torch.Generator().manual_seed(0)
    last = []
    for _ in range(steps):
        rows = torch.randint(min(64, length // 2), length, (FIT_ROWS,), generator=generator).to(q.device)
        logits = q[0, :, rows].float() @ keys.mT * scale
        hidden = key > rows[:, None]
        wanted = logits.masked_fill(hidden, -math.inf).softmax(-1).mean(0)
        scores = torch.einsum("rh,hrn->rn", x[0, rows].float() @ weight + constant, logits.relu())
        said = scores.masked_fill(hidden, -math.inf).log_softmax(-1).masked_fill(hidden, 0.0)
        loss = (torch.special.xlogy(wanted, wanted) - wanted * said).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([weight, constant], 1.0)
        optimizer.step()
        rate.step()
        last.append(loss.item())
    tail = last[-max(1, steps // 10) :]
    return {"weight": weight.detach(), "constant": constant.detach(), "kl": sum(tail) / len(tail)}


def methods(length: int, indexers: dict[int, dict[str, Any]], inputs: Inputs, device: Any) -> list[Method]:
    """DSA with fitted and with random weights, and InfLLM-v2, at the budgets of this length."""
    keep = max(16, length // 16)
    random = {
        layer: {
            "weight": torch.zeros_like(found["weight"]),
            "constant": torch.randn(found["constant"].shape, generator=torch.Generator().manual_seed(layer)).to(device),
        }
        for layer, found in indexers.items()
    }

    def lightning(parameters: dict[int, dict[str, Any]]) -> Callable:
        def scores(layer: int, q: Tensor, k: Tensor, logits: Tensor, rows: slice, scale: float) -> Tensor:
            x, own = inputs.of[layer][0, rows].float(), parameters[layer]
            return torch.einsum("rh,hrn->rn", x @ own["weight"] + own["constant"], logits.relu())[None]

        return scores

    sizes = InfLLM(keep=max(4, length * 96 // 32768), local=max(2, length * 33 // 32768))

    def blocks(layer: int, q: Tensor, k: Tensor, logits: Tensor, rows: slice, scale: float) -> Tensor:
        means = compressed_keys(k[:, :, : rows.stop], sizes)
        number = -(-rows.stop // sizes.block)
        return block_attention(q[:, :, rows], means, number, sizes, q_offset=rows.start, scale=scale)[0]

    found = []
    for name, of in (("dsa", indexers), ("dsa unfitted", random)):
        chosen, savings = policies("dsa", length, keep, 1, 0)
        found.append(Method(name, "logit", 1, keep, 0, chosen, lightning(of), savings))
    chosen, savings = policies("infllm", length, sizes.keep, sizes.block, sizes.forced)
    found.append(Method("infllm", "mass", sizes.block, sizes.keep, sizes.forced, chosen, blocks, savings))
    return found


def kept(method: Method, policy: Policy, scores: Tensor, v: Tensor, rows: slice, length: int) -> Tensor:
    """The tokens a policy keeps of a strip, bool (heads, rows, keys), causality left to the caller.

    Values up to the strip's end count for z-scores, as in chunked prefill.
    """
    refined = refine(
        scores[None],
        v[:, :, : rows.stop],
        policy.config,
        keep=method.keep,
        size=(1, method.key_size),
        q_offset=rows.start,
        prompt_len=length,
        unit=method.unit,
    )
    counts = policy.counts[rows].to(scores.device)[None, None]
    keep = best(refined.scores, refined.allowed, counts, method.keep)[0]
    return keep.repeat_interleave(method.key_size, -1)[..., : rows.stop]


def strips(length: int, every: int, first: int) -> Iterator[slice]:
    """Rows of every ``every``-th strip."""
    for start in range(first * STRIP, length, every * STRIP):
        yield slice(start, min(length, start + STRIP))


def layer_errors(
    model: Any, ids: Tensor, found: list[Method], every: int, first: int
) -> dict[tuple[str, str], list[list[float]]]:
    """By method and policy, the squared error over the squared output of every layer: all sampled rows, then by
    quarter of the prompt."""
    length = ids.shape[1]
    results: dict[tuple[str, str], list[list[float]]] = {(m.name, p.name): [] for m in found for p in m.policies}

    def measure(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        group = q.shape[1] // k.shape[1]
        values = v[0].float().repeat_interleave(group, 0)
        energy = torch.zeros(4, device=q.device)
        errors = {key: torch.zeros(4, device=q.device) for key in results}
        for rows in strips(length, every, first):
            quarter = 4 * rows.start // length
            logits = logits_of(q, k, rows, scale)
            future = (
                torch.arange(rows.stop, device=q.device) > torch.arange(rows.start, rows.stop, device=q.device)[:, None]
            )
            mass = logits.masked_fill(future, -math.inf).softmax(-1)
            dense = mass @ values[:, : rows.stop]
            energy[quarter] += dense.square().sum()
            for method in found:
                scores = method.scores(layer, q, k, logits, rows, scale)
                for policy in method.policies:
                    keep = kept(method, policy, scores, v, rows, length)
                    part = mass * keep.repeat_interleave(mass.shape[0] // keep.shape[0], 0)
                    out = part @ values[:, : rows.stop] / part.sum(-1, keepdim=True)
                    errors[method.name, policy.name][quarter] += (out - dense).square().sum()
        for key, error in errors.items():
            parts = [error.sum() / energy.sum(), *(error / energy)]
            results[key].append(torch.stack(parts).sqrt().tolist())
        return attend.Dense()(layer, q, k, v, scale)

    with torch.inference_mode(), attend.attending(measure):
        model.model(ids.to(model.device), use_cache=False)
    return results


@dataclass
class Cut:
    """Every layer attends to what a policy keeps."""

    method: Method
    policy: Policy

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        length, out = q.shape[2], torch.empty_like(q)
        values = v[0].repeat_interleave(q.shape[1] // k.shape[1], 0)
        for rows in strips(length, 1, 0):
            logits = logits_of(q, k, rows, scale)
            scores = self.method.scores(layer, q, k, logits, rows, scale)
            keep = kept(self.method, self.policy, scores, v, rows, length)
            future = (
                torch.arange(rows.stop, device=q.device) > torch.arange(rows.start, rows.stop, device=q.device)[:, None]
            )
            keep = keep.repeat_interleave(q.shape[1] // keep.shape[0], 0) & ~future
            weights = logits.masked_fill_(~keep, -math.inf).softmax(-1).to(v.dtype)
            out[0, :, rows] = weights @ values[:, : rows.stop]
        return out


DEEP = {"dsa": ("native", "uniform", "decay", "decay+oam"), "infllm": ("native", "uniform", "decay", "decay+oam")}


def deep_errors(model: Any, ids: Tensor, found: list[Method]) -> dict[tuple[str, str], dict[str, float]]:
    """By method and policy: error of the last hidden states, of those of the last 128 tokens, and the divergence."""
    results = {}

    def states(policy: Any) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(), attend.attending(policy):
            hidden = model.model(ids.to(model.device), use_cache=False).last_hidden_state[0]
            return hidden.float(), model.lm_head(hidden[-1024:]).float().log_softmax(-1)

    hidden, said = states(attend.Dense())
    for method in found:
        for policy in [p for p in method.policies if p.name in DEEP.get(method.name, ())]:
            cut, other = states(Cut(method, policy))
            tail = slice(-128, None)
            results[method.name, policy.name] = {
                "error": ((cut - hidden).norm() / hidden.norm()).item(),
                "tail_error": ((cut[tail] - hidden[tail]).norm() / hidden[tail].norm()).item(),
                "kl": (said.exp() * (said - other)).sum(-1).mean().item(),
            }
    return results


def prompt_ids(corpus: ruler.Corpus, seed: int, length: int) -> Tensor:
    """Text with hidden statements and a question for even seeds, plain text for odd ones; (1, length)."""
    if seed % 2:
        return torch.from_numpy(tasks.text_windows(corpus.tokens, length, 1, seed=seed)).long().reshape(1, -1)
    return ruler.make_batch(corpus, ["multi_key"], [ruler.FIRST_SEED + seed], length, "all").ids


def collect(model: Any, corpus: ruler.Corpus, options: argparse.Namespace) -> tuple[dict, list[Method], dict]:
    """All measurements by seed."""
    inputs = Inputs(model)
    raw: dict[str, Any] = {"layer": {}, "quarters": {}, "deep": {}}
    extra: dict[str, Any] = {}
    found: list[Method] = []
    for part, length, seeds in (
        ("layer", options.length, options.seeds),
        ("deep", options.deep_length, options.deep_seeds),
    ):
        start = time.perf_counter()
        indexers = fit_indexers(model, prompt_ids(corpus, FIT_SEED + 1, length), inputs, options.fit_steps)
        extra[f"kl {length}"] = [indexers[layer]["kl"] for layer in sorted(indexers)]
        here = methods(length, indexers, inputs, model.device)
        found = here if part == "layer" else found
        for seed in range(seeds):
            ids = prompt_ids(corpus, seed, length)
            if part == "layer":
                for key, layers in layer_errors(model, ids, here, options.every, seed % options.every).items():
                    _note(
                        raw["layer"], key, {"all": _root_mean(layers, 0)} | {str(i): x[0] for i, x in enumerate(layers)}
                    )
                    _note(raw["quarters"], key, {str(i): _root_mean(layers, i) for i in range(1, 5)})
            else:
                for key, errors in deep_errors(model, ids, here).items():
                    _note(raw["deep"], key, errors)
            (options.out / "refine.partial.json").write_text(json.dumps(raw))
            print(f"{part} {length} seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    return raw, found, extra


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
