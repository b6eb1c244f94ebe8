"""apply, remove and settings of the transformers integration: state, copies, refusals, examples."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import pickle
import types
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")

from transformers import AutoModelForCausalLM, DynamicCache  # noqa: E402

import stem_flex.integrations.hf as stem_hf  # noqa: E402
from stem_flex import StemConfig  # noqa: E402
from stem_flex.integrations import hf_attention, hf_versions  # noqa: E402
from stem_flex.integrations.hf_masks import current_prompt, stem_mask  # noqa: E402
from stem_flex.integrations.hf_versions import has_interface, implementation, with_cache  # noqa: E402
from tests.hf_models import (  # noqa: E402
    BY_BLOCK,
    KEEP_ALL,
    SPARSE,
    TOKENS,
    generated,
    kept,
    padded,
    paths,
    prompt,
    tiny_config,
    tiny_model,
)
from tests.own_attention.configuration_own import OwnConfig  # noqa: E402
from tests.own_attention.modeling_own import OwnModel  # noqa: E402


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
    assert implementation(llama.config) == "sdpa"
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
        calls.append(current_prompt.get().tokens)
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
    monkeypatch.setattr(hf_versions, "version", lambda: "5.4.1")
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
            actual = compiled(prompt(), attention_mask=mask, **with_cache(model, cache)).logits
        assert seen.count() == {"stem": 1}
        torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=0)
        one = prompt(tokens=1, seed=1)
        expected = model(one, **with_cache(model, copy.deepcopy(cache))).logits
        decode = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(decode(one, **with_cache(model, cache)).logits, expected, atol=1e-5, rtol=0)


# -- refusals ---------------------------------------------------------------------------------------------------------


# Some of these have had the interface since 5.24, and others will: what they do is asked of the models.
MAYBE_WITHOUT = ["bloom", "falcon", "gptj", "codegen", "mpt", "xglm"]
SMALLER = {
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "xglm": {"d_model": 64, "attention_heads": 4, "ffn_dim": 64, "num_layers": 2},
}
NO_INTERFACE = "does not use transformers' attention interface"


@pytest.mark.parametrize("family", MAYBE_WITHOUT)
def test_a_model_is_served_if_it_has_the_attention_interface_and_refused_if_not(family, exactly):
    model = tiny_model(family, **SMALLER.get(family, {}))
    if not has_interface(type(model)):
        with pytest.raises(TypeError, match=NO_INTERFACE):
            stem_hf.apply(model)
        return
    mask = padded("left")
    with torch.no_grad():
        expected = model(prompt(), attention_mask=mask).logits[mask.bool()]
        stem_hf.apply(model, KEEP_ALL, dense_layers=(), min_tokens=0)
        with stem_hf.trace() as seen:
            actual = model(prompt(), attention_mask=mask).logits[mask.bool()]
    assert seen.count() == {"stem": 2}
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["bloom", "codegen", "xglm"])  # the others do not take the name, or ask for no mask
@pytest.mark.parametrize("min_tokens", [0, 8192])
def test_the_name_alone_is_refused_without_the_attention_interface(family, min_tokens):
    config = tiny_config(family, **SMALLER.get(family, {}))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="stem_flex").eval()
    if has_interface(type(model)):
        pytest.skip(f"transformers {hf_versions.version()} gives {family} the attention interface")
    model.config.stem_flex = {"min_tokens": min_tokens}
    with pytest.raises(TypeError, match=NO_INTERFACE):
        model(prompt())


@pytest.mark.parametrize("min_tokens", [0, 8192])
def test_attention_of_ones_own_is_refused_in_every_release(min_tokens):
    model = OwnModel(OwnConfig(attn_implementation="eager")).eval()
    assert model(prompt()).shape == (2, TOKENS, 16)
    assert not has_interface(OwnModel)
    with pytest.raises(TypeError, match=f"OwnModel {NO_INTERFACE}"):
        stem_hf.apply(model)
    model = OwnModel(OwnConfig(attn_implementation="stem_flex")).eval()
    model.config.stem_flex = {"min_tokens": min_tokens}
    with pytest.raises(TypeError, match=f"OwnModel {NO_INTERFACE}"):
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


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
def test_attention_modules_made_bidirectional_are_refused(family, exactly):
    model = tiny_model(family)
    modules = [module for module in model.modules() if hasattr(module, "is_causal") and hasattr(module, "layer_idx")]
    assert len(modules) == 2
    for layers in ((), (0, 1)):  # sparse and dense ones
        stem_hf.apply(model, SPARSE, dense_layers=layers, min_tokens=0)
        for module in modules:
            module.is_causal = False
        for mask in (None, padded("left")):
            with pytest.raises(NotImplementedError, match=r"has is_causal=False, .* model\.config\.is_causal = False"):
                model(prompt(), attention_mask=mask)
        for module in modules:
            module.is_causal = True
        assert sum(paths(model, prompt()).count().values()) == 2


def test_short_prompts_of_modules_made_bidirectional_run_as_before(llama):
    for layer in llama.model.layers:
        layer.self_attn.is_causal = False
    with torch.no_grad():
        expected = llama(prompt()).logits
        stem_hf.apply(llama, SPARSE)
        assert torch.equal(llama(prompt()).logits, expected)


def test_bidirectional_calls_are_the_models_own_or_refused(llama, exactly):
    try:
        with torch.no_grad():
            expected = llama(prompt(), is_causal=False).logits
    except TypeError:
        pytest.skip(f"transformers {hf_versions.version()} takes no is_causal in a call")
    stem_hf.apply(llama, SPARSE, dense_layers=(), min_tokens=0)
    refused = ""
    with torch.no_grad(), stem_hf.trace() as seen:
        try:
            torch.testing.assert_close(llama(prompt(), is_causal=False).logits, expected)
        except NotImplementedError as error:  # in releases that hand it on to attention, but not to the mask
            refused = str(error)
    assert ("has is_causal=False" in refused) if refused else seen.count() == {"sdpa": 2}


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
    assert implementation(llama.config) == "sdpa"


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
        return llama.config.to_dict(), implementation(llama.config), set(llama.__dict__), shown

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
