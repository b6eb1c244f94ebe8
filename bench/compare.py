"""Every published selector in the same kernels: what it computes, keeps, answers and costs.

    python -m bench.compare --minutes 3.5                              # one H100
    python -m bench.compare --minutes 3.5 --parts speed --backend flash
    python -m bench.compare --device cpu --length 1K --speed-length 512 --tiny

Each selector runs at its native settings, and at every matched density twice: with the same number of blocks for
every row, so that only the scores differ ("count"), and with its own budget rule, whose one number is set on a prompt
of its own so that all layers and heads together keep the density ("rule"; a pattern's number is a threshold on its
scores). Answers and text loss come from the shipped model, mass recall and output error from its dense activations,
times from one attention layer of ``--speed-length`` tokens of made vectors with a sink, rotary phases and topics.

Writes each measurement to compare.jsonl as it is made, then compare.json, compare.md and compare.png; with --backend
to compare_BACKEND instead, so that times by another backend stand beside. ``--report`` draws again.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stem_flex import block_density, stem_block_mask
from stem_flex.attention import sparse_prefill
from stem_flex.budget import FORCED, Budget, Coverage, Schedule, rule_of
from stem_flex.config import StemConfig
from stem_flex.layout import causal
from stem_flex.select import select_blocks
from stem_flex.selectors import Selector, get, names
from stem_flex.selectors.rules import Above, Part, Relative

from . import accuracy, accuracy_probe, attend, compare_report, models, report, ruler

EXPERIMENTAL = ("sam", "sam+tpd", "oam", "stem-log", "sketch+tpd", "sketch")  # bench.accuracy's
OURS = "sketch-outliers"  # native: StemConfig.mass(), one threshold on the estimated mass
CEILINGS = ("oracle", "oracle-error")  # cost as much as dense attention, or more
SLOW = "oracle-error"  # by counts only
DENSITIES = (0.25, 0.10, 0.40)
STEPS = 24  # halvings of a rule's number


# ---- matched density ---------------------------------------------------------------------------------------------


def at(rule: Budget | None, number: float) -> Budget:
    """A selector's rule with another number; larger keeps more. A pattern, or scores alone, get a threshold."""
    if isinstance(rule, Coverage):
        return replace(rule, share=number)
    if isinstance(rule, Relative):
        return replace(rule, alpha=1 - number, full_rows=0)  # 8 rows of 128 alone are 12 %
    if isinstance(rule, Part):
        return replace(rule, fraction=number)
    return Above(2 * FORCED * (1 - number))


@dataclass
class Scored:
    """Dense attention that keeps a selector's scores of every layer."""

    selector: Selector
    config: StemConfig
    seen: list[Tensor] = field(default_factory=list)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self.seen.append(self.selector.scores(q, k, v, self.config))
        return attend.Dense()(layer, q, k, v, scale)

    def density(self, rule: Budget) -> float:
        """Causal block pairs that ``rule`` and the forced blocks keep, over all layers and heads."""
        kept = pairs = 0
        for scores in self.seen:
            batch, heads, rows, _ = scores.shape
            lengths = (rows * self.config.query_block, scores.shape[3] * self.config.key_block)
            size = (self.config.query_block, self.config.key_block)
            bound = causal().bind(batch, heads, *lengths, block_size=size, device=scores.device)
            counts = rule.counts(bound, self.config, batch, heads, scores).expand(batch, heads, rows)
            tables = select_blocks(scores, bound, self.config, budget=counts)
            kept += int(tables.counts.sum())
            pairs += batch * heads * rows * (rows + 1) // 2
        return kept / pairs

    def solved(self, density: float) -> tuple[Budget, float]:
        """The selector's rule whose number keeps ``density``, and what it keeps."""
        low, high = 0.0, 1.0
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.density(at(self.selector.budget, middle)) < density else (low, middle)
        rule = at(self.selector.budget, high)
        return rule, self.density(rule)


