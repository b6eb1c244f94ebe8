"""The comparison of Stem's decay with a uniform cut: equal sizes, and the attention that it measures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench import attend, refine, refine_methods, refine_policies, refine_report, ruler, tasks
from stem_flex.budget import Mass
from stem_flex.selectors.refine import decayed_budget


@pytest.mark.parametrize(("length", "keep", "key_size"), [(700, 50, 1), (512, 16, 1), (1000, 5, 64), (60, 100, 1)])
def test_the_uniform_cut_is_as_large_as_the_decay(length, keep, key_size):
    """To the pair, and rows differ by no more than one key, but where causality leaves them fewer."""
    position = torch.arange(length) // key_size
    candidates = (position + 1).int()
    prompt = torch.full_like(position, -(-length // key_size))
    decay = decayed_budget(position, prompt, refine_policies.PLAIN.__class__(schedule="paper"), keep=keep)
    uniform = refine_policies.uniform_counts(torch.minimum(decay, candidates).sum().item(), candidates)
    assert torch.minimum(uniform, candidates).sum() == torch.minimum(decay, candidates).sum()
    free = uniform[uniform < candidates]
    assert free.numel() == 0 or free.max() - free.min() <= 1


def test_policies_that_are_compared_compute_equally_much():
    for name, keep, size, floor in (("dsa", 64, 1, 0), ("infllm", 24, 64, 9)):
        found, savings = refine_policies.policies(name, 1024 * (1 if size == 1 else 4), keep, size, floor)
        cut = {round(share, 4) for policy, share in savings.items() if policy != "native"}
        assert len(cut) == 1
        assert savings["native"] == 0 < cut.pop()
        assert {policy.name for policy in found} == savings.keys()


def some_methods(length):
    """The methods of a layer that reads random inputs, with an indexer that nobody fitted."""
    inputs = type("Inputs", (), {"of": {0: torch.randn(1, length, 12)}})()
    indexers = {0: {"weight": torch.randn(12, 8) / 4, "constant": torch.ones(8)}}
    return {method.name: method for method in refine_methods.methods(length, indexers, inputs, "cpu")}


@pytest.mark.parametrize("name", ["dsa", "infllm"])
def test_a_policy_that_keeps_everything_is_dense_attention(name, make_qkv):
    length = 200
    q, k, v = make_qkv(1, 8, 2, length, 16)
    method = some_methods(length)[name]
    method.keep = length
    every = refine_policies.Policy("all", torch.full((length,), length, dtype=torch.int32))
    out = refine.Cut(method, every)(0, q, k, v, 0.25)
    torch.testing.assert_close(out, attend.Dense()(0, q, k, v, 0.25))


@pytest.mark.parametrize("name", ["dsa", "dsa unfitted", "infllm"])
def test_a_policy_keeps_as_many_keys_as_it_counts(name, make_qkv):
    length, rows = 256, slice(128, 192)
    q, k, v = make_qkv(1, 8, 2, length, 16)
    method = some_methods(length)[name]
    candidates = torch.arange(rows.start, rows.stop) // method.key_size + 1
    for policy in method.policies:
        scores = method.scores(0, q, k, refine_methods.logits_of(q, k, rows, 0.25), rows, 0.25)
        found = refine_policies.chosen(method, policy, scores, v, rows, length)
        assert torch.equal(found.sum(-1)[0].int(), torch.minimum(policy.counts[rows], candidates))


def mass_policy(method, threshold, floor):
    return refine_policies.Policy(
        "mass", method.policies[0].counts, budget=Mass(threshold, floor=floor, cap=method.keep)
    )


@pytest.mark.parametrize("name", ["dsa", "infllm"])
def test_mass_whose_floor_is_all_is_the_native_method(name, make_qkv):
    length, rows = 320, slice(192, 256)
    q, k, v = make_qkv(1, 8, 2, length, 16)
    method = some_methods(length)[name]
    scores = method.scores(0, q, k, refine_methods.logits_of(q, k, rows, 0.25), rows, 0.25)
    native, mass = (
        refine_policies.chosen(method, policy, scores, v, rows, length)
        for policy in (method.policies[0], mass_policy(method, 1.9, method.keep))
    )
    assert torch.equal(native, mass)


@pytest.mark.parametrize("name", ["dsa", "infllm"])
def test_the_threshold_found_saves_what_is_wanted_of_its_text(name, make_qkv):
    """By the selection itself, which shares no code with the count that the threshold was found with."""
    length, wanted = 2048, 0.2
    q, k, v = make_qkv(1, 8, 2, length, 16)
    method = some_methods(length)[name]
    strips = list(refine_policies.strips(length, 4, 3))
    scores = [method.scores(0, q, k, refine_methods.logits_of(q, k, rows, 0.25), rows, 0.25) for rows in strips]
    shares = torch.cat([refine_policies.best_shares(method, *pair) for pair in zip(scores, strips, strict=True)], 1)
    candidates = torch.cat([torch.arange(rows.start, rows.stop) for rows in strips]) // method.key_size + 1
    floor = max(1, method.floor)
    threshold = refine_policies.threshold_for(shares, candidates, floor, wanted)
    kept, native = (
        sum(refine_policies.chosen(method, policy, part, v, rows, length).sum().item()
            for part, rows in zip(scores, strips, strict=True))
        for policy in (mass_policy(method, threshold, floor), method.policies[0])
    )  # fmt: skip
    assert 1 - kept / native == pytest.approx(refine_policies.saving(shares, candidates, threshold, floor), abs=1e-5)
    assert 1 - kept / native == pytest.approx(wanted, abs=0.005)
    with pytest.raises(ValueError, match="floor must leave"):
        refine_policies.threshold_for(shares, candidates, method.keep, wanted)


def test_text_for_fitting_is_not_measured():
    corpus = ruler.Corpus(np.arange(1000), np.zeros(1000, bool), lambda text: [0], tasks.Frame(()), 0)
    fitting, measuring = (part.tokens for part in refine.split(corpus, parts=9))
    assert not set(fitting) & set(measuring)
    assert len(fitting) + len(measuring) == 1000
    assert len(fitting) == pytest.approx(333, abs=2)


class OneLayer(torch.nn.Module):
    """A model of one layer that attends to given q, k, v, and whose last hidden states are its output."""

    def __init__(self, q, k, v):
        super().__init__()
        self.qkv, self.layers, self.device = (q, k, v), [None], torch.device("cpu")

    @property
    def model(self):
        return self

    def forward(self, ids, use_cache=False):
        out = attend._current[-1](0, *self.qkv, 0.25)
        return type("Output", (), {"last_hidden_state": out.transpose(1, 2).flatten(2)})()

    def lm_head(self, hidden):
        return hidden


def test_mass_and_its_uniform_cut_are_of_one_size(make_qkv):
    """In sampled rows of layers and in whole models, to half a pair of a head's mean; and report what they saved."""
    length, every = 1024, 2
    q, k, v = make_qkv(1, 8, 2, length, 16)
    model, ids = OneLayer(q, k, v), torch.zeros(1, length, dtype=torch.long)
    found = list(some_methods(length).values())
    settings = refine.add_mass(model, [ids], found, every=1)
    assert settings.keys() == {"dsa", "dsa unfitted", "infllm"}
    raw = {"layer": {}, "quarters": {}, "deep": {}, "pairs layer": {}, "pairs deep": {}}
    layers = refine._note_layers(raw, model, ids, found, every, 1)
    errors, deep = refine.deep_errors(model, ids, found)
    assert errors.keys() == deep.keys()
    for sizes, count in ((layers, 3), (deep, 2)):
        cuts = [name for name, policy in sizes if policy == refine_policies.EQUAL]
        assert len(cuts) == count
        for name in cuts:
            assert sizes[name, refine_policies.EQUAL] == pytest.approx(sizes[name, "mass"], abs=0.51)
    for part, sizes in (("layer", layers), ("deep", deep)):
        for key, size in sizes.items():
            refine._note(raw[f"pairs {part}"], key, {"kept": size})
    for key, values in errors.items():
        refine._note(raw["deep"], key, values)
    rows = refine_report.table(raw, found)
    for row in [row for row in rows if row["policy"] == "mass"]:
        wanted = settings[row["method"]]["wanted"]
        assert row["saved"] == pytest.approx(wanted, abs=0.05)
        assert row["layer all"]["ratio"] > 0
    text = refine_report.markdown(rows, {"length": length, "deep_length": length, "seeds": 1, "deep_seeds": 1})
    assert 'Saved by "mass" of all prompts' in text
