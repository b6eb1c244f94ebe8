"""Accuracy against density: every selector at equal computed blocks, on a model that really retrieves.

    python -m bench.accuracy --minutes 2.5                        # one H100
    python -m bench.accuracy --device cpu --length 1K --tiny      # every code path, minutes on a CPU
    python -m bench.accuracy --model smollm2 --length 4K --main-only --out bench/results/smollm2
    python -m bench.accuracy --rules mass:0.02,mass:0.05,own      # also budget rules, density as it falls

Writes each measurement to accuracy.jsonl as it is made, then accuracy.json, accuracy.md and the figures. Seeds
differ from pass to pass; the main table makes passes until the time is used up, and its intervals shrink.
``--report`` draws again from an accuracy.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stem_flex.config import StemConfig
from stem_flex.selectors import Selector, get, names, published

from . import accuracy_probe, attend, models, report, ruler, tasks

FAMILIES = ("single_number", "single_uuid", "multi_key", "multi_key_uuid", "multi_value", "multi_query")
DENSITIES = (0.15, 0.25, 0.10, 0.40, 0.05)  # in order of interest: the time may end before the last
ABLATION_DENSITY, PROBE_DENSITY = 0.25, 0.15
MU = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
VALUE_WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)
STRIDES = (4, 8, 16, 32)
OTHER_LENGTHS = ("stem", "sketch")
BANDS = 4
Policy = attend.Dense | attend.Sparse


@dataclass(frozen=True)
class Prompts:
    """One pass's prompts of one length: task batches by protocol, and windows of text."""

    length: int
    batches: dict[str, list[ruler.Batch]]
    windows: Tensor


class TimeUpError(Exception):
    """The wall-clock limit is reached."""


