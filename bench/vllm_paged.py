"""``python -m bench.vllm_paged --parts FOLDER``: the vLLM plug-in's attention class on a paged cache, without vLLM.

Runs ``forward`` of the plug-in's class with vLLM's own builders, metadata and Triton kernels (``bench.vllm_parts``):

1. a mixed batch (decodes, drafts to verify, a chunk over cached pages, a whole prompt, padding) where everything is
   kept, against dense attention of each request;
2. the same with a small budget, without any wait for the device (torch's sync debug mode raises);
3. chunks that end a prompt of ``--length`` tokens, and the whole prompt at once: gathering, Stem by TRITON and by
   FLASH, vLLM's own Triton attention and SDPA on gathered tensors.
"""

from __future__ import annotations

import argparse
import functools
import json
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from . import report, vllm_parts

LAYER = "model.layers.3.self_attn.attn"
PAGE = 16


@dataclass(frozen=True)
class Request:
    """New tokens, all tokens, tokens of the prompt; ``prefilling`` as vLLM has it."""

    queries: int
    keys: int
    prompt: int
    prefilling: bool = True


class Runner:
    """What the plug-in asks vLLM's runner: the prompts' lengths."""

    def __init__(self, config: Any):
        self.vllm_config, self.input_batch = config, types.SimpleNamespace(num_prompt_tokens=None)