def native(name: str, base: StemConfig) -> tuple[StemConfig, Budget]:
    """A selector's published configuration, forced blocks and rule; floors and ceilings count as Stem does."""
    selector = get(name)
    if name == OURS:
        config = selector.configured(StemConfig.mass())
        return config, rule_of(None, config)
    config = selector.configured(StemConfig() if selector.budget is None else base)
    return config, selector.budget or Schedule()


@dataclass
class Comparison(accuracy.Study):
    """What bench.accuracy measures, for selectors with rules of their own."""

    _scored: dict[str, Scored] = field(default_factory=dict)
    _ruled: dict[tuple[str, float], attend.Sparse] = field(default_factory=dict)

    def native(self, name: str) -> attend.Sparse | attend.Dense:
        """A selector as it was published: its own rule, its own forced blocks."""
        if name == "dense":
            return attend.Dense()
        config, rule = native(name, self.base)
        return attend.Sparse(get(name), config, math.nan, rule=rule)

    def counted(self, name: str, density: float) -> attend.Sparse:
        """The same number of blocks for every row and head, the forced ones counted and the same for all."""
        selector = get(name)
        return attend.Sparse(selector, attend.same_forced(selector, self.base), density)

    def ruled(self, name: str, density: float) -> attend.Sparse:
        """Its own rule at another number."""
        selector, config = get(name), attend.same_forced(get(name), self.base)
        if name not in self._scored:
            self._scored[name] = Scored(selector, config)
            with torch.inference_mode(), attend.attending(self._scored[name]):
                self.model(self.calibration.to(self.model.device), use_cache=False, logits_to_keep=1)
        rule, kept = self._scored[name].solved(density)
        self.record("rules", selector=name, density=density, rule=repr(rule), kept=kept)
        return attend.Sparse(selector, config, density, rule=rule)

    @functools.cached_property
    def calibration(self) -> Tensor:
        """A prompt of each family that no table sees, for :meth:`ruled`: ids (n, length)."""
        families = self.options.families[: self.options.batch]
        seeds = [ruler.FIRST_SEED - 1 - i for i in range(len(families))]
        return ruler.make_batch(self.corpus, families, seeds, self.options.length, "all").ids

    # ---- the parts -----------------------------------------------------------------------------------------------

    def policies(self) -> list[tuple[str, str, float | None, Any]]:
        """(way, selector, density, policy) of every cell, in order of interest."""
        chosen = self.options.selectors
        cells: list[tuple[str, str, float | None, Any]] = [
            ("native", name, None, self.native(name)) for name in chosen if name != SLOW
        ]
        for density in self.options.densities:
            for name in (n for n in chosen if n != "dense"):
                cells.append(("count", name, density, self.counted(name, density)))
                if ruled := None if name == SLOW else self._attempt_rule(name, density):
                    cells.append(("rule", name, density, ruled))
        return cells

    def _attempt_rule(self, name: str, density: float) -> attend.Sparse | None:
        if get(name).budget is None and name not in (OURS, *CEILINGS):
            return None  # a count for every row is its rule
        if (name, density) not in self._ruled:
            try:
                self._ruled[name, density] = self.ruled(name, density)
            except Exception as error:  # one selector's failure must not cost the others
                self.failed(f"rule of {name} at {density}", error)
                return None
        return self._ruled[name, density]

    def probe(self) -> None:
        """Density, mass recall and output error on dense activations, all policies on the same ones."""
        wanted = [cell for cell in self.policies() if cell[1] != "dense"]
        batch = self.prompts(0, self.options.length).batches["all"][0]
        named = {f"{way} {name} {density}": _fresh(policy) for way, name, density, policy in wanted}
        found = accuracy_probe.probe(self.model, batch, named)
        for way, name, density, _ in wanted:
            key = f"{way} {name} {density}"
            layers = found.losses[key]
            self.record("probe", way=way, selector=name, density=density, layers=layers,
                        computed=named[key].computed(self.options.length))  # fmt: skip

    def answers(self, turn: int) -> None:
        """Right answers and text loss of every cell."""
        prompts = self.prompts(turn, self.options.length)
        for way, _, density, policy in self.policies():
            self.measure("answers", _fresh(policy), prompts, way=way, density=density, turn=turn)


