"""``python -m bench.ttft``: time to first token of whole transformers models, dense against Stem.

Random weights built from a config on the device, no checkpoint. One prefill of batch 1 into a fresh cache, logits
of the last token only; the fastest of a few counts, their median is in the JSON. Attention and mask building are
timed by events around the attention calls, the rest is what is left of the whole. A cell that fails is reported and
the others still run. ``--report`` measures nothing and writes the tables and the picture again.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
)
from transformers.utils import logging

import stem_flex.integrations.hf as stem_hf
from stem_flex.integrations import hf_attention, hf_masks, hf_versions
from stem_flex.plumbing.backend import flash_attn_func
from stem_flex.plumbing.implementation import installed

from . import report
from .mask import choose_config
from .ttft_report import present

_SHAPES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (
        LlamaConfig,  # Llama-3.1-8B
        dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
             num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=500000.0),
    ),
    "qwen3": (
        Qwen3Config,  # Qwen3-8B
        dict(vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
             num_attention_heads=32, num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-6, rope_theta=1000000.0),
    ),
    "mistral": (
        MistralConfig,  # Mistral-7B-v0.3, which has no window
        dict(vocab_size=32768, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
             num_attention_heads=32, num_key_value_heads=8, sliding_window=None, rope_theta=1000000.0),
    ),
}  # fmt: skip
_TINY = dict(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, head_dim=32)  # fmt: skip


class Stopwatch:
    """Milliseconds per name of calls inside a forward, read after one synchronisation."""

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: list[tuple[str, Any, Any]] = []

    def now(self) -> Any:
        """A mark in the stream, or the host's clock."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def around(self, name: str, call: Callable) -> Callable:
        """``call``, timed under ``name``."""

        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            result = call(*args, **kwargs)
            self.marks.append((name, start, self.now()))
            return result

        return timed

    def total(self) -> dict[str, float]:
        """Sum per name since the last call; waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        sums: dict[str, float] = {}
        for name, start, end in self.marks:
            ms = start.elapsed_time(end) if self.device.type == "cuda" else (end - start) * 1e3
            sums[name] = sums.get(name, 0.0) + ms
        self.marks.clear()
        return sums


def _fa2(module, query, key, value, attention_mask, **kwargs):
    backends = [SDPBackend.FLASH_ATTENTION] if query.is_cuda else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends):
        return hf_versions.sdpa_attention(module, query, key, value, attention_mask, **kwargs)


def _fa4(module, query, key, value, attention_mask, scaling=None, **kwargs):
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        raise ValueError("flash-attn-4 is compared on whole unpadded prompts only")
    out = flash_attn_func()(*(x.transpose(1, 2) for x in (query, key, value)), softmax_scale=scaling, causal=True)
    return (out[0] if isinstance(out, tuple) else out), None


@contextlib.contextmanager
def timed_attention(watch: Stopwatch) -> Iterator[None]:
    """Register ``bench_sdpa``, ``bench_fa4`` and ``bench_stem``, each timed, for as long as this is open."""
    functions = {"sdpa": _fa2, "fa4": _fa4, "stem": hf_attention.stem_attention_forward}
    for name, function in functions.items():
        AttentionInterface.register(f"bench_{name}", watch.around("attention", function))
    AttentionMaskInterface.register("bench_stem", hf_masks.stem_mask)
    builders = {name: getattr(hf_attention, name) for name in ("stem_block_mask",)}
    for name, builder in builders.items():
        setattr(hf_attention, name, watch.around("mask", builder))
    try:
        yield
    finally:
        for name, builder in builders.items():
            setattr(hf_attention, name, builder)


def build(name: str, options: argparse.Namespace) -> Any:
    """The model in evaluation mode, seeded random weights drawn on the device."""
    kind, shape = _SHAPES[name]
    shape = {**shape, **(_TINY if options.smoke else {}), "max_position_embeddings": max(options.lengths)}
    if options.layers:
        shape["num_hidden_layers"] = options.layers
    torch.manual_seed(0)
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(kind(**shape), dtype=report.DTYPES[options.dtype])
    return model.eval()


class Cells:
    """The implementations of one model, timed at one length after the other."""

    def __init__(self, model: Any, options: argparse.Namespace, watch: Stopwatch):
        self.model, self.options, self.watch = model, options, watch
        self.device = torch.device(options.device)

    def switch(self, name: str) -> None:
        """Give the model one implementation; Stem with its settings, the others as they come."""
        if name == "stem":
            stem_hf.apply(
                self.model,
                choose_config(self.options.config),
                dense_layers=tuple(self.options.dense_layers),
                min_tokens=self.options.min_tokens,
                name="bench_stem",
            )
            return
        if hf_versions.implementation(self.model.config) == "bench_stem":
            stem_hf.remove(self.model)
        self.model.set_attn_implementation(f"bench_{name}")

    def prefill(self, ids: torch.Tensor) -> dict[str, float]:
        """One prefill into a fresh cache: milliseconds of the whole and of its parts."""
        cache = DynamicCache(config=self.model.config)
        with torch.inference_mode():
            whole = self.watch.around("ttft", self.model)
            logits = whole(ids, **hf_versions.with_cache(self.model, cache), use_cache=True, logits_to_keep=1).logits
        parts = self.watch.total()
        if not bool(logits.isfinite().all()):
            raise FloatingPointError("the logits are not finite")
        mask = parts.get("mask", 0.0)
        attention = parts["attention"] - mask
        rest = parts["ttft"] - parts["attention"]
        return {"ttft": parts["ttft"], "attention": attention, "mask": mask, "rest": rest}

    def run(self, name: str, length: int) -> dict[str, Any]:
        """Warm up, then ``repeats`` prefills, fewer where ``--seconds`` would not hold them."""
        self.switch(name)
        generator = torch.Generator(device=self.device).manual_seed(length)
        ids = torch.randint(1, 512, (1, length), device=self.device, generator=generator)
        cuda = self.device.type == "cuda"
        self.prefill(ids)  # a length's first prefill may compile
        report.release()
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        samples, start = [], time.perf_counter()
        with stem_hf.trace() as seen:
            samples.append(self.prefill(ids))
        while len(samples) < self.options.repeats:
            spent = time.perf_counter() - start
            if spent * (len(samples) + 1) / len(samples) > self.options.seconds:
                break
            samples.append(self.prefill(ids))
        cell: dict[str, Any] = {"ms": report.summarize([sample["ttft"] for sample in samples])}
        fastest = min(samples, key=lambda sample: sample["ttft"])
        cell |= {f"{part}_ms": round(fastest[part], 3) for part in ("attention", "mask", "rest")}
        cell["fastest_ms"] = round(fastest["ttft"], 3)
        cell["paths"] = dict(seen.count())
        cell["peak_gib"] = round(torch.cuda.max_memory_allocated(self.device) / 1024**3, 3) if cuda else None
        return cell


def measure_model(name: str, options: argparse.Namespace, watch: Stopwatch, deadline: float) -> list[dict[str, Any]]:
    """All lengths and implementations of one model."""
    start = time.perf_counter()
    model = build(name, options)
    print(f"{name}: built in {time.perf_counter() - start:.1f} s", flush=True)
    cells = Cells(model, options, watch)
    rows = []
    for length in options.lengths:
        row: dict[str, Any] = {"model": name, "tokens": length}
        start = time.perf_counter()
        for implementation in options.implementations:
            if time.perf_counter() > deadline:
                row[implementation] = {"skipped": f"not run: --limit {options.limit:g} s are over"}
                continue
            row[implementation] = report.attempt(functools.partial(cells.run, implementation, length))
            watch.marks.clear()
        compare(row)
        rows.append(row)
        print(f"{name} {report.short(length)}: {time.perf_counter() - start:.1f} s", flush=True)
    return rows


def compare(row: dict[str, Any]) -> None:
    """Add Stem's speed-ups and its peak memory over dense to a row."""
    stem = row.get("stem", {})
    for over in ("sdpa", "fa4"):
        dense = row.get(over, {})
        if "ms" in stem and "ms" in dense:
            row[f"over_{over}"] = round(dense["fastest_ms"] / stem["fastest_ms"], 3)
    if stem.get("peak_gib") and row.get("sdpa", {}).get("peak_gib"):
        row["extra_gib"] = round(stem["peak_gib"] - row["sdpa"]["peak_gib"], 3)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.ttft", description=(__doc__ or "").split("\n\n")[0])
    cuda = torch.cuda.is_available()

    def names(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    parser.add_argument("--models", type=names, default=list(_SHAPES), help="comma-separated: " + ",".join(_SHAPES))
    parser.add_argument("--lengths", type=report.parse_lengths, default="8K,32K,64K,128K" if cuda else "512,1024")
    parser.add_argument("--implementations", type=names, default=None, help="of sdpa,fa4,stem")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", default="bf16" if cuda else "fp32", choices=sorted(report.DTYPES))
    parser.add_argument("--smoke", action="store_true", default=not cuda, help="tiny models: does everything run?")
    parser.add_argument("--layers", type=int, default=None, help="fewer layers than the model has")
    parser.add_argument("--config", default="default", choices=("operator", "paper", "default"))
    parser.add_argument("--dense-layers", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--min-tokens", type=int, default=None, help="see stem_flex.integrations.hf.apply")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=45.0, help="most time for one cell's timed prefills")
    parser.add_argument("--limit", type=float, default=540.0, help="no cell starts after this many seconds")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    parser.add_argument("--report", action="store_true", help="measure nothing, draw from ttft.json")
    options = parser.parse_args(arguments)
    unknown = set(options.models) - _SHAPES.keys()
    if unknown:
        parser.error(f"--models must be of {','.join(_SHAPES)}, got {','.join(sorted(unknown))}")
    if options.implementations is None:
        options.implementations = ["sdpa", *(["fa4"] if cuda and installed("flash_attn.cute") else []), "stem"]
    if options.min_tokens is None:
        options.min_tokens = 0 if options.smoke else 8192
    return options


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Run, print, write; returns the rows."""
    start = time.perf_counter()
    options = parse(arguments)
    if options.report:
        header, rows = report.read(options.out / "ttft.json")
        present(rows, argparse.Namespace(**header["options"] | {"out": options.out}), header)
        return rows
    logging.set_verbosity_error()
    header = {"environment": report.environment(), "options": vars(options)}
    watch = Stopwatch(torch.device(options.device))
    rows: list[dict[str, Any]] = []
    with timed_attention(watch):
        for name in options.models:
            try:
                rows += measure_model(name, options, watch, start + options.limit)
            except Exception as error:  # a model that can't be built must not cost the others their result
                rows += [{"model": name, "tokens": length, "stem": {"error": f"{type(error).__name__}: {error}"[:300]}}
                         for length in options.lengths]  # fmt: skip
            report.release()
    present(rows, options, header)
    return rows


if __name__ == "__main__":
    main()
