"""What models' layers select under ``attn_implementation="stem_flex"``, and which path each call takes."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")

from transformers import DynamicCache  # noqa: E402

import stem_flex.integrations.hf as stem_hf  # noqa: E402
from stem_flex import layout, reference, testing  # noqa: E402
from stem_flex.integrations import hf_attention  # noqa: E402
from stem_flex.integrations.hf_masks import StemMask, stem_mask  # noqa: E402
from stem_flex.integrations.hf_patterns import kind_of, recognise  # noqa: E402
from stem_flex.integrations.hf_versions import causal, has_piece, implementation, make, with_cache  # noqa: E402
from tests.hf_models import (  # noqa: E402
    BY_BLOCK,
    CASES,
    KEEP_ALL,
    SIZES,
    SPARSE,
    TOKENS,
    chunks,
    kept,
    packed,
    padded,
    paths,
    prompt,
    tiny_config,
    tiny_model,
)

# -- selection --------------------------------------------------------------------------------------------------------


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


NO_REMAPS = "transformers before 5.23 does not remap the positions of packed prompts"


def remapped(function, positions, ids):
    return make("and", make("packed", ids), make("remapped", function, positions))


@pytest.mark.skipif(not has_piece("remapped"), reason=NO_REMAPS)
def test_remapped_positions_are_packed_only_where_they_count_by_one():
    packed_ids = torch.tensor([[0, 0, 0, 1, 1]])
    for positions, kind in (([7, 8, 9, 0, 1], "packed"), ([0, 1, 3, 0, 1], "general"), ([0, 1, 2, 1, 0], "general")):
        assert kind_of(recognise(remapped(causal, torch.tensor([positions]), packed_ids)), 5) == kind
    assert recognise(make("remapped", causal, packed_ids)) is None


@pytest.mark.skipif(not has_piece("remapped"), reason=NO_REMAPS)
def test_chunks_of_packed_prompts_are_the_mask_functions():
    positions = torch.tensor([[*range(80, 121), *range(33), *range(26)]])
    ids = torch.tensor([[0] * 41 + [1] * 33 + [2] * 26])
    for chunk in (24, TOKENS):  # the first sequence crosses into a second chunk also where chunks hold the prompt
        chunks_of = make("and", make("chunk", chunk, torch.zeros(1, dtype=torch.long)), causal)
        function = remapped(chunks_of, positions, ids)
        config = tiny_config("llama")
        config.stem_flex = {"min_tokens": 0}
        mask = stem_mask(1, TOKENS, TOKENS, mask_function=function, config=config, device=torch.device("cpu"))
        assert mask.kind == "local"
        q, kv = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)
        expected = function(torch.tensor(0), torch.tensor(0), q, kv)
        shown = reference.token_mask(mask.layout.inner, 1, 1, TOKENS, TOKENS)[0, 0]
        assert torch.equal(shown, expected)


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
    assert paths(llama, prompt(tokens=150), **with_cache(llama, cache)).count() == {"stem": 2}
    assert paths(llama, prompt(tokens=99), **with_cache(llama, cache)).count() == {"sdpa": 2}
    assert paths(llama, prompt(tokens=1), **with_cache(llama, cache)).count() == {"sdpa": 2}
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
            **with_cache(create_causal_mask, None),
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


@pytest.mark.skipif(not has_piece("blockwise"), reason="this transformers has no such overlay")
def test_image_overlays_without_images_are_causal():
    def pattern(ids):
        return recognise(make("or", causal, make("blockwise", torch.tensor([ids]))))

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
    before = implementation(model.config.vision_config)
    stem_hf.apply(model, SPARSE, dense_layers=(), min_tokens=0)
    assert implementation(model.config.text_config) == "stem_flex"
    assert implementation(model.config.vision_config) == before
    assert model.config.text_config.stem_flex["min_tokens"] == 0
    assert paths(model, prompt()).count() == {"stem": 2}
    stem_hf.remove(model)
    assert paths(model, prompt()).count() == {}