@dataclass
class Study:
    """The model, its prompts, and the file that measurements go to."""

    model: Any
    corpus: ruler.Corpus
    options: argparse.Namespace
    path: Path
    deadline: float
    base: StemConfig
    _prompts: dict[tuple[int, int], Prompts] = field(default_factory=dict)

    def prompts(self, turn: int, length: int) -> Prompts:
        """Prompts number ``turn`` of ``length`` tokens; the same every time."""
        if (turn, length) not in self._prompts:
            per, size = self.options.per_family, self.options.batch
            pairs = [(f, ruler.FIRST_SEED + turn * per + i) for f in self.options.families for i in range(per)]
            parts = [pairs[first : first + size] for first in range(0, len(pairs), size)]
            batches = {
                protocol: [
                    ruler.make_batch(self.corpus, [f for f, _ in part], [s for _, s in part], length, protocol)
                    for part in parts
                ]
                for protocol in ("prompt", "all")
            }
            windows = tasks.text_windows(self.corpus.tokens, length, size, seed=turn)
            self._prompts[turn, length] = Prompts(length, batches, torch.from_numpy(windows))
        return self._prompts[turn, length]

    def record(self, section: str, **fields: Any) -> None:
        """Append one measurement."""
        with self.path.open("a") as stream:
            stream.write(json.dumps({"section": section, **fields}) + "\n")

    def measure(self, section: str, policy: Policy, prompts: Prompts, **tags: Any) -> None:
        """Answers under both protocols and the text loss of one policy.

        Raises:
            TimeUpError: no time is left.
        """
        if time.monotonic() > self.deadline:
            raise TimeUpError
        start = time.monotonic()
        try:
            found = self._answers(policy, prompts)
        except Exception as error:  # one cell's failure must not cost the others
            self.failed(f"{section} {policy.name} {tags}", error)
            return
        self.record(section, selector=policy.name, length=prompts.length, **tags, **found,
                    seconds=round(time.monotonic() - start, 3))  # fmt: skip
        print(_line(section, policy.name, tags, found, time.monotonic() - start), flush=True)

    def failed(self, what: str, error: Exception) -> None:
        """Note a failure and go on."""
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
        self.record("failure", what=what, error=text)
        print(f"failed: {what}: {text}", flush=True)

    def _answers(self, policy: Policy, prompts: Prompts) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for protocol, batches in prompts.batches.items():
            by_family: dict[str, str] = {}
            nats: dict[str, list[float]] = {}
            parts = []
            for batch in batches:
                used = replace(policy, dense_tail=batch.tail) if isinstance(policy, attend.Sparse) else policy
                for family, (hit, loss) in zip(batch.families, ruler.answers(self.model, batch, used), strict=True):
                    by_family[family] = by_family.get(family, "") + str(int(hit))
                    nats.setdefault(family, []).append(round(loss, 4))
                parts.append(used.computed(prompts.length))
            found[protocol] = by_family
            found[f"{protocol}_nats"] = nats
            found[f"{protocol}_computed"] = float(np.mean(parts))
        found["loss"], found["kl"] = ruler.text_divergence(self.model, prompts.windows, policy)
        found["computed"] = policy.computed(prompts.length)  # by a rule: of the text
        return found

    def policy(self, selector: Selector, density: float, **changes: Any) -> attend.Sparse:
        """``selector`` at ``density``, the forced blocks counted and the same for all, with other settings."""
        config = replace(attend.same_forced(selector, self.base), **changes)
        return attend.Sparse(selector, config, density)

    # ---- the parts -----------------------------------------------------------------------------------------------

    def main_table(self, turn: int) -> None:
        """Every selector at every density."""
        prompts = self.prompts(turn, self.options.length)
        self.measure("main", attend.Dense(), prompts, turn=turn, density=1.0)
        for density in self.options.densities:
            for name in self.options.selectors:
                self.measure("main", self.policy(get(name), density), prompts, turn=turn, density=density)

    def rules(self, turn: int) -> None:
        """Every selector with each budget rule, whose density is as it falls."""
        prompts = self.prompts(turn, self.options.length)
        for selector in map(get, self.options.selectors):
            for label in self.options.rules:
                rule = attend.rule_named(label, selector)
                if rule is not None:
                    policy = attend.Sparse(selector, selector.configured(self.base), 1.0, rule=rule)
                    self.measure("rules", policy, prompts, turn=turn, density=1.0, rule=label)

    def ablations(self) -> None:
        """One option of Stem at a time; mu of the sketch too."""
        prompts = self.prompts(0, self.options.length)
        stem, sketch = get("stem"), get("sketch")
        cases: list[tuple[str, Any, attend.Sparse]] = []
        for density in self.options.ablation_densities:
            cases += [("mu", mu, self.policy(stem, density, mu=mu)) for mu in MU]
            cases += [("sketch mu", mu, self.policy(sketch, density, mu=mu)) for mu in MU]
            cases += [("value_weight", w, self.policy(stem, density, value_weight=w)) for w in VALUE_WEIGHTS]
            cases += [("stride", s, self.policy(stem, density, stride=s)) for s in STRIDES]
            for name in ("stem", "sketch"):
                cases += [(f"{name} block", b, self.policy(get(name), density, block_size=b)) for b in (128, 64)]
        for option, value, policy in cases:
            self.measure("ablation", policy, prompts, option=option, value=value, density=policy.density)

    def other_lengths(self) -> None:
        """Shorter and longer prompts."""
        for length in self.options.other_lengths:
            prompts = self.prompts(0, length)
            self.measure("length", attend.Dense(), prompts, density=1.0)
            for density in self.options.ablation_densities:
                for name in OTHER_LENGTHS:
                    self.measure("length", self.policy(get(name), density), prompts, density=density)

    def layers(self) -> None:
        """Output error, kept mass and kept needles by layer and head, on dense activations."""
        policies = {name: self.policy(get(name), PROBE_DENSITY) for name in self.options.selectors}
        for index, batch in enumerate(self.prompts(0, self.options.length).batches["all"][:: self.options.probe_every]):
            if time.monotonic() > self.deadline:
                raise TimeUpError
            start = time.monotonic()
            found = accuracy_probe.probe(self.model, batch, policies)
            self.record("layers", batch=index, density=PROBE_DENSITY, families=batch.families, losses=found.losses,
                        needles=found.needles, names=list(policies))  # fmt: skip
            print(f"layers, batch {index}: {time.monotonic() - start:.2f} s", flush=True)

    def bands(self) -> None:
        """Prune rows of one quarter of the causal pairs at a time, from early to late; error by position."""
        prompts, block = self.prompts(0, self.options.length), self.base.query_block
        rows = self.options.length // block
        edges = [round(rows * (i / BANDS) ** 0.5) for i in range(BANDS + 1)]
        for kind, name, density in (
            ("forced blocks only", "sam", 0.0),
            (f"Stem at {PROBE_DENSITY:.0%}", "stem", PROBE_DENSITY),
        ):
            policies = {
                f"{first}-{last}": replace(self.policy(get(name), density), band=(first, last))
                for first, last in itertools.pairwise(edges)
            }
            kl = accuracy_probe.divergence(self.model, prompts.windows, policies, block)
            for band, policy in policies.items():
                self.measure("bands", policy, prompts, band=list(policy.band or ()), kind=kind, kl=kl[band])

    def parts(self) -> Iterator[Any]:
        """What to do, in order; further passes of the main table last."""
        yield lambda: self.main_table(0)
        if self.options.rules:
            yield lambda: self.rules(0)
        if self.options.main_only:
            turns: Sequence[int] = range(1, self.options.passes)
        else:
            yield self.layers
            yield self.bands
            yield self.ablations
            yield self.other_lengths
            turns = range(1, self.options.passes)
        for turn in turns:
            yield lambda turn=turn: self.main_table(turn)
            if self.options.rules:
                yield lambda turn=turn: self.rules(turn)


