"""``apply(..., selector=, budget=)``: models' layers select what :func:`stem_block_mask` does with the same."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")

from transformers import AutoModelForCausalLM  # noqa: E402

import stem_flex.integrations.hf as stem_hf  # noqa: E402
from stem_flex import StemConfig, layout, reference, selectors, stem_block_mask  # noqa: E402
from stem_flex.budget import Blocks, Budget, Coverage, Mass, Schedule  # noqa: E402
from stem_flex.integrations import hf_attention  # noqa: E402
from stem_flex.integrations.hf_settings import Settings  # noqa: E402
from tests.hf_models import CASES, KEEP_ALL, SPARSE, TOKENS, kept, padded, prompt, tiny_model  # noqa: E402

LENGTHS = torch.tensor([TOKENS, TOKENS - 37])
PADDING = layout.padding(LENGTHS, side="left")
NAMES = ["int", "Blocks", "Mass", "Coverage", "Schedule"]
RULES = [3, Blocks(3), Mass(0.99, floor=4), Coverage(0.5, floor=2, cap=None), Schedule()]


def selected(model, selections, whole=False):
    selections.clear()
    with torch.no_grad(), stem_hf.trace() as seen:
        model(prompt(), attention_mask=None if whole else padded("left"), use_cache=False)
    assert seen.count() == {"stem": 2}
    return list(selections)


@pytest.mark.parametrize("name", selectors.names())
def test_each_selector_selects_as_it_does_by_itself(name, llama, exactly, selections):
    stem_hf.apply(llama, SPARSE, dense_layers=(), min_tokens=0, selector=name)
    refusal = ""
    try:
        selected(llama, selections)
    except ValueError as error:  # some score causal prompts only, and say so
        refusal = str(error)
    whole = bool(refusal)
    assert not whole or f"for the {name}" in refusal or f"for {name}" in refusal
    for q, k, v, _, mask in selected(llama, selections, whole):
        expected = stem_block_mask(q, k, v, SPARSE, layout=None if whole else PADDING, selector=name)
        assert torch.equal(kept(mask), kept(expected))


@pytest.mark.parametrize("budget", RULES, ids=NAMES)
def test_each_rule_budgets_as_it_does_by_itself(budget, llama, exactly, selections):
    stem_hf.apply(llama, SPARSE, dense_layers=(), min_tokens=0, budget=budget)
    for q, k, v, _, mask in selected(llama, selections):
        expected = kept(stem_block_mask(q, k, v, SPARSE, layout=PADDING, budget=budget))
        assert torch.equal(kept(mask), expected)
        given = kept(stem_block_mask(q, k, v, SPARSE, layout=PADDING))
        assert isinstance(budget, Schedule) == torch.equal(expected, given)


def test_selectors_and_rules_differ_from_stem(llama, exactly, selections):
    found = []
    for options in ({}, {"selector": "sketch"}, {"selector": selectors.get("oracle")}, {"budget": 3}):
        stem_hf.apply(llama, SPARSE, dense_layers=(), min_tokens=0, **options)
        found.append(kept(selected(llama, selections, whole=True)[0][-1]))
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


@pytest.mark.parametrize("name", ["sketch", "stem-log"])
def test_every_case_is_served(name, llama, exactly):
    with torch.no_grad():
        expected = {case: run(llama) for case, run in CASES.items()}
        stem_hf.apply(llama, KEEP_ALL, dense_layers=(), min_tokens=0, selector=name)
        for case, logits in expected.items():
            torch.testing.assert_close(CASES[case](llama), logits, atol=1e-4, rtol=0)


def test_what_a_selector_refuses_is_refused_by_its_name(llama, exactly):
    stem_hf.apply(llama, SPARSE, dense_layers=(), min_tokens=0, selector="oracle")
    with pytest.raises(ValueError, match="for the oracle, got"):
        CASES["left padding"](llama)


def test_a_selector_of_ones_own_brings_its_rule(llama, exactly, selections, monkeypatch):
    monkeypatch.setattr(selectors, "_SELECTORS", dict(selectors._SELECTORS))
    scores = selectors.get("sam").scores
    mine = selectors.register("mine", scores, "with a rule of its own", budget=Blocks(2), value_weight=0.0)
    stem_hf.apply(llama, SPARSE, dense_layers=(), min_tokens=0, selector=mine)
    assert llama.config.stem_flex["selector"] == "mine"
    for q, k, v, _, mask in selected(llama, selections):
        assert torch.equal(kept(mask), kept(stem_block_mask(q, k, v, SPARSE, layout=PADDING, selector=mine)))


def test_selector_and_rule_survive_saving(llama, tmp_path):
    stem_hf.apply(llama, selector="sketch", budget=Mass(0.9, floor=2, cap=None))
    llama.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="stem_flex")
    settings = Settings.from_json(loaded.config.stem_flex)
    assert (settings.selector, settings.budget) == ("sketch", Mass(0.9, floor=2, cap=None))


@pytest.mark.parametrize("budget", [None, *RULES], ids=["None", *NAMES])
def test_settings_with_a_rule_are_json(budget):
    plain = json.loads(json.dumps(Settings(budget=budget).to_json()))
    assert Settings.from_json(plain).to_json() == plain


def test_settings_of_a_mass_budget_are_json():
    config = replace(StemConfig.mass(0.07), block_size=(128, 64), sketch=(8, 8, 2, 8), correction="mean")
    plain = Settings(config=config).to_json()
    assert plain["config"]["sketch"] == [8, 8, 2, 8]
    assert Settings.from_json(json.loads(json.dumps(plain))).config == config


@pytest.mark.parametrize("change", [{}, {"correction": "mean"}])
def test_layers_correct_what_they_drop(change, llama, exactly, selections, monkeypatch):
    config, outputs = replace(SPARSE, **change), []
    run = hf_attention.sparse_prefill
    monkeypatch.setattr(hf_attention, "sparse_prefill", lambda *x, **y: outputs.append(run(*x, **y)) or outputs[-1])
    stem_hf.apply(llama, config, dense_layers=(), min_tokens=0)
    for (q, k, v, _, _), got in zip(selected(llama, selections), outputs, strict=True):
        expected = reference.stem_attention(q, k, v, config, layout=PADDING)
        torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-4)


@dataclass(frozen=True)
class Mine(Budget):
    share: float = 0.5


REFUSED = [
    ({"selector": "nobody"}, ValueError, "selector must be one of .* got 'nobody'"),
    ({"selector": 3}, TypeError, "selector must be the name of a registered selector or None, got 3"),
    ({"selector": replace(selectors.get("sam"), name="other")}, ValueError, "selector must be a registered one"),
    ({"selector": replace(selectors.get("sam"), note="other")}, ValueError, "selector must be a registered one"),
    ({"budget": "x"}, TypeError, "budget must be an int, a rule of stem_flex.budget or None, got str"),
    ({"budget": True}, TypeError, "budget must be an int, a rule of stem_flex.budget or None, got bool"),
    ({"budget": 0}, ValueError, "budget must be at least 1 block, got 0"),
    ({"budget": torch.ones(7, dtype=torch.int32)}, TypeError, "budget must be an int, .* got Tensor"),
    ({"budget": Blocks(torch.ones(7, dtype=torch.int32))}, TypeError, "budget must hold numbers, .* got blocks Tensor"),
    ({"budget": Mine()}, TypeError, "budget must be a rule of stem_flex.budget, .* got Mine; register a selector"),
]


@pytest.mark.parametrize(("options", "error", "match"), REFUSED)
def test_what_a_config_cannot_keep_is_refused(options, error, match, llama):
    with pytest.raises(error, match=match):
        stem_hf.apply(llama, **options)
    assert not hasattr(llama.config, "stem_flex")


@pytest.mark.parametrize(
    ("budget", "match"),
    [
        ({"rule": "Nothing"}, r"config.stem_flex\['budget'\] must name a rule of stem_flex.budget, got 'Nothing'"),
        ({"rule": "StemConfig"}, "must name a rule of stem_flex.budget, got 'StemConfig'"),
        ({"threshold": 0.5}, "must name a rule of stem_flex.budget, got None"),
        ({"rule": "Mass", "share": 0.5}, r"config.stem_flex\['budget'\] has unknown settings \['share'\]"),
        ({"rule": "Schedule", "share": 0.5}, r"config.stem_flex\['budget'\] has unknown settings \['share'\]"),
    ],
)
def test_rules_in_settings_are_checked(budget, match):
    with pytest.raises(ValueError, match=match):
        Settings.from_json({"budget": budget})


def test_a_selector_never_runs_dense_instead(monkeypatch):
    model = tiny_model("llama", num_hidden_layers=1)
    seen = []
    monkeypatch.setattr(hf_attention, "explain", lambda *args, **options: seen.append(options) or 1 / 0)
    q = torch.zeros(1, 4, 64, 16, dtype=torch.bfloat16, device="meta")
    for options in ({"selector": "sketch"}, {"budget": 3}):
        stem_hf.apply(model, dense_layers=(), **options)
        settings = Settings.from_json(model.config.stem_flex)
        mask = hf_attention.StemMask.__new__(hf_attention.StemMask)
        mask.__dict__.update(kind="causal", start=None, offset=0, settings=settings, prompt=None)
        monkeypatch.setattr(type(q), "is_cuda", True, raising=False)
        with pytest.raises(ZeroDivisionError):
            hf_attention._dense_kernel(q, q[:, :2], q[:, :2], mask, True)
    assert [(x["selector"], x["budget"]) for x in seen] == [("sketch", None), (None, 3)]
