"""transformers models under ``attn_implementation="stem_flex"``.

Selection and routing are checked through :func:`hf_models.dense_sparse_prefill`, which evaluates block lists and
mask_mod exactly as compiled flex_attention does; a few families run on the compiled one. STEM_FLEX_DEEP=1 runs all
families on it (8 s a signature).
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import io
import json
import os
import pickle
import types
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")

from transformers import AutoModelForCausalLM, DynamicCache, StaticCache, masking_utils  # noqa: E402

import stem_flex.integrations.hf as stem_hf  # noqa: E402
from stem_flex import StemConfig, layout, reference, testing  # noqa: E402
from stem_flex.integrations import hf_attention  # noqa: E402
from stem_flex.integrations.hf_masks import StemMask, prompt_tokens, stem_mask  # noqa: E402
from stem_flex.integrations.hf_patterns import kind_of, recognise  # noqa: E402
from tests.hf_models import SIZES, dense_sparse_prefill, skip_if_old, tiny_config, tiny_model  # noqa: E402

TOKENS = 100
KEEP_ALL = StemConfig(schedule="fixed", k_start=1.0, block_size=32)
SPARSE = StemConfig(schedule="fixed", k_start=1, block_size=16, stride=4, sink_blocks=1, local_blocks=1)

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


@pytest.fixture
def exactly(monkeypatch):
    """Evaluate block lists and mask_mod token by token, instead of compiling flex_attention."""
    monkeypatch.setattr(hf_attention, "sparse_prefill", dense_sparse_prefill)


@pytest.fixture
def llama():
    return tiny_model("llama")


def prompt(batch=2, tokens=TOKENS, seed=0):
    return torch.randint(2, 60, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def padded(side):
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, slice(0, 37) if side == "left" else slice(63, None)] = 0
    return mask


# -- cases: each gives what the model says, for its own attention and for stem_flex ---------------------------------


def padded_forward(side, model):
    mask = padded(side)
    return model(prompt(), attention_mask=mask, use_cache=False).logits[mask.bool()]


def packed(model):
    positions = torch.cat([torch.arange(41), torch.arange(33), torch.arange(26)])[None].expand(2, -1)
    return model(prompt(), position_ids=positions, use_cache=False).logits


def chunks(kind, model):
    text = model.config.get_text_config()
    cache = DynamicCache(config=text) if kind == "dynamic" else StaticCache(config=text, max_cache_len=160)
    ids, mask, logits = prompt(), padded("left"), []
    for start, end in ((0, 60), (60, 95), (95, 96), (96, TOKENS)):
        seen = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        logits.append(seen.logits)
    return torch.cat(logits, 1)[mask.bool()]


def generated(model, **options):
    return model.generate(
        prompt(), attention_mask=padded("left"), max_new_tokens=4, do_sample=False, pad_token_id=0, **options
    )


CASES = {
    "left padding": functools.partial(padded_forward, "left"),
    "right padding": functools.partial(padded_forward, "right"),
    "packed": packed,
    "dynamic cache": functools.partial(chunks, "dynamic"),
    "static cache": functools.partial(chunks, "static"),
    "generate": generated,
    "chunked generate": functools.partial(generated, prefill_chunk_size=48),
}
# What transformers itself does not run: this family's cache is one of its own.
UNSERVED = {"minimax": ("dynamic cache", "static cache", "chunked generate")}


def own_attention(model):
    """The attention that is the model: sdpa drops a softcap without a word, eager applies it."""
    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")
    return model


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
        model(ids[:, :90], attention_mask=mask[:, :90], past_key_values=cache)
        return model(ids[:, 90:], attention_mask=mask, past_key_values=cache).logits[mask[:, 90:].bool()]

    with torch.no_grad():
        expected = second_turn()
        stem_hf.apply(model, SPARSE, dense_layers=(), min_tokens=0)
        with stem_hf.trace() as seen:
            torch.testing.assert_close(second_turn(), expected, atol=1e-4, rtol=0)
    assert seen.count() == {"exact": 4}


# -- selection --------------------------------------------------------------------------------------------------------


@pytest.fixture
def selections(monkeypatch):
    """Every call of stem_block_mask: (q, k, v, keywords, BlockMask)."""
    calls = []
    build = hf_attention.stem_block_mask

    def spy(q, k, v, config, **keywords):
        mask = build(q, k, v, config, **keywords)
        calls.append((q, k, v, keywords, mask))
        return mask

    monkeypatch.setattr(hf_attention, "stem_block_mask", spy)
    return calls


def kept(mask):
    partial, full = reference.dense_blocks(mask)
    return partial | full


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3"])
def test_sparse_prefill_selects_what_the_reference_does(family, exactly, selections):
    model = stem_hf.apply(tiny_model(family), SPARSE, dense_layers=(), min_tokens=0)
    lengths = torch.tensor([TOKENS, TOKENS - 37])
    with torch.no_grad():
        model(prompt(), attention_mask=padded("left"), use_cache=False)
    assert len(selections) == 2
    for q, k, v, _, mask in selections:
        expected = reference.block_keep(q, k, v, SPARSE, layout=layout.padding(lengths, side="left"))
        assert torch.equal(kept(mask), expected)
        assert not expected.all(), "nothing was left out, so nothing was tested"
        testing.assert_valid_block_mask(mask)


def test_packed_prompts_select_within_their_document(exactly, selections):
    model = stem_hf.apply(tiny_model("llama"), SPARSE, dense_layers=(), min_tokens=0)
    with torch.no_grad(), stem_hf.trace() as seen:
        packed(model)
    assert seen.count() == {"stem": 2}
    for q, k, v, _, mask in selections:
        expected = reference.block_keep(q, k, v, SPARSE, layout=layout.documents([0, 41, 74, 100]))
        assert torch.equal(kept(mask), expected)


REMAPS = hasattr(masking_utils, "remap_positions_for_packed_sequence")


@pytest.mark.skipif(not REMAPS, reason="transformers before 5.23 does not remap the positions of packed prompts")
def test_remapped_positions_are_packed_only_where_they_count_by_one():
    packed_ids = torch.tensor([[0, 0, 0, 1, 1]])
    for positions, kind in (([7, 8, 9, 0, 1], "packed"), ([0, 1, 3, 0, 1], "general"), ([0, 1, 2, 1, 0], "general")):
        remapped = masking_utils.packed_sequence_compatibility_function(
            masking_utils.causal_mask_function, torch.tensor([positions]), packed_ids
        )
        assert kind_of(recognise(remapped), 5) == kind
    remapped = masking_utils.remap_positions_for_packed_sequence(masking_utils.causal_mask_function, packed_ids)
    assert recognise(remapped) is None


@pytest.mark.skipif(not REMAPS, reason="transformers before 5.23 does not remap the positions of packed prompts")
def test_chunks_of_packed_prompts_are_the_mask_functions():
    positions = torch.tensor([[*range(80, 121), *range(33), *range(26)]])
    ids = masking_utils.find_packed_sequence_indices(positions)
    for chunk in (24, TOKENS):  # the first sequence crosses into a second chunk also where chunks hold the prompt
        function = masking_utils.packed_sequence_compatibility_function(
            masking_utils.chunked_causal_mask_function(chunk, torch.zeros(1, dtype=torch.long)), positions, ids
        )
        config = tiny_config("llama")
        config.stem_flex = {"min_tokens": 0}
        mask = stem_mask(1, TOKENS, TOKENS, mask_function=function, config=config, device=torch.device("cpu"))
        assert mask.kind == "local"
        q, kv = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)
        expected = function(torch.tensor(0), torch.tensor(0), q, kv)
        shown = reference.token_mask(mask.layout.inner, 1, 1, TOKENS, TOKENS)[0, 0]
        assert torch.equal(shown, expected)


BY_BLOCK = StemConfig(
    metric="log", block_size=16, stride=4, schedule="fixed", k_start=0.5, sink_blocks=0, local_blocks=0
)


@pytest.mark.parametrize("static", [False, True])
def test_chunked_generate_spends_what_one_forward_does(static, llama, exactly, selections):
    # "log" scores of a block depend on no other block, so equal budgets mean equal blocks.
    stem_hf.apply(llama, BY_BLOCK, dense_layers=(), min_tokens=0)
    options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    if static:
        options["cache_implementation"] = "static"
    ids, mask = prompt(tokens=96), torch.ones(2, 96, dtype=torch.long)
    mask[1, :32] = 0
    llama.generate(ids, attention_mask=mask, **options)
    whole = [kept(call[-1]) for call in selections]
    selections.clear()
    llama.generate(ids, attention_mask=mask, prefill_chunk_size=48, **options)
    assert len(selections) == 4
    for layer in range(2):
        first, second = (kept(selections[layer + 2 * chunk][-1]) for chunk in (0, 1))
        blocks = first.shape[-1]
        assert torch.equal(first, whole[layer][:, :, :3, :blocks])
        assert torch.equal(second[..., :6], whole[layer][:, :, 3:, :6])


def test_prompt_length_is_what_budgets_go_by_and_else_what_was_seen(llama, exactly, selections):
    stem_hf.apply(llama, BY_BLOCK, dense_layers=(), min_tokens=0)
    ids = prompt(tokens=96)
    with torch.no_grad():
        llama(ids[:, :48])
        with stem_hf.prompt_length(96):
            llama(ids[:, :48])
    alone, part = selections[0], selections[2]
    for (q, k, v, *_, mask), length in ((alone, 48), (part, 96)):
        assert torch.equal(kept(mask), reference.block_keep(q, k, v, BY_BLOCK, prompt_len=length))
    assert kept(part[-1]).sum() > kept(alone[-1]).sum()


def test_decoder_prompts_of_encoder_decoders_have_their_own_length(exactly, monkeypatch):
    sizes = {**SIZES, "sliding_window": 24, "layer_types": ["full_attention"] * 2, "query_pre_attn_scalar": 16}
    known = {key: value for key, value in sizes.items() if hasattr(transformers.T5GemmaModuleConfig, key)}
    config = transformers.T5GemmaConfig(encoder=dict(known), decoder=dict(known), vocab_size=64)
    model = transformers.T5GemmaForConditionalGeneration(config).eval()
    stem_hf.apply(model, KEEP_ALL, dense_layers=(), min_tokens=0)
    lengths = []
    monkeypatch.setattr(
        hf_attention, "_selected", lambda *args: lengths.append(args[-1].prompt_len) or hf_attention._exact(args[-1])
    )
    options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    model.generate(input_ids=prompt(), decoder_input_ids=prompt(tokens=60), **options)
    assert lengths == [None, None]


def test_static_caches_live_counter_does_not_move_the_mask(llama, exactly):
    stem_hf.apply(llama, KEEP_ALL, dense_layers=(), min_tokens=0)
    counter = torch.tensor(40)
    mask = stem_mask(1, 20, 160, q_offset=counter, config=llama.config, device=torch.device("cpu"))
    assert isinstance(mask, StemMask)
    counter.add_(20)
    assert mask.offset.tolist() == [40]
    assert mask.kv_len.tolist() == [60]


def test_layers_of_a_forward_share_one_binding(llama, exactly, selections):
    stem_hf.apply(llama, SPARSE, dense_layers=(), min_tokens=0)
    with torch.no_grad():
        chunks("static", llama)
        llama(prompt(), attention_mask=padded("left"))
    for first, second in zip(selections[::2], selections[1::2], strict=True):
        assert first[-1].structure is second[-1].structure


# -- routing ----------------------------------------------------------------------------------------------------------


def paths(model, *args, **kwargs):
    with torch.no_grad(), stem_hf.trace() as seen:
        model(*args, **kwargs)
    return seen


def test_dense_layers_stay_exact(exactly):
    model = tiny_model("llama", num_hidden_layers=4)
    for given, dense in (((0, 1), [0, 1]), ((-1,), [3]), (lambda layer: layer % 2 == 1, [1, 3]), ((), [])):
        stem_hf.apply(model, SPARSE, dense_layers=given, min_tokens=0)
        seen = paths(model, prompt())
        assert seen.layers("dense") == dense
        assert seen.layers("stem") == [layer for layer in range(4) if layer not in dense]
    padded_prompt = torch.ones(2, TOKENS, dtype=torch.long)
    padded_prompt[0, :5] = 0
    stem_hf.apply(model, SPARSE, dense_layers=(1,), min_tokens=0)
    assert paths(model, prompt(), attention_mask=padded_prompt).layers("exact") == [1]
    with pytest.raises(ValueError, match="dense_layers must be layers of the model, 0 to 3, got"):
        stem_hf.apply(model, dense_layers=[4])


def test_short_prompts_tiny_chunks_and_decode_run_as_before(llama, exactly):
    stem_hf.apply(llama, SPARSE, dense_layers=(), min_tokens=TOKENS)
    assert paths(llama, prompt()).count() == {"stem": 2}
    assert paths(llama, prompt(tokens=TOKENS - 1)).count() == {"sdpa": 2}
    cache = DynamicCache(config=llama.config)
    assert paths(llama, prompt(tokens=150), past_key_values=cache).count() == {"stem": 2}
    assert paths(llama, prompt(tokens=99), past_key_values=cache).count() == {"sdpa": 2}
    assert paths(llama, prompt(tokens=1), past_key_values=cache).count() == {"sdpa": 2}
    stem_hf.apply(llama, SPARSE, dense_layers=())
    assert paths(llama, prompt()).count() == {"sdpa": 2}


@pytest.mark.parametrize("family", ["llama", "llama4_text"])
def test_inference_mode_serves_every_case(family, exactly):
    model = tiny_model(family)
    with torch.no_grad():
        expected = {name: case(model) for name, case in CASES.items()}
    stem_hf.apply(model, KEEP_ALL, dense_layers=(), min_tokens=0)
    with torch.inference_mode():
        for name, logits in expected.items():
            torch.testing.assert_close(CASES[name](model), logits, atol=1e-4, rtol=0)


def test_holes_in_a_padding_mask_are_exact(llama, exactly):
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[0, 40:50] = 0
    with torch.no_grad():
        expected = llama(prompt(), attention_mask=mask).logits
        stem_hf.apply(llama, SPARSE, dense_layers=(), min_tokens=0)
        with stem_hf.trace() as seen:
            actual = llama(prompt(), attention_mask=mask).logits
    assert seen.count() == {"exact": 2}
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=0)


def test_an_unknown_mask_function_is_exact(llama, exactly):
    from transformers.masking_utils import create_causal_mask

    def image_tokens(b, h, q, kv):
        return (q >= 20) & (q < 50) & (kv >= 20) & (kv < 50)

    ids = prompt()

    def run():
        mask = create_causal_mask(
            config=llama.config,
            inputs_embeds=llama.model.embed_tokens(ids),
            attention_mask=None,
            past_key_values=None,
            or_mask_function=image_tokens,
        )
        return mask, llama(ids, attention_mask=mask).logits

    with torch.no_grad():
        _, expected = run()
        stem_hf.apply(llama, SPARSE, dense_layers=(), min_tokens=0)
        with stem_hf.trace() as seen:
            mask, actual = run()
    assert mask.kind == "general"
    assert seen.count() == {"exact": 2}
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_a_ready_made_mask_tensor_runs_dense_and_says_so(llama, exactly):
    stem_hf.apply(llama, SPARSE, dense_layers=(), min_tokens=0)
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()[None, None].expand(2, 1, -1, -1)
    hf_attention._warned.clear()
    with pytest.warns(UserWarning, match="LlamaAttention got a ready-made 4-D mask"):
        assert paths(llama, prompt(), attention_mask=causal).count() == {"sdpa": 2}


def test_no_mask_where_the_model_makes_none_says_what_to_pass(llama, exactly):
    stem_hf.apply(llama, SPARSE, dense_layers=(), min_tokens=0)
    q = torch.zeros(1, 4, 50, 16)
    hf_attention._warned.clear()
    with pytest.warns(UserWarning, match="got no mask .* pass a 2-D attention_mask, for this model makes a mask only"):
        hf_attention.stem_attention_forward(llama.model.layers[0].self_attn, q, q[:, :2], q[:, :2], None)


@pytest.mark.skipif(not hasattr(masking_utils, "blockwise_overlay"), reason="this transformers has no such overlay")
def test_image_overlays_without_images_are_causal():
    def pattern(ids):
        overlay = masking_utils.blockwise_overlay(torch.tensor([ids]))
        return recognise(masking_utils.or_masks(masking_utils.causal_mask_function, overlay))

    assert kind_of(pattern([-1, -1, -1]), 3) == "causal"
    assert pattern([-1, 0, 0]) is None


def test_bidirectional_models_run_as_before(exactly):
    model = tiny_model("llama")
    model.config.is_causal = False
    with torch.no_grad():
        expected = model(prompt()).logits
    stem_hf.apply(model, SPARSE, dense_layers=(), min_tokens=0)
    with torch.no_grad(), stem_hf.trace() as seen:
        torch.testing.assert_close(model(prompt()).logits, expected)
    assert "stem" not in seen.count()


def test_composite_models_switch_their_text_model_only(exactly):
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(vision_config=vision, text_config=tiny_config("llama"), image_token_index=63)
    model = LlavaForConditionalGeneration(config).eval()
    before = model.config.vision_config._attn_implementation
    stem_hf.apply(model, SPARSE, dense_layers=(), min_tokens=0)
    assert model.config.text_config._attn_implementation == "stem_flex"
    assert model.config.vision_config._attn_implementation == before
    assert model.config.text_config.stem_flex["min_tokens"] == 0
    assert paths(model, prompt()).count() == {"stem": 2}
    stem_hf.remove(model)
    assert paths(model, prompt()).count() == {}


# -- registration, settings, state ------------------------------------------------------------------------------------


def test_the_name_alone_works_without_apply(llama, exactly):
    with torch.no_grad():
        expected = generated(llama)
        llama.set_attn_implementation("stem_flex")
        assert torch.equal(generated(llama), expected)
        llama.config.stem_flex = {"min_tokens": 0, "dense_layers": [1]}
        seen = paths(llama, prompt())
    assert (seen.layers("stem"), seen.layers("dense")) == ([0], [1])


def test_settings_survive_saving(llama, exactly, tmp_path):
    config = StemConfig(block_size=(16, 32), stride=4, schedule="fixed", k_start=2, mu=0.5)
    stem_hf.apply(llama, config, dense_layers=(1,), min_tokens=7)
    llama.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="stem_flex").eval()
    mask = stem_mask(1, 50, 50, config=loaded.config, device=torch.device("cpu"))
    assert mask.settings.config == config
    assert (mask.settings.dense_layers, mask.settings.min_tokens) == ((1,), 7)
    assert paths(loaded, prompt()).layers("dense") == [1]


def test_unknown_settings_are_refused(llama):
    llama.set_attn_implementation("stem_flex")
    llama.config.stem_flex = {"min_token": 0, "min_tokens": 0}
    with pytest.raises(ValueError, match=r"config.stem_flex has unknown settings \['min_token'\]"):
        llama(prompt())


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"foo": 1}, ValueError, r"config.stem_flex has unknown settings \['foo'\]"),
        ({"config": {"block": 1}}, ValueError, r"config.stem_flex\['config'\] has unknown settings \['block'\]"),
        ({"config": [1]}, TypeError, r"config.stem_flex\['config'\] must be a dict, got \[1\]"),
        ("abc", TypeError, "config.stem_flex must be a dict, got 'abc'"),
        ({"min_tokens": "a"}, TypeError, "min_tokens must be an int, got 'a'"),
        ({"dense_layers": 3}, TypeError, "dense_layers must be layer numbers"),
        ({"dense_layers": [-3]}, ValueError, r"counts from the end in \[-3\], but the model has 2"),
    ],
)
def test_settings_are_checked_also_where_nothing_is_sparse(settings, error, match, llama):
    llama.set_attn_implementation("stem_flex")
    llama.config.stem_flex = {}
    llama(prompt(tokens=9))
    llama.config.stem_flex = settings
    with pytest.raises(error, match=match):
        llama(prompt(tokens=9))


def test_negative_dense_layers_in_settings_count_from_the_end(llama, exactly):
    llama.set_attn_implementation("stem_flex")
    llama.config.stem_flex = {"min_tokens": 0, "dense_layers": [-1]}
    assert paths(llama, prompt()).layers("dense") == [1]
    llama.config.stem_flex["dense_layers"] = [-2]  # settings changed in place are read again
    assert paths(llama, prompt()).layers("dense") == [0]


def test_remove_leaves_the_model_as_it_was(llama, exactly):
    before, attributes = llama.config.to_dict(), set(llama.__dict__)
    modules = {name: set(module.__dict__) for name, module in llama.named_modules()}
    stem_hf.apply(llama, SPARSE)
    stem_hf.apply(llama, KEEP_ALL)  # again: the first application must not count as "before"
    stem_hf.remove(llama)
    assert llama.config.to_dict() == before
    assert llama.config._attn_implementation == "sdpa"
    assert set(llama.__dict__) == attributes
    assert {name: set(module.__dict__) for name, module in llama.named_modules()} == modules
    with pytest.raises(ValueError, match="must have been prepared by"):
        stem_hf.remove(llama)


def test_a_copied_model_is_its_own(llama, exactly, selections):
    stem_hf.apply(llama, SPARSE, dense_layers=(), min_tokens=0)
    twin = copy.deepcopy(llama)
    stem_hf.remove(llama)
    assert paths(llama, prompt()).count() == {}
    twin.generate(prompt(), max_new_tokens=1, do_sample=False, pad_token_id=0)
    assert len(selections) == 2


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("trip", [lambda model: pickle.loads(pickle.dumps(model)), saved, copy.deepcopy])
def test_a_round_trip_keeps_what_generate_knows(trip, llama, exactly, selections):
    stem_hf.apply(llama, BY_BLOCK, dense_layers=(), min_tokens=0)
    options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0, "prefill_chunk_size": 48}
    llama.generate(prompt(tokens=96), **options)
    expected = [kept(call[-1]) for call in selections]
    selections.clear()
    back = trip(llama)
    assert back.generate.args[0] is back
    back.generate(prompt(tokens=96), **options)
    assert all(torch.equal(kept(call[-1]), mask) for call, mask in zip(selections, expected, strict=True))
    stem_hf.remove(back)
    assert "generate" not in back.__dict__


def test_a_models_own_generate_is_used_and_given_back(llama, exactly):
    calls = []

    def generate(self, *args, **kwargs):
        calls.append(prompt_tokens.get())
        return type(self).generate(self, *args, **kwargs)

    own = llama.generate = types.MethodType(generate, llama)
    stem_hf.apply(llama, KEEP_ALL)
    stem_hf.apply(llama, KEEP_ALL, min_tokens=0)
    llama.generate(prompt(), max_new_tokens=1, do_sample=False, pad_token_id=0)
    assert calls == [TOKENS]
    stem_hf.remove(llama)
    assert llama.__dict__["generate"] is own
    stem_hf.apply(llama, KEEP_ALL)
    later = llama.generate = types.MethodType(generate, llama)
    stem_hf.remove(llama)
    assert llama.__dict__["generate"] is later


@pytest.mark.parametrize("name", ["", "my_flash", "sdpa_stem", "flex_attention2", "a/b", "paged|stem"])
def test_names_that_transformers_reads_otherwise_are_refused(name):
    with pytest.raises(ValueError, match="name must not be empty or contain"):
        stem_hf.register(name)


def test_old_transformers_are_refused(monkeypatch):
    monkeypatch.setattr(stem_hf.importlib.metadata, "version", lambda _: "5.4.1")
    with pytest.raises(ImportError, match=r"needs transformers 5\.5 or newer, got 5\.4\.1"):
        stem_hf.register()


def test_devices_get_their_own_mask_once(llama):
    stem_hf.apply(llama, SPARSE, dense_layers=(), min_tokens=0)
    padding = padded("left").bool()
    mask = stem_mask(2, TOKENS, TOKENS, attention_mask=padding, config=llama.config, device=torch.device("cpu"))
    assert mask.to("cpu") is mask
    assert mask.to(torch.device("cpu")).start is mask.start


# -- torch.compile ----------------------------------------------------------------------------------------------------


def test_compiled_models_prefill_sparse_and_decode_in_one_graph(exactly):
    model = tiny_model("llama", num_hidden_layers=1)
    mask, cache = padded("left"), DynamicCache(config=model.config)
    with torch.no_grad():
        expected = model(prompt(), attention_mask=mask).logits
        stem_hf.apply(model, KEEP_ALL, dense_layers=(), min_tokens=0)
        compiled = torch.compile(model, backend="eager")
        with stem_hf.trace() as seen:
            actual = compiled(prompt(), attention_mask=mask, past_key_values=cache).logits
        assert seen.count() == {"stem": 1}
        torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=0)
        one = prompt(tokens=1, seed=1)
        expected = model(one, past_key_values=copy.deepcopy(cache)).logits
        decode = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(decode(one, past_key_values=cache).logits, expected, atol=1e-5, rtol=0)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bloom", "falcon", "gptj", "codegen", "mpt"])
def test_models_without_the_attention_interface_are_refused(family):
    with pytest.raises(TypeError, match="does not use transformers' attention interface"):
        stem_hf.apply(tiny_model(family))


@pytest.mark.parametrize("family", ["bloom", "codegen", "xglm"])
@pytest.mark.parametrize("min_tokens", [0, 8192])
def test_the_name_alone_is_refused_without_the_attention_interface(family, min_tokens):
    options = {"d_model": 64, "attention_heads": 4, "ffn_dim": 64, "num_layers": 2} if family == "xglm" else {}
    config = tiny_config(family, **({"rotary_dim": 8} if family == "codegen" else options))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="stem_flex").eval()
    model.config.stem_flex = {"min_tokens": min_tokens}
    with pytest.raises(TypeError, match="does not use transformers' attention interface"):
        model(prompt())


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa", "minimax_m3_vl_text"])
def test_models_that_select_their_own_keys_are_refused(family):
    model = tiny_model(family)
    with pytest.raises(NotImplementedError, match="the model selects its own keys"):
        stem_hf.apply(model)
    model.set_attn_implementation("stem_flex")
    with pytest.raises(NotImplementedError, match="the model selects its own keys"):
        model(prompt())


def test_models_that_compute_with_their_mask_are_told(exactly):
    model = stem_hf.apply(tiny_model("doge"), SPARSE, min_tokens=0)
    with pytest.raises(AttributeError, match="takes its attention mask for a tensor"), torch.no_grad():
        model(prompt())
    mask = stem_mask(1, 50, 50, config=model.config, device=torch.device("cpu"))
    with pytest.raises(TypeError, match="computes with its attention mask"):
        mask[:, :, :, :10]


def test_position_biases_are_refused(exactly):
    model = stem_hf.apply(tiny_model("inkling_text"), SPARSE, min_tokens=0)
    with pytest.raises(ValueError, match="does not serve attention with position_bias"), torch.no_grad():
        model(prompt())


def test_attention_weights_are_refused(llama):
    stem_hf.apply(llama, SPARSE, min_tokens=0)
    with pytest.raises(ValueError, match="output_attentions=True needs attention weights"):
        llama(prompt(), output_attentions=True)


def test_dropout_and_backward_are_refused(exactly):
    model = stem_hf.apply(tiny_model("llama", attention_dropout=0.1), KEEP_ALL, min_tokens=0)
    with pytest.raises(ValueError, match=r"dropout must be 0 in a stem_flex prefill, got 0\.1"):
        model.train()(prompt())
    loss = model.eval()(prompt()).logits.sum()
    with pytest.raises(NotImplementedError, match="no backward pass"):
        loss.backward()


@pytest.mark.parametrize("learned", ["q_proj", "k_proj", "v_proj"])
def test_backward_is_refused_whichever_input_learns(learned, exactly):
    model = stem_hf.apply(tiny_model("llama", num_hidden_layers=1), KEEP_ALL, dense_layers=(), min_tokens=0)
    model.requires_grad_(False)
    getattr(model.model.layers[0].self_attn, learned).requires_grad_(True)
    with pytest.raises(NotImplementedError, match="no backward pass"):
        model(prompt()).logits.sum().backward()


def test_backward_is_refused_where_only_the_sinks_learn(exactly):
    model = tiny_model("gpt_oss", num_hidden_layers=1, layer_types=["full_attention"])
    stem_hf.apply(model, KEEP_ALL, dense_layers=(), min_tokens=0).requires_grad_(False)
    model.model.layers[0].self_attn.sinks.requires_grad_(True)
    with pytest.raises(NotImplementedError, match="no backward pass"):
        model(prompt()).logits.sum().backward()


def test_keys_that_change_after_the_mask_was_made_are_refused(llama):
    stem_hf.apply(llama, SPARSE, min_tokens=0)
    mask = stem_mask(1, 50, 50, config=llama.config, device=torch.device("cpu"))
    q, k = torch.zeros(1, 4, 50, 16), torch.zeros(1, 2, 53, 16)
    with pytest.raises(ValueError, match="50 queries and 50 keys, got 1, 50 and 53"):
        hf_attention.stem_attention_forward(llama.model.layers[0].self_attn, q, k, k, mask)


def test_apply_takes_models_and_known_names_only(llama):
    with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel, got int"):
        stem_hf.apply(3)
    with pytest.raises(ValueError, match="name must be registered, got 'nobody'"):
        stem_hf.apply(llama, name="nobody")
    with pytest.raises(ValueError, match="min_tokens must be 0 or more, got -1"):
        stem_hf.apply(llama, min_tokens=-1)
    assert llama.config._attn_implementation == "sdpa"


REFUSED = [
    ({"config": "x"}, TypeError, "config must be a StemConfig or None, got 'x'"),
    ({"config": ""}, TypeError, "config must be a StemConfig or None, got ''"),
    ({"dense_layers": 3}, TypeError, "dense_layers must be layer numbers, .* got 3"),
    ({"dense_layers": None}, TypeError, "dense_layers must be layer numbers, .* got None"),
    ({"dense_layers": ("a",)}, TypeError, r"dense_layers must be layer numbers, .* got \('a',\)"),
    ({"dense_layers": (True,)}, TypeError, "dense_layers must be layer numbers"),
    ({"dense_layers": (7,)}, ValueError, "dense_layers must be layers of the model, 0 to 1"),
    ({"min_tokens": 1.5}, TypeError, "min_tokens must be an int, got 1.5"),
    ({"min_tokens": -1}, ValueError, "min_tokens must be 0 or more, got -1"),
]


@pytest.mark.parametrize(("options", "error", "match"), REFUSED)
def test_a_refused_apply_changes_nothing(options, error, match, llama):
    def state():
        modules = [dict(module.__dict__) for module in llama.modules() if hasattr(module, "layer_idx")]
        shown = [{key: value for key, value in module.items() if key == hf_attention.MODE} for module in modules]
        return llama.config.to_dict(), llama.config._attn_implementation, set(llama.__dict__), shown

    before = state()
    with pytest.raises(error, match=match):
        stem_hf.apply(llama, **options)
    assert state() == before
    with pytest.raises(ValueError, match="must have been prepared by"):
        stem_hf.remove(llama)
    stem_hf.apply(llama, SPARSE, dense_layers=(1,))
    applied = state()
    with pytest.raises(error, match=match):
        stem_hf.apply(llama, **options)
    assert state() == applied
    stem_hf.remove(llama)
    assert state() == before


# -- the example and the benchmark ------------------------------------------------------------------------------------


def test_the_example_runs(exactly, capsys):
    path = Path(__file__).resolve().parent.parent / "examples" / "hf_generate.py"
    spec = importlib.util.spec_from_file_location("example_hf_generate", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(["--new-tokens", "3"])
    assert "stem in layers [1], dense in [0]" in capsys.readouterr().out


def test_the_benchmark_measures_and_survives_a_failing_cell(exactly, monkeypatch, tmp_path):
    ttft = pytest.importorskip("bench.ttft", reason="the benchmarks are not in this checkout")
    monkeypatch.setattr(ttft, "_fa2", lambda *args, **kwargs: 1 / 0)
    arguments = "--smoke --device cpu --dtype fp32 --models qwen3 --lengths 256 --dense-layers 0 --out"
    rows = ttft.main([*arguments.split(), str(tmp_path)])
    assert rows[0]["sdpa"]["error"] == "ZeroDivisionError: division by zero"
    cell = rows[0]["stem"]
    assert cell["paths"] == {"dense": 1, "stem": 2}
    assert min(cell["attention_ms"], cell["mask_ms"], cell["rest_ms"]) > 0
    saved = json.loads((tmp_path / "ttft.json").read_text())
    assert saved["rows"][0]["stem"]["ms"]["median"] == cell["ms"].median
    assert "| qwen3 | 256 | error |" in (tmp_path / "ttft.md").read_text()
