"""Which rows of a batch run sparse, pages back to keys and values, settings and refusals: without vLLM."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stem_flex import StemConfig, layout
from stem_flex.integrations import vllm as plugin
from stem_flex.integrations.hf_settings import Settings
from stem_flex.integrations.vllm import engine, options
from stem_flex.integrations.vllm.cache import gather_cpu_pages, gather_pages
from stem_flex.integrations.vllm.counters import Counters
from stem_flex.integrations.vllm.plan import allowed_pairs, keeps_all, runs_between, sparse_rows
from stem_flex.integrations.vllm.sparse import _ranges
from stem_flex.mask import layout_block_mask, stem_block_mask

CONFIGS = st.sampled_from(
    [StemConfig(), StemConfig(block_size=64), StemConfig(block_size=(64, 128)), StemConfig(block_size=(128, 32))]
)


@given(offset=st.integers(0, 1500), queries=st.integers(1, 900), config=CONFIGS)
def test_allowed_pairs_are_the_causal_layouts(offset, queries, config):
    mask = layout_block_mask(
        layout.causal(),
        1,
        1,
        queries,
        offset + queries,
        q_offset=offset,
        block_size=(config.query_block, config.key_block),
    )
    computed = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
    assert allowed_pairs(offset, queries, config) == computed


@given(
    keys=st.integers(40, 1500),
    more=st.integers(0, 1500),
    start=st.floats(0.05, 1.0),
    mu=st.sampled_from([0.3, 1.0]),
    chunk=st.integers(1, 700),
)
def test_keeps_all_is_what_the_mask_keeps(keys, more, start, mu, chunk):
    config = StemConfig(block_size=32, schedule="fixed", k_start=start, mu=mu, sink_blocks=0, local_blocks=0)
    if not keeps_all(keys, keys + more, config):
        return
    queries = min(chunk, keys)
    q, k = torch.randn(1, 1, queries, 16), torch.randn(1, 1, keys, 16)
    mask = stem_block_mask(q, k, k, config, q_offset=keys - queries, prompt_len=keys + more)
    computed = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
    assert computed == allowed_pairs(keys - queries, queries, config)


def test_keeps_all_of_short_prompts_only():
    assert keeps_all(7000, 7000, StemConfig())
    assert keeps_all(7000, 100_000, StemConfig())  # the first chunk of a long prompt
    assert not keeps_all(20_000, 100_000, StemConfig())
    assert not keeps_all(2048, 1024, StemConfig(schedule="fixed", k_start=0.5))  # past its prompt


SETTINGS = Settings(config=StemConfig(schedule="fixed", k_start=0.25), min_tokens=1000, dense_layers=())


def rows(*requests, settings=SETTINGS):
    """Requests as (queries, keys, prefilling, prompt)."""
    starts = [0]
    for request in requests:
        starts.append(starts[-1] + request[0])
    found = sparse_rows(starts, *([request[i] for request in requests] for i in (1, 2, 3)), settings)
    return found, starts


def test_sparse_rows_of_a_mixed_batch():
    found, starts = rows(
        (1, 2000, False, 1500),  # decodes
        (512, 1512, True, 3000),  # a chunk
        (512, 900, True, 900),  # a short prompt
        (5, 2000, False, 1500),  # drafts to verify
        (100, 2000, True, 2000),  # less than a block of queries
        (1200, 1200, True, 1200),  # a whole prompt
        (512, 1600, True, None),  # nobody knows how long
        (0, 0, False, 0),  # padding
    )
    assert [row.index for row in found] == [1, 5, 6]
    assert [(row.offset, row.queries, row.prompt) for row in found] == [
        (1000, 512, 3000),
        (0, 1200, 1200),
        (1088, 512, None),
    ]
    assert runs_between(found, starts, starts[-1] + 6) == [(0, 1, 0, 1), (2, 5, 513, 1130)]


def test_a_first_chunk_counts_as_its_prompt():
    dense_start = Settings(config=StemConfig(), min_tokens=8192, dense_layers=())
    found, _ = rows((2048, 2048, True, 9000), (2048, 9000, True, 9000), settings=dense_start)
    assert [row.index for row in found] == [1]  # of the first chunk every block is kept


def test_min_tokens_0_sends_everything_but_single_tokens():
    everything = Settings(config=StemConfig(), min_tokens=0, dense_layers=())
    found, starts = rows((2, 2, True, 2), (1, 1, True, 1), (7, 7, False, 3), (3, 9, True, 9), settings=everything)
    assert [row.index for row in found] == [0, 3]
    assert runs_between(found, starts, 20) == [(1, 3, 2, 10)]


def test_rules_that_read_scores_are_not_foreseen():
    request = (400, 400, True, 400)  # of which the default schedule keeps everything
    scheduled = Settings(config=StemConfig(), min_tokens=100, dense_layers=())
    assert not rows(request, settings=scheduled)[0]
    for settings in (
        replace(scheduled, budget=2),
        replace(scheduled, config=StemConfig(routing="sketch", budget="mass")),
    ):
        assert len(rows(request, settings=settings)[0]) == 1


@given(sparse=st.lists(st.booleans(), max_size=6), lengths=st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_rows_and_runs_are_every_token_once(sparse, lengths):
    lengths = lengths[: len(sparse)]
    starts = [0]
    for length, chosen in zip(lengths, sparse, strict=True):
        starts.append(starts[-1] + max(length, chosen))
    picked = [
        SimpleNamespace(index=i, start=starts[i], stop=starts[i + 1]) for i, chosen in enumerate(sparse) if chosen
    ]
    runs = runs_between(picked, starts, starts[-1])
    covered = sorted([*((row.start, row.stop) for row in picked), *((a, b) for *_, a, b in runs)])
    assert [token for a, b in covered for token in range(a, b)] == list(range(starts[-1]))
    assert all(not any(sparse[first:last]) for first, last, *_ in runs)


@pytest.mark.parametrize("by_head", [True, False])
def test_gather_pages(by_head):
    blocks, heads, block, dim, tokens = 9, 3, 16, 8, 55
    cache = torch.randn((blocks, heads, block, 2 * dim) if by_head else (blocks, block, heads, 2 * dim))
    cache = cache if by_head else cache.transpose(1, 2)  # memory by token
    pages = torch.tensor([7, 2, 4, 0], dtype=torch.int32)
    k, v = gather_pages(cache, pages, tokens)
    for token in range(tokens):
        held = cache[pages[token // block], :, token % block]
        assert torch.equal(k[0, :, token], held[:, :dim])
        assert torch.equal(v[0, :, token], held[:, dim:])
    assert k.shape == v.shape == (1, heads, tokens, dim)


def test_gather_cpu_pages():
    blocks, heads, block, dim, tokens = 6, 2, 32, 16, 75
    cache = torch.zeros(blocks, heads, block, 2 * dim)
    pages, held = torch.tensor([5, 1, 3], dtype=torch.int32), torch.randn(2, heads, tokens, dim)
    memory = cache.view(blocks, heads, 2, block * dim)
    for token in range(tokens):
        page, at = pages[token // block], token % block
        memory[page, :, 0].view(heads, dim, block)[:, :, at] = held[0, :, token]
        memory[page, :, 1].view(heads, block, dim)[:, at] = held[1, :, token]
    k, v = gather_cpu_pages(cache, pages, tokens)
    assert torch.equal(k[0], held[0])
    assert torch.equal(v[0], held[1])


def test_settings_are_those_of_transformers():
    chosen = Settings(
        config=StemConfig(block_size=(64, 32), k_start=2, schedule="fixed"), min_tokens=5, dense_layers=(1,)
    )
    data = json.loads(json.dumps(chosen.to_json()))
    del data["fallback"]
    assert options.parse(data) == chosen
    assert options.parse({}) == Settings()
    assert options.parse({"dense_layers": [-1, 0]}, layers=4).dense_layers == (3, 0)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (None, TypeError, "must be a dict, got None; use {} for the defaults"),
        (True, TypeError, "must be a dict"),
        ({"fallback": "sdpa"}, ValueError, "fallback"),
        ({"k_start": 3}, ValueError, r"additional_config\['stem_flex'\] must have settings of .*got \['k_start'\]"),
        ({"config": {"blocks": 3}}, ValueError, r"additional_config\['stem_flex'\]\['config'\] has unknown"),
        ({"config": {"schedule": "none"}}, ValueError, "schedule must be one of"),
        ({"min_tokens": -1}, ValueError, "min_tokens must be 0 or more"),
        ({"dense_layers": [-5]}, ValueError, r"additional_config\['stem_flex'\]\['dense_layers'\] counts"),
    ],
)
def test_wrong_settings(data, error, message):
    with pytest.raises(error, match=message):
        options.parse(data, layers=4)


def impl(**changes):
    plain = dict(
        attn_type="decoder",
        sliding_window=(-1, -1),
        sinks=None,
        logits_soft_cap=0,
        alibi_slopes=None,
        kv_sharing_target_layer_name=None,
        kv_cache_dtype="auto",
    )
    return SimpleNamespace(**(plain | changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"sliding_window": -1}, None),
        ({"sliding_window": None}, None),
        ({"kv_cache_dtype": "bfloat16"}, None),
        ({"sliding_window": (127, 0)}, "sliding window"),
        ({"sliding_window": 128}, "sliding window"),
        ({"sinks": torch.zeros(4)}, "attention sinks"),
        ({"logits_soft_cap": 30.0}, "softcap"),
        ({"alibi_slopes": torch.zeros(4)}, "ALiBi"),
        ({"attn_type": "encoder_only"}, "attention of kind encoder_only"),
        ({"kv_sharing_target_layer_name": "layers.0"}, "another layer's KV cache"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "quantized KV cache"),
        ({"chunk_lookback": 2}, "chunked attention"),
    ],
)
def test_what_stays_with_vllm(changes, reason):
    assert options.impl_reason(impl(**changes)) == reason


@pytest.fixture
def fake_vllm(monkeypatch):
    """A vLLM of version 0.31.5 that has nothing but its version and EngineArgs."""

    class EngineArgs:
        def __init__(self, additional_config):
            self.additional_config = additional_config
            self.attention_backend = self.attention_config = None

        def create_engine_config(self):
            return "config"

    package, arguments = types.ModuleType("vllm"), types.ModuleType("vllm.engine.arg_utils")
    package.__version__ = "0.31.5"
    arguments.EngineArgs = EngineArgs
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm.engine.arg_utils", arguments)
    return EngineArgs


def test_an_unsupported_version_refuses_only_where_stem_is_asked_for(fake_vllm):
    plugin.register()
    plugin.register()
    assert fake_vllm({}).create_engine_config() == "config"
    with pytest.raises(RuntimeError, match=r"vLLM 0\.32\.\* and 0\.33\.\*, got 0\.31\.5"):
        fake_vllm({"stem_flex": {}}).create_engine_config()
    assert fake_vllm.create_engine_config.__wrapped__.__name__ == "create_engine_config"
    assert not hasattr(fake_vllm.create_engine_config.__wrapped__, "__wrapped__")  # once


def test_chosen_backend():
    def arguments(backend=None, **kinds):
        config = SimpleNamespace(backend=None, backend_per_kind=kinds)
        return SimpleNamespace(attention_backend=backend, attention_config=config)

    assert engine._chosen(arguments()) is None
    assert engine._chosen(arguments("auto")) is None
    assert engine._chosen(arguments("flashinfer")) == "FLASHINFER"
    assert engine._chosen(arguments("FLASHINFER", full_attention=SimpleNamespace(name="CUSTOM"))) == "CUSTOM"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"use_mla": True}, "MLA"),
        ({"decode_context_parallel_size": 2}, "decode context parallelism"),
        ({"prefill_context_parallel_size": 2}, "prefill context parallelism"),
        ({"use_ubatching": True}, "micro-batches"),
        ({"VLLM_BATCH_INVARIANT": True}, "batch-invariant mode"),
        ({}, None),
    ],
)
def test_refusals(monkeypatch, change, what):
    envs = types.ModuleType("vllm.envs")
    envs.VLLM_BATCH_INVARIANT = change.get("VLLM_BATCH_INVARIANT", False)
    package = types.ModuleType("vllm")
    package.envs = envs
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm.envs", envs)
    parallel = dict(decode_context_parallel_size=1, prefill_context_parallel_size=1, use_ubatching=False)
    config = SimpleNamespace(
        model_config=SimpleNamespace(use_mla=change.get("use_mla", False)),
        parallel_config=SimpleNamespace(**{key: change.get(key, value) for key, value in parallel.items()}),
    )
    if what is None:
        options.refuse(config)
    else:
        with pytest.raises(NotImplementedError, match=what):
            options.refuse(config)


def test_counters():
    counted, config = Counters(), StemConfig(block_size=32, schedule="fixed", k_start=2, sink_blocks=0, local_blocks=0)
    assert counted.read()["density"] is None
    q, k = torch.randn(1, 4, 200, 16), torch.randn(1, 2, 330, 16)
    mask = stem_block_mask(q, k, k, config, q_offset=130)
    for first in (True, False):
        started = counted.start(q)
        counted.add(mask, allowed_pairs(130, 200, config), 200, 4, first)
        counted.stop(started)
    found = counted.read()
    assert (found["chunks"], found["tokens"], found["calls"]) == (1, 200, 2)
    assert found["allowed"] == 2 * 4 * allowed_pairs(130, 200, config)
    assert found["computed"] == 2 * int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
    assert 0 < found["density"] < 1
    assert found["seconds"] > 0


def test_ranges():
    assert _ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert _ranges([]) == ""
