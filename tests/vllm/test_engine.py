"""vLLM's engine with Stem: the same tokens as without where everything is kept, and transformers' where not."""

from __future__ import annotations

import logging

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own: .ci/vllm makes one")

pytestmark = pytest.mark.timeout(300)

KEEP_ALL = {"config": {"schedule": "fixed", "k_start": 1.0}, "min_tokens": 0, "dense_layers": []}
SPARSE = {
    "config": {
        "schedule": "fixed",
        "k_start": 0.25,
        "block_size": 32,
        "stride": 8,
        "metric": "log",
        "sink_blocks": 1,
        "local_blocks": 1,
    },
    "min_tokens": 200,
    "dense_layers": [0],
}


def prompts(*lengths, seed=0, prefix=()):
    generator = torch.Generator().manual_seed(seed)
    return [[*prefix, *torch.randint(2, 120, (n,), generator=generator).tolist()] for n in lengths]


def ask(llm, texts, tokens=8):
    """Tokens, and the logarithms of their probabilities, of each prompt."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=tokens, detokenize=False, logprobs=0, ignore_eos=True)
    done = llm.generate([{"prompt_token_ids": text} for text in texts], sampling, use_tqdm=False)
    outputs = [request.outputs[0] for request in done]
    values = [[step[token].logprob for step, token in zip(o.logprobs, o.token_ids, strict=True)] for o in outputs]
    return [list(o.token_ids) for o in outputs], values


def assert_same(got, expected):
    assert got[0] == expected[0]
    for mine, theirs in zip(got[1], expected[1], strict=True):
        assert mine == pytest.approx(theirs, abs=2e-4)


@pytest.fixture
def plans(monkeypatch):
    """Every plan that is made."""
    from stem_flex.integrations.vllm.sparse import SparseBuilder

    seen, make = [], SparseBuilder._plan

    def spy(self, common, settings):
        plan = make(self, common, settings)
        seen.append(plan)
        return plan

    monkeypatch.setattr(SparseBuilder, "_plan", spy)
    return seen


BATCH = prompts(460, 200, 700, 90)
ALIGNED = prompts(400, 640, 90, seed=1)  # in chunks of 256 none has fewer than 128 tokens, which would be dense
SHARED = prompts(500, seed=3)[0]
ONE = prompts(400, seed=5)


@pytest.fixture(scope="module")
def own(open_engine):
    """What vLLM's own attention says, by its own classes."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    with open_engine() as llm:
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        assert {type(layer.impl) for layer in layers.values()} == {CPUAttentionBackendImpl}
        return {
            "batch": ask(llm, BATCH),
            "prefix": [ask(llm, prompts(n, seed=n, prefix=SHARED)) for n in (60, 170)],
            "one": ask(llm, ONE),
        }


def test_a_budget_of_everything_says_the_same(engine, own, plans):
    with engine(KEEP_ALL) as llm:
        assert_same(ask(llm, BATCH), own["batch"])
        (counts,) = llm.collective_rpc("stem_flex_stats")
    assert counts["tokens"] == sum(map(len, BATCH))
    assert counts["calls"] == 3 * len(BATCH)
    assert counts["computed"] == counts["allowed"]
    assert counts["density"] == 1
    assert any(plan is not None and len(plan.rows) > 1 for plan in plans)


def test_in_chunks_mixed_with_decode_and_with_a_prefix(engine, own, plans):
    with engine(KEEP_ALL, max_num_batched_tokens=160) as llm:
        assert_same(ask(llm, BATCH), own["batch"])
        made = [plan for plan in plans if plan is not None]
        assert any(plan.runs for plan in made)  # decodes beside chunks
        assert any(row.offset % 32 for plan in made for row in plan.rows)  # chunks that are cut anywhere
        assert {row.prompt for plan in made for row in plan.rows} == {len(text) for text in BATCH}
        for tail, expected in zip((60, 170), own["prefix"], strict=True):
            plans.clear()
            assert_same(ask(llm, prompts(tail, seed=tail, prefix=SHARED)), expected)
            first = next(row for plan in plans if plan is not None for row in plan.rows)
            assert first.offset == (0 if tail == 60 else 384)  # vLLM's blocks of 128 tokens


def test_sparse_tokens_are_those_of_transformers(engine, model_folder, exactly, plans):
    from transformers import AutoModelForCausalLM

    from stem_flex.integrations import hf
    from stem_flex.integrations.vllm.options import parse

    settings = parse(SPARSE)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    dense = [generated(model, text) for text in ALIGNED]
    hf.apply(model, settings.config, dense_layers=settings.dense_layers, min_tokens=settings.min_tokens)
    expected = [generated(model, text) for text in ALIGNED]
    assert expected != dense
    with engine(SPARSE) as llm:
        whole = ask(llm, ALIGNED)
        assert whole[0] == expected
        (counts,) = llm.collective_rpc("stem_flex_stats")
        assert counts["chunks"] == 2  # 90 tokens are too few
        assert counts["calls"] == 2 * 2  # layer 0 is dense
        assert 0.2 < counts["density"] < 0.7
    plans.clear()
    with engine(SPARSE, max_num_batched_tokens=256) as llm:  # with "log" whole blocks choose as in one shot
        for text, tokens in zip(ALIGNED, whole[0], strict=True):
            assert ask(llm, [text])[0] == [tokens]
    assert any(row.offset for plan in plans if plan is not None for row in plan.rows)


@torch.no_grad()
def generated(model, text, tokens=8):
    ids = torch.tensor([text])
    out = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return out[0, len(text) :].tolist()


def test_compiled_attention_and_the_log(open_engine, own, caplog):
    from stem_flex.integrations.vllm import logger, stats

    logger().addHandler(caplog.handler)  # vLLM's loggers do not propagate
    try:
        with caplog.at_level(logging.INFO), open_engine(KEEP_ALL | {"dense_layers": [0, 2]}) as llm:
            assert_same(ask(llm, ONE), own["one"])
            counts = stats()
    finally:
        logger().removeHandler(caplog.handler)
    assert counts["calls"] == 1
    assert (
        "runs sparse in layers 1 over CPUAttention (selector of the config, budget fixed k_start 1.0, blocks"
        in caplog.text
    )
    assert "dense layers: dense_layers: 0, 2" in caplog.text
    assert "1 chunks of 400 prompt tokens ran sparse, density 100.0%" in caplog.text


@pytest.mark.parametrize(
    ("stem", "message"),
    [
        ({"min_token": 1}, "min_token"),
        ({"dense_layers": [0, -4]}, "the model has 3"),
        ({"dense_layers": [0, 1, 2]}, "no attention layer runs sparse: dense_layers"),
    ],
)
def test_refused_at_the_start(engine, stem, message):
    with pytest.raises(ValueError, match=message), engine(stem):
        pass


def test_custom_backend_asks_for_the_defaults(engine, plans):
    with engine(attention_backend="CUSTOM") as llm:
        assert llm.llm_engine.vllm_config.additional_config == {"stem_flex": {}}


def test_the_entry_point_is_installed():
    from importlib.metadata import entry_points

    (found,) = [point for point in entry_points(group="vllm.general_plugins") if point.name == "stem_flex"]
    assert found.value == "stem_flex.integrations.vllm:register"


def test_other_instruction_sets_are_refused(engine, monkeypatch):
    from vllm.v1.attention.backends import cpu_attn

    monkeypatch.setattr(cpu_attn, "_get_attn_isa", lambda *args, **kwargs: "amx")
    with pytest.raises(NotImplementedError, match="'amx'; set dtype='float32' or 'float16'"), engine(KEEP_ALL):
        pass