def _line(section: str, name: str, tags: dict[str, Any], found: dict[str, Any], seconds: float) -> str:
    shares = []
    for protocol in ("prompt", "all"):
        hits = "".join(found[protocol].values())
        shares.append(f"{protocol} {hits.count('1')}/{len(hits)}")
    shown = " ".join(f"{k}={v}" for k, v in tags.items() if k not in ("kl", "turn"))
    return f"{section}: {name} {shown}: {', '.join(shares)}, loss {np.mean(found['loss']):.3f}, {seconds:.1f} s"


def compared() -> list[str]:
    """Stem, its parts, the sketch, and what else was registered; the published ones are bench.compare's."""
    others = {selector.name for selector in published.SELECTORS}
    return [name for name in names() if name not in others]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.accuracy", description=(__doc__ or "").split("\n\n")[0])
    models.add_argument(parser)
    parser.add_argument("--model-name", help="what the report calls the model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--minutes", type=float, default=2.5, help="wall clock from here, imports and the report apart")
    parser.add_argument("--passes", type=int, default=8, help="most passes of the main table")
    parser.add_argument("--main-only", action="store_true", help="only the main table")
    parser.add_argument("--length", type=lambda text: report.parse_lengths(text)[0], default=16384)
    parser.add_argument("--other-lengths", type=report.parse_lengths, default=[4096, 32768])
    parser.add_argument("--selectors", type=lambda text: text.split(","), default=compared())
    parser.add_argument("--densities", type=lambda text: [float(x) for x in text.split(",")], default=list(DENSITIES))
    parser.add_argument("--families", type=lambda text: text.split(","), help="default: those that suit the model")
    parser.add_argument("--rules", type=lambda text: text.split(","), default=[],
                        help="budget rules beside the densities: own, or NAME:THRESHOLD, as mass:0.05")  # fmt: skip
    parser.add_argument("--per-family", type=int, default=8, help="prompts of a family in one pass")
    parser.add_argument("--batch", type=int, default=8, help="prompts of one forward")
    parser.add_argument("--sink", type=int, default=1)
    parser.add_argument("--local", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="few of everything")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    parser.add_argument("--report", action="store_true", help="measure nothing, draw from accuracy.jsonl")
    options = parser.parse_args(arguments)
    options.device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if options.model_name is None:
        shipped = options.model == models.SHIPPED
        options.model_name = f"`{models.SHIPPED.relative_to(report.ROOT) if shipped else options.model.name}`"
    options.ablation_densities, options.probe_every = [ABLATION_DENSITY], 1
    if options.tiny:
        options.per_family, options.batch, options.passes = 1, 2, 1
        options.densities, options.other_lengths = [max(options.densities)], []
    for name in options.selectors:
        get(name)
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measure until the time is up, then report."""
    start = time.monotonic()
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "accuracy.jsonl"
    from . import accuracy_report

    if not options.report:
        path.unlink(missing_ok=True)
        model, tokenizer = ruler.load_model(options.model, torch.device(options.device))
        corpus = ruler.read_corpus(tokenizer)
        if options.families is None:
            options.families = list(FAMILIES if corpus.frame.between is None else ruler.SHORT_FAMILIES)
            options.families = options.families[:2] if options.tiny else options.families
        print(f"ready after {time.monotonic() - start:.1f} s on {options.device}", flush=True)
        base = StemConfig(sink_blocks=options.sink, local_blocks=options.local)
        study = Study(model, corpus, options, path, start + 60 * options.minutes, base)
        study.record("environment", **report.environment(), model=options.model_name, families=options.families,
                     sink=options.sink, local=options.local, length=options.length)  # fmt: skip
        for part in study.parts():
            try:
                part()
            except TimeUpError:
                print("the time is up", flush=True)
                break
            except Exception as error:  # one part's failure must not cost the others
                study.failed("a part", error)
        study.record("end", seconds=time.monotonic() - start)
    accuracy_report.write(path)


if __name__ == "__main__":
    main()