class Serving:
    """One attention layer, its builder and its paged cache, over FlashAttention's or Triton's classes of vLLM."""

    def __init__(self, options: argparse.Namespace, stem: dict, *, base: str = "triton", longest: int = 1 << 17):
        self.options, self.device = options, torch.device(options.device)
        self.dtype = report.DTYPES[options.dtype]
        self.config = self._config(stem, longest)
        vllm_parts.current["config"] = self.config
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        from stem_flex.integrations.vllm import runners

        builder, impl = classes(base)
        self.impl = impl(options.heads, options.dim, options.dim**-0.5, options.kv_heads, None, None, "auto")
        one = torch.ones((), device=self.device)
        self.layer = types.SimpleNamespace(
            impl=self.impl, head_size=options.dim, head_size_v=options.dim, _k_scale=one, _v_scale=one, _q_scale=one
        )
        self.config.compilation_config.static_forward_context[LAYER] = self.layer
        spec = FullAttentionSpec(
            block_size=PAGE, num_kv_heads=options.kv_heads, head_size=options.dim, dtype=self.dtype
        )
        self.builder = builder(spec, [LAYER], self.config, self.device)
        assert self.impl.stem_sparse, self.impl.stem_reason
        self.runner = Runner(self.config)
        runners._runners.add(self.runner)

    def _config(self, stem: dict, longest: int) -> Any:
        space, options = types.SimpleNamespace, self.options
        return space(
            additional_config={"stem_flex": {"dense_layers": [], **stem}},
            model_config=space(
                use_mla=False,
                hf_text_config=space(num_hidden_layers=4),
                hf_config=space(model_type="llama"),
                rswa_window=None,
                is_mm_prefix_lm=False,
                max_model_len=longest,
                dtype=self.dtype,
                get_num_attention_heads=lambda parallel: options.heads,
                get_num_kv_heads=lambda parallel: options.kv_heads,
                get_head_size=lambda: options.dim,
            ),
            parallel_config=space(
                decode_context_parallel_size=1,
                prefill_context_parallel_size=1,
                use_ubatching=False,
                cp_kv_cache_interleave_size=1,
                dcp_comm_backend="ag_rs",
            ),
            cache_config=space(cache_dtype="auto"),
            scheduler_config=space(max_num_seqs=256, max_num_batched_tokens=min(16384, longest)),
            attention_config=space(flash_attn_max_num_splits_for_cuda_graph=32),
            kernel_config=space(enable_jit_warmup=False),
            speculative_config=None,
            compilation_config=space(
                static_forward_context={},
                cudagraph_mode=vllm_parts.CUDAGraphMode.NONE,
                max_cudagraph_capture_size=None,
                cudagraph_capture_sizes=[],
            ),
        )

    def batch(self, requests: Sequence[Request], *, padding: int = 0, seed: int = 0) -> Batch:
        """Random queries, keys and values of the requests, in pages in random order."""
        from vllm.v1.attention.backend import CommonAttentionMetadata

        options, device = self.options, self.device
        random = torch.Generator(device=device).manual_seed(seed)
        draw = functools.partial(torch.randn, generator=random, device=device, dtype=self.dtype)
        pages = [-(-request.keys // PAGE) for request in requests]
        order = (torch.randperm(sum(pages), generator=random, device=device) + 1).int()  # page 0 is nobody's
        memory = torch.zeros(sum(pages) + 1, PAGE, options.kv_heads, 2 * options.dim, device=device, dtype=self.dtype)
        table = torch.zeros(len(requests) + padding, max(pages), dtype=torch.int32, device=device)
        held, at = [], 0
        for row, (request, count) in enumerate(zip(requests, pages, strict=True)):
            table[row, :count] = order[at : at + count]
            both = draw(count * PAGE, options.kv_heads, 2 * options.dim)
            memory[order[at : at + count].long()] = both.view(count, PAGE, options.kv_heads, -1)
            held.append(both[: request.keys].chunk(2, dim=-1))
            at += count
        counts = [request.queries for request in requests] + [0] * padding
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        keys = torch.tensor([request.keys for request in requests] + [0] * padding, dtype=torch.int32)
        tokens = int(starts[-1])
        common = CommonAttentionMetadata(
            query_start_loc=starts.to(device),
            query_start_loc_cpu=starts,
            seq_lens=keys.to(device),
            num_reqs=len(counts),
            num_actual_tokens=tokens,
            max_query_len=max(counts),
            max_seq_len=int(keys.max()),
            block_table_tensor=table,
            slot_mapping=torch.zeros(tokens, dtype=torch.int64, device=device),  # only the cache's update reads it
            is_prefilling=torch.tensor([request.prefilling for request in requests] + [False] * padding),
            seq_lens_cpu_upper_bound=keys,
        )
        prompts = torch.tensor([request.prompt for request in requests] + [0] * padding).numpy()
        new = [(k[-r.queries :], v[-r.queries :]) for r, (k, v) in zip(requests, held, strict=True)]
        return Batch(
            tuple(requests),
            common,
            memory.transpose(1, 2),
            draw(tokens, options.heads, options.dim),
            torch.cat([k for k, _ in new]),
            torch.cat([v for _, v in new]),
            held,
            prompts,
        )

    def prepare(self, batch: Batch) -> Any:
        """vLLM's metadata with the plan, as its runner would have it built for a step."""
        self.runner.input_batch.num_prompt_tokens = batch.prompts
        return self.builder.build(0, batch.common)

    def forward(self, batch: Batch, metadata: Any, *, dense: bool = False) -> Tensor:
        """The layer's output (T, Hq, D); ``dense`` by vLLM's own class."""
        call = super(type(self.impl).__mro__[1], self.impl).forward if dense else self.impl.forward
        output = torch.zeros_like(batch.query)
        call(self.layer, batch.query, batch.key, batch.value, batch.cache, metadata, output)
        return output


@dataclass(frozen=True)
class Batch:
    """Tensors as vLLM passes them, and each request's keys and values in order."""

    requests: tuple[Request, ...]
    common: Any
    cache: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    held: list[tuple[Tensor, Tensor]]
    prompts: Any

    def dense(self) -> Tensor:
        """Causal attention of each request on its own, by SDPA."""
        parts, start = [], 0
        for request, (k, v) in zip(self.requests, self.held, strict=True):
            q = self.query[start : start + request.queries]
            parts.append(sdpa(q, k, v))
            start += request.queries
        return torch.cat(parts)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention of the last tokens: q (L, Hq, D), k and v (N, Hkv, D)."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    bias = causal_lower_right(q.shape[2], k.shape[2]) if q.shape[2] > 1 else None
    return scaled_dot_product_attention(q, k, v, attn_mask=bias)[0].transpose(0, 1)


def classes(base: str) -> tuple[type, type]:
    """The plug-in's builder and attention class; over Triton's, whose kernels are at hand, made as the served are."""
    if base == "flash":
        from stem_flex.integrations.vllm.cuda import StemFlashBuilder, StemFlashImpl

        return StemFlashBuilder, StemFlashImpl
    from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl, TritonAttentionMetadataBuilder

    from stem_flex.integrations.vllm.cache import gather_pages
    from stem_flex.integrations.vllm.sparse import SparseBuilder, SparseImpl

    builder = type("StemTritonBuilder", (SparseBuilder, TritonAttentionMetadataBuilder), {"stem_own": True})
    gather = {"stem_gather": staticmethod(gather_pages)}
    return builder, type("StemTritonImpl", (SparseImpl, TritonAttentionImpl), gather)


def error(got: Tensor, expected: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def mixed(unit: int) -> list[Request]:
    """Decodes, drafts, a chunk, a whole prompt, a short tail: in units of tokens."""
    return [
        Request(1, 3 * unit + 5, 2 * unit, prefilling=False),
        Request(2 * unit + 3, 7 * unit + 1, 9 * unit),
        Request(4, 2 * unit, unit, prefilling=False),
        Request(1, unit, unit - 3, prefilling=False),
        Request(3 * unit - 7, 3 * unit - 7, 3 * unit - 7),
        Request(20, 2 * unit, 2 * unit),
    ]


def check(options: argparse.Namespace) -> dict[str, Any]:
    """Everything kept: equal to dense attention. A small budget: no wait for the device, and fewer blocks."""
    from stem_flex.integrations.vllm.counters import counters

    unit, block = (32, 32) if options.device == "cpu" else (1024, 128)
    everything = {"config": {"schedule": "fixed", "k_start": 1.0, "block_size": block}, "min_tokens": 0}
    keep = Serving(options, everything)
    batch = keep.batch(mixed(unit), padding=3)
    metadata = keep.prepare(batch)
    assert [row.index for row in metadata.stem_plan.rows] == [1, 4, 5]
    assert [(run.first, run.last) for run in metadata.stem_plan.runs] == [(0, 1), (2, 4)]
    found: dict[str, Any] = {"everything kept, error": error(keep.forward(batch, metadata), batch.dense())}
    found["vLLM's own, error"] = error(keep.forward(batch, metadata, dense=True), batch.dense())
    flash = Serving(options, everything, base="flash")
    chunk = flash.batch([Request(2 * unit, 5 * unit, 6 * unit)])
    found["FlashAttention's classes, error"] = error(flash.forward(chunk, flash.prepare(chunk)), chunk.dense())
    counters.reset()
    few = {"schedule": "fixed", "k_start": 0.2, "block_size": block, "sink_blocks": 1, "local_blocks": 1}
    sparse = Serving(options, {"config": few, "min_tokens": unit})
    batch = sparse.batch(mixed(unit), padding=3)
    sparse.forward(batch, sparse.prepare(batch))
    if options.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            sparse.forward(batch, sparse.prepare(batch))
    finally:
        if options.device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    found |= {"waits for the device": 0, "counters": counters.read()}
    worst = max(value for name, value in found.items() if name.endswith("error"))
    limit = 2e-2 if options.dtype != "float32" else 1e-3
    assert worst < limit, f"error {worst:.3g}, expected below {limit}"
    return found


def cell(options: argparse.Namespace, queries: int) -> dict[str, Any]:
    """Times of the last ``queries`` tokens of a prompt of ``--length`` tokens."""
    from stem_flex.attention import sparse_prefill
    from stem_flex.integrations.vllm import sparse
    from stem_flex.integrations.vllm.counters import counters

    device = torch.device(options.device)
    measure = functools.partial(report.measure, device=device, repeats=options.repeats, seconds=options.seconds)
    serving = Serving(options, options.stem, longest=options.length)
    batch = serving.batch([Request(queries, options.length, options.length)])
    metadata = serving.prepare(batch)
    if getattr(metadata, "stem_plan", None) is None:
        return {"queries": queries, "error": "the budget keeps everything: nothing is sparse"}
    row: dict[str, Any] = {"queries": queries, "keys": options.length}
    if queries < options.length:
        pages = batch.common.block_table_tensor[0]
        row["gather"] = measure(lambda: serving.impl.stem_gather(batch.cache, pages, options.length)).median
    for backend in ("cpu",) if options.device == "cpu" else ("triton", "flash"):

        def run(backend: str = backend) -> Any:
            before = sparse.sparse_prefill
            sparse.sparse_prefill = functools.partial(sparse_prefill, backend=backend)
            try:
                return serving.forward(batch, metadata)
            finally:
                sparse.sparse_prefill = before

        def timed(call: Callable[[], Any] = run) -> dict[str, Any]:
            counters.reset()
            found = {"ms": measure(call).median, "density": counters.read()["density"]}
            extra = report.peak_extra_bytes(call, device)
            return found | {"MiB": None if extra is None else extra / 2**20}

        row[f"stem {backend}"] = report.attempt(timed)
    row["vLLM Triton"] = report.attempt(
        lambda: {"ms": measure(lambda: serving.forward(batch, metadata, dense=True)).median}
    )
    k, v = batch.held[0]
    row["SDPA"] = report.attempt(lambda: {"ms": measure(lambda: sdpa(batch.query, k, v)).median})
    return row


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Check, time, print, and write ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=Path, required=True, help="folder that bench.vllm_parts has filled")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bf16", choices=sorted(report.DTYPES))
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--length", type=lambda text: report.parse_lengths(text)[0], default=131072)
    parser.add_argument("--chunks", type=report.parse_lengths, default=[2048, 8192, 16384, 131072])
    parser.add_argument("--stem", type=json.loads, default={"min_tokens": 1}, help="the plug-in's settings when timed")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    version = vllm_parts.load(options.parts)
    result: dict[str, Any] = {"environment": report.environment() | {"vllm files": version}, "check": check(options)}
    print(json.dumps(result["check"], indent=1), flush=True)
    result["cells"] = []
    for queries in options.chunks:
        result["cells"].append(report.attempt(lambda queries=queries: cell(options, queries)))
        print(json.dumps(result["cells"][-1]), flush=True)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
