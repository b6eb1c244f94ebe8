"""transformers models under ``attn_implementation="stem_flex"``.

Selection and routing are checked through :func:`hf_models.dense_sparse_prefill`, which evaluates block lists and
mask_mod exactly as compiled flex_attention does; a few families run on the compiled one. STEM_FLEX_DEEP=1 runs all
families on it (8 s a signature).
"""

from __future__ import annotations

import os

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")

from transformers import DynamicCache  # noqa: E402

import stem_flex.integrations.hf as stem_hf  # noqa: E402
from stem_flex.integrations.hf_versions import with_cache  # noqa: E402
from tests.hf_models import (  # noqa: E402
    CASES,
    KEEP_ALL,
    SPARSE,
    TOKENS,
    own_attention,
    prompt,
    skip_if_old,
    tiny_model,
)

# Every type is compared with its own attention. Some of them, and what they bring: afmoe gates, cohere2 and
# exaone4 window and full layers, deepseek_v3 latent attention with Dv != D, gemma2 softcap, gpt_oss sinks,
# llama4_text chunk layers, jamba and qwen3_next recurrent layers between, nemotron squared relu.
FAMILIES = """
afmoe apertus arcee aria_text axk1 bamba biogpt bitnet cohere cohere2 cohere2_moe ctrl cwm deepseek_v2 deepseek_v3
diffllama ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo gemma gemma2 gemma3_text gemma4_text glm glm4 glm4_moe
glm4_moe_lite gpt2 gpt_bigcode gpt_neox gpt_oss granite granite_swa granitemoe granitemoe_swa granitemoehybrid
granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 jais2 jamba jetmoe laguna lfm2 lfm2_moe llama
llama4_text mellum mimo_v2_flash minicpm3 minimax minimax_m2 ministral ministral3 mistral mixtral modernbert-decoder
nanochat nemotron olmo olmo2 olmo3 olmo_hybrid olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3
qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma youtu
""".split()
# transformers 5.5 fails on some case of these with its own attention, or does not have them use the interface.
LATER = "ctrl diffllama gemma4_text lfm2_moe nemotron olmo_hybrid".split()
COMPILED = ("llama", "gemma2")


# What transformers itself does not run: this family's cache is one of its own.
UNSERVED = {"minimax": ("dynamic cache", "static cache", "chunked generate")}


def check_family(family, cases=CASES):
    if family in LATER:
        skip_if_old(f"does not run every case of {family!r}, or runs it without the attention interface")
    model = own_attention(tiny_model(family))
    wrong, paths = [], set()
    with torch.no_grad():
        names = [name for name in cases if name not in UNSERVED.get(family, ())]
        expected = {name: cases[name](model) for name in names}
        stem_hf.apply(model, KEEP_ALL, dense_layers=(), min_tokens=0)
        for name in names:
            with stem_hf.trace() as seen:
                actual = cases[name](model)
            paths |= set(seen.count())
            if not {"stem", "exact"} & set(seen.count()):
                wrong.append(f"{name}: ran as {dict(seen.count())}")
            if actual.shape != expected[name].shape:
                wrong.append(f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected[name].shape)}")
                continue
            error = (actual - expected[name]).abs().max().item()
            if not error <= (1e-4 if actual.is_floating_point() else 0):
                wrong.append(f"{name}: off by {error:.1e}")
    assert not wrong, "; ".join(wrong)
    assert "stem" in paths
    return paths


@pytest.mark.parametrize("family", FAMILIES)
def test_keep_all_is_the_models_own_attention(family, exactly):
    check_family(family)


@pytest.mark.parametrize("family", COMPILED)
def test_keep_all_is_the_models_own_attention_on_compiled_flex(family):
    check_family(family, {"left padding": CASES["left padding"]})


@pytest.mark.skipif(os.environ.get("STEM_FLEX_DEEP") != "1", reason="STEM_FLEX_DEEP=1 runs it, about an hour")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_case_of_every_family_on_compiled_flex(family):
    check_family(family)


def test_window_and_chunk_layers_are_exact_whatever_stem_keeps(exactly):
    for family, options in (("mistral", {"sliding_window": 24}), ("llama4_text", {"attention_chunk_size": 24})):
        if family == "llama4_text":
            options = {**options, "layer_types": ["chunked_attention"] * 2}
        model = tiny_model(family, **options)
        with torch.no_grad():
            expected = {name: CASES[name](model) for name in ("left padding", "packed", "static cache")}
            stem_hf.apply(model, SPARSE, dense_layers=(), min_tokens=0)
            for name, logits in expected.items():
                with stem_hf.trace() as seen:
                    torch.testing.assert_close(CASES[name](model), logits, atol=1e-4, rtol=0)
                assert "stem" not in seen.count()
                assert "exact" in seen.count()


def test_a_window_that_holds_the_whole_prompt_is_plain_causal(exactly):
    model = stem_hf.apply(tiny_model("mistral", sliding_window=TOKENS), SPARSE, dense_layers=(), min_tokens=0)
    with torch.no_grad(), stem_hf.trace() as seen:
        model(prompt())
    assert seen.count() == {"stem": 2}


def test_an_unrecognised_window_over_a_full_cache_is_exact(exactly):
    # A sliding cache hands on its last keys only; the hole in the padding keeps the window from being recognised.
    model = tiny_model("mistral", sliding_window=24)
    mask = torch.ones(2, 130, dtype=torch.long)
    mask[1, 90:100] = 0
    ids = prompt(tokens=130)

    def second_turn():
        cache = DynamicCache(config=model.config)
        model(ids[:, :90], attention_mask=mask[:, :90], **with_cache(model, cache))
        return model(ids[:, 90:], attention_mask=mask, **with_cache(model, cache)).logits[mask[:, 90:].bool()]

    with torch.no_grad():
        expected = second_turn()
        stem_hf.apply(model, SPARSE, dense_layers=(), min_tokens=0)
        with stem_hf.trace() as seen:
            torch.testing.assert_close(second_turn(), expected, atol=1e-4, rtol=0)
    assert seen.count() == {"exact": 4}