def _fresh(policy: Any) -> Any:
    """The policy with a count of its own of what it computes."""
    return replace(policy) if isinstance(policy, attend.Sparse) else policy


# ---- time --------------------------------------------------------------------------------------------------------


def made_inputs(options: argparse.Namespace, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v like a trained layer's: a sink at the first keys, topics that come back, rotary phases, noise."""
    generator = torch.Generator(device=device).manual_seed(7)
    length, dim = options.speed_length, options.dim
    dtype = report.DTYPES[options.dtype]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    topics, span = 64, 256
    topic = torch.randint(topics, (-(-length // span),), generator=generator, device=device)
    topic = topic.repeat_interleave(span)[:length]
    common = normal(options.kv_heads, 1, dim)
    shared = normal(options.kv_heads, topics, dim)
    group = options.heads // options.kv_heads
    phase = torch.arange(length, device=device)[:, None] * 1e6 ** (-torch.arange(0, dim, 2, device=device) / dim)

    def rotated(x: Tensor) -> Tensor:
        cos, sin = phase.cos(), phase.sin()
        even, odd = x.chunk(2, -1)
        return torch.cat([even * cos - odd * sin, even * sin + odd * cos], -1)

    k = rotated(0.5 * common + shared[:, topic] + 0.7 * normal(options.kv_heads, length, dim))
    k[:, :4] += 3 * common  # every query's first component: the sink
    queries = [
        rotated(0.7 * common[h // group] + 1.2 * shared[h // group, topic] + 0.7 * normal(length, dim))
        for h in range(options.heads)
    ]
    v = normal(options.kv_heads, length, dim)
    return torch.stack(queries)[None].to(dtype), k[None].to(dtype), v[None].to(dtype)


def speed(options: argparse.Namespace, study: Comparison) -> None:
    """Selection and attention, each alone, at native settings and at the first matched density."""
    device = torch.device(options.device)
    q, k, v = made_inputs(options, device)
    timed = functools.partial(report.measure, device=device, repeats=10, seconds=options.seconds)
    backend = options.backend or ("triton" if device.type == "cuda" else "cpu")
    rows = options.speed_length // 128
    for name in options.selectors:
        if name in CEILINGS:
            continue
        selector, cells = get(name), {}
        config, rule = native(name, study.base)
        configs = {"native": config, "count": attend.same_forced(selector, study.base)}
        density = options.densities[0]
        even = torch.tensor(attend.block_budgets(rows, density, study.base), device=device)
        ways: dict[str, Any] = {"native": rule} | ({} if name == "dense" else {"count": even})
        for way, budget in ways.items():
            if time.monotonic() > study.deadline:
                return
            build = functools.partial(
                stem_block_mask, q, k, v, configs[way], selector=replace(selector, settings={}), budget=budget
            )

            def cell(build: Any = build) -> dict[str, Any]:
                mask = build()
                attention = functools.partial(sparse_prefill, q, k, v, mask, backend=backend)
                found = {"attention": timed(attention).median, "density": block_density(mask)}
                del mask, attention
                return found | {"selection": timed(build).median, "bytes": report.peak_extra_bytes(build, device)}

            cells[way] = report.attempt(cell)
        for way, found in cells.items():
            study.record("speed", selector=name, way=way, length=options.speed_length, backend=backend, **found)
            print(f"speed: {name}, {way}: {found}", flush=True)


# ---- command line ------------------------------------------------------------------------------------------------


def compared() -> list[str]:
    """All selectors but Stem's parts and the experiments."""
    return [name for name in names() if name not in EXPERIMENTAL]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="bench.compare", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", type=Path, default=models.SHIPPED)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--minutes", type=float, default=3.5, help="wall clock; passes stop before")
    parser.add_argument("--passes", type=int, default=8)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=["speed", "probe", "answers"])
    parser.add_argument("--selectors", type=lambda text: text.split(","), default=compared())
    parser.add_argument("--densities", type=lambda text: [float(x) for x in text.split(",")], default=list(DENSITIES))
    parser.add_argument("--length", type=_length, default=8192, help="tokens of the model's prompts")
    parser.add_argument("--families", type=lambda text: text.split(","), help="default: those that suit the model")
    parser.add_argument("--per-family", type=int, default=4, help="prompts of a family in one pass")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sink", type=int, default=1, help="at matched density")
    parser.add_argument("--local", type=int, default=2, help="at matched density")
    parser.add_argument("--speed-length", type=_length, default=131072 if cuda else 512)
    parser.add_argument("--heads", type=int, default=32 if cuda else 4)
    parser.add_argument("--kv-heads", type=int, default=8 if cuda else 2)
    parser.add_argument("--dim", type=int, default=128 if cuda else 32)
    parser.add_argument("--dtype", default="bf16" if cuda else "fp32", choices=sorted(report.DTYPES))
    parser.add_argument("--backend", choices=("triton", "flash", "cpu"))
    parser.add_argument("--seconds", type=float, default=0.3, help="most time for one cell's timed calls")
    parser.add_argument("--tiny", action="store_true", help="few of everything")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    parser.add_argument("--report", action="store_true", help="measure nothing, draw from compare.jsonl")
    options = parser.parse_args(arguments)
    if options.length % 128 or options.speed_length % 128:
        parser.error(f"lengths must be multiples of 128, got {options.length} and {options.speed_length}")
    if options.tiny:
        options.per_family, options.batch, options.passes = 1, 2, 1
        options.densities = options.densities[:1]
    for name in options.selectors:
        get(name)
    return options


def _length(text: str) -> int:
    return report.parse_lengths(text)[0]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure until the time is up, then report."""
    start = time.monotonic()
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / ("compare.jsonl" if options.backend is None else f"compare_{options.backend}.jsonl")
    if options.report:
        return compare_report.write(path)
    path.unlink(missing_ok=True)
    model: Any = None
    corpus: Any = None
    if {"probe", "answers"} & {*options.parts}:
        model, tokenizer = ruler.load_model(options.model, torch.device(options.device))
        corpus = ruler.read_corpus(tokenizer)
        if options.families is None:
            options.families = list(accuracy.FAMILIES if corpus.frame.between is None else ruler.SHORT_FAMILIES)
            options.families = options.families[:2] if options.tiny else options.families
    base = StemConfig(sink_blocks=options.sink, local_blocks=options.local)
    study = Comparison(model, corpus, options, path, start + 60 * options.minutes, base)
    shown = {key: getattr(options, key) for key in ("families", "length", "sink", "local", "heads", "kv_heads", "dim")}
    shown["density"] = options.densities[0]
    study.record("environment", **report.environment(), model=str(options.model.name), **shown)
    print(f"ready after {time.monotonic() - start:.1f} s on {options.device}", flush=True)
    parts: list[Any] = []
    if "speed" in options.parts:
        parts.append(lambda: speed(options, study))
    if "probe" in options.parts:
        parts.append(study.probe)
    if "answers" in options.parts:
        parts += [functools.partial(study.answers, turn) for turn in range(options.passes)]
    for part in parts:
        try:
            part()
        except accuracy.TimeUpError:
            print("the time is up", flush=True)
            break
        except Exception as error:  # one part's failure must not cost the others
            study.failed("a part", error)
        report.release()
    study.record("end", seconds=time.monotonic() - start)
    return compare_report.write(path)


if __name__ == "__main__":
    main()
