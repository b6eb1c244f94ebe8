"""Stem on DeepSeek-V3.2's sparse attention in transformers: the model's own where nothing is cut, loops where it is."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import CONFIG_MAPPING, DynamicCache

from stem_flex import StemConfig, reference
from stem_flex.integrations import hf, hf_dsa
from stem_flex.integrations.hf_versions import implementation, with_cache
from stem_flex.reference.refined import dsa_keep
from tests.hf_models import CASES, TOKENS, padded, paths, prompt, tiny_model

if "deepseek_v32" not in CONFIG_MAPPING:
    pytest.skip("transformers has no deepseek_v32 yet", allow_module_level=True)

KEEP = 24
PLAIN = StemConfig(mu=1.0, value_weight=0.0)
STEM = StemConfig(schedule="paper", metric="log", mu=0.5, value_weight=0.7)


def dsa_model():
    """Enough indexer heads that no score is exactly 0, of which the model would choose any."""
    return tiny_model("deepseek_v32", num_key_value_heads=4, index_topk=KEEP, index_head_dim=16, index_n_heads=16)


@pytest.fixture(scope="module")
def own():
    """What the model says without stem_flex."""
    model = dsa_model()
    with torch.no_grad():
        return {name: case(model) for name, case in CASES.items()}


@pytest.fixture
def checked(monkeypatch):
    """Every selection and attention of a prefill is compared with loops over queries and dense attention."""
    calls = []

    def choose(q, k, weights, v, config, **given):
        found = select(q, k, weights, v, config, **given)
        calls.append((q, k, weights, v, config, given, found))
        return found

    def attend(q, k, v, indices, *, scale):
        out = gather(q, k, v, indices, scale=scale)
        dense = torch.zeros(*indices.shape[:2], k.shape[2] + 1, dtype=torch.bool)
        dense.scatter_(-1, torch.where(indices < 0, k.shape[2], indices).long(), True)
        expected, _ = reference.masked_attention(q, k, v, dense[:, None, :, :-1], scale=scale)
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
        return out

    select, gather = hf_dsa.dsa_tokens, hf_dsa.token_attention
    monkeypatch.setattr(hf_dsa, "dsa_tokens", choose)
    monkeypatch.setattr(hf_dsa, "token_attention", attend)
    return calls


@pytest.mark.parametrize("case", CASES)
def test_without_decay_and_magnitude_it_is_the_model(case, own):
    model = hf.refine_dsa(dsa_model(), PLAIN, min_tokens=0)
    with torch.no_grad(), hf.trace() as seen:
        found = CASES[case](model)
    assert seen.count()["tokens"] >= 2
    if found.is_floating_point():
        torch.testing.assert_close(found, own[case], rtol=1e-3, atol=1e-3)
    else:
        assert torch.equal(found, own[case])


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_refined_tokens_are_those_of_loops(side, checked):
    """Every layer's choice, each row's budget by its own length, and the attention under it."""
    model = hf.refine_dsa(dsa_model(), STEM, min_tokens=0)
    mask = None if side is None else padded(side)
    with torch.no_grad():
        model(prompt(), attention_mask=mask, use_cache=False)
    assert len(checked) == 2
    start, end = {None: ([0, 0], [100, 100]), "left": ([0, 37], [100, 100]), "right": ([0, 0], [100, 63])}[side]
    for q, k, weights, v, config, _, found in checked:
        expected = dsa_keep(q, k, weights, v, config, keep=KEEP, start=start, end=end)
        chosen = torch.zeros(2, TOKENS, TOKENS + 1, dtype=torch.bool)
        chosen.scatter_(-1, torch.where(found.indices < 0, TOKENS, found.indices).long(), True)
        assert torch.equal(chosen[..., :-1], expected)
        assert expected.sum() < expected.any(-1).sum() * KEEP * 0.85


def test_chunks_with_the_prompts_length_say_what_one_forward_does():
    model = hf.refine_dsa(dsa_model(), STEM, min_tokens=0)
    ids = prompt()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache, parts = DynamicCache(config=model.config), []
        with hf.prompt_length(TOKENS):
            for chunk in ids.split(40, dim=1):
                parts.append(model(chunk, use_cache=True, **with_cache(model, cache)).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-3, atol=1e-3)


def test_decode_after_a_refined_prefill_is_the_models_own():
    """The prompt is cut, decoding is not: one step over the same cache is what the untouched model says."""
    model = hf.refine_dsa(dsa_model(), STEM, min_tokens=0)
    cache = DynamicCache(config=model.config)
    following = torch.full((2, 1), 7)
    with torch.no_grad():
        model(prompt(), use_cache=True, **with_cache(model, cache))
        same = copy.deepcopy(cache)
        with hf.trace() as seen:
            refined = model(following, use_cache=True, **with_cache(model, cache)).logits
        hf.remove(model)
        untouched = model(following, use_cache=True, **with_cache(model, same)).logits
    assert set(seen.count()) == {"sdpa"}
    torch.testing.assert_close(refined, untouched)


def test_generate_knows_the_prompts_length(checked):
    model = hf.refine_dsa(dsa_model(), STEM, min_tokens=0)
    model.generate(prompt(), max_new_tokens=2, do_sample=False, prefill_chunk_size=48, pad_token_id=0)
    lengths = [given["prompt_len"] for *_, given, _ in checked]
    assert lengths[:2] == [TOKENS] * 2


def test_plain_layers_and_short_prompts_run_the_models_own_selection(checked):
    model = hf.refine_dsa(dsa_model(), STEM, plain_layers=(0,), min_tokens=0)
    with torch.no_grad():
        model(prompt(), use_cache=False)
    assert [config == STEM for *_, config, _, _ in checked] == [False, True]
    short = hf.refine_dsa(dsa_model(), STEM)  # from twice index_topk on
    assert set(paths(short, prompt(tokens=2 * KEEP - 1)).count()) == {"sdpa"}
    assert set(paths(short, prompt(tokens=2 * KEEP)).count()) == {"tokens"}


def test_remove_restores_the_model():
    model = dsa_model()
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    name, want = implementation(model.config), paths_logits(model)
    hf.remove(hf.refine_dsa(hf.refine_dsa(model, STEM, min_tokens=0), STEM, min_tokens=0))
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before
    assert implementation(model.config) == name
    assert not hasattr(model.config, "stem_flex")
    assert torch.equal(paths_logits(model), want)


def paths_logits(model):
    with torch.no_grad():
        return model(prompt(), use_cache=False).logits


def test_a_refined_model_is_pickled_with_its_indexers():
    model = hf.refine_dsa(dsa_model(), STEM, min_tokens=0)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(paths_logits(again), paths_logits(model))
    assert again.model.layers[0].self_attn.indexer.forward.args[0] is again.model.layers[0].self_attn.indexer


def test_other_models_are_refused():
    with pytest.raises(NotImplementedError, match="must be a 'deepseek_v32', got 'llama'"):
        hf.refine_dsa(tiny_model("llama"))
    with pytest.raises(TypeError, match="PreTrainedModel"):
        hf.refine_dsa(torch.nn.Linear(2, 2))
    with pytest.raises(NotImplementedError, match="refine_dsa"):
        hf.apply(dsa_model())


def test_the_name_alone_is_refused():
    model = dsa_model()
    model.set_attn_implementation(hf_dsa.DSA_NAME)
    model.config.stem_flex = {"min_tokens": 0}
    with pytest.raises(TypeError, match=r"needs .*refine_dsa"):
        paths_logits(model)


def test_training_and_weights_are_refused():
    model = hf.refine_dsa(dsa_model(), STEM, min_tokens=0)
    with pytest.raises(NotImplementedError, match="inference"):
        model(prompt(), use_cache=False)
    with pytest.raises(ValueError, match="output_attentions"), torch.no_grad():
        model(prompt(), use_cache=False, output_attentions=True)


def test_ranks_of_tensor_parallelism_are_refused(monkeypatch):
    model = dsa_model()
    monkeypatch.setattr(type(model), "tp_size", 2, raising=False)
    with pytest.raises(NotImplementedError, match="tensor parallelism"):
        hf.refine_dsa(model)
