"""The comparison of Stem's decay with a uniform cut: equal sizes, and the attention that it measures."""

from __future__ import annotations

import pytest
import torch

from bench import attend, refine
from stem_flex.selectors.refine import decayed_budget


@pytest.mark.parametrize(("length", "keep", "key_size"), [(700, 50, 1), (512, 16, 1), (1000, 5, 64), (60, 100, 1)])
def test_the_uniform_cut_is_as_large_as_the_decay(length, keep, key_size):
    """To the pair, and rows differ by no more than one key, but where causality leaves them fewer."""
    position = torch.arange(length) // key_size
    candidates = (position + 1).int()
    prompt = torch.full_like(position, -(-length // key_size))
    decay = decayed_budget(position, prompt, refine.PLAIN.__class__(schedule="paper"), keep=keep)
    uniform = refine.uniform_counts(decay, candidates)
    assert torch.minimum(uniform, candidates).sum() == torch.minimum(decay, candidates).sum()
    free = uniform[uniform < candidates]
    assert free.numel() == 0 or free.max() - free.min() <= 1


def test_policies_that_are_compared_compute_equally_much():
    for name, keep, size, floor in (("dsa", 64, 1, 0), ("infllm", 24, 64, 9)):
        found, savings = refine.policies(name, 1024 * (1 if size == 1 else 4), keep, size, floor)
        cut = {round(share, 4) for policy, share in savings.items() if policy != "native"}
        assert len(cut) == 1
        assert savings["native"] == 0 < cut.pop()
        assert {policy.name for policy in found} == savings.keys()


@pytest.mark.parametrize("name", ["dsa", "infllm"])
def test_a_policy_that_keeps_everything_is_dense_attention(name, make_qkv):
    length = 200
    q, k, v = make_qkv(1, 8, 2, length, 16)
    inputs = type("Inputs", (), {"of": {0: torch.randn(1, length, 12)}})()
    indexers = {0: {"weight": torch.randn(12, 8) / 4, "constant": torch.ones(8)}}
    method = next(m for m in refine.methods(length, indexers, inputs, "cpu") if m.name == name)
    method.keep = length
    every = refine.Policy("all", torch.full((length,), length, dtype=torch.int32), refine.PLAIN)
    out = refine.Cut(method, every)(0, q, k, v, 0.25)
    torch.testing.assert_close(out, attend.Dense()(0, q, k, v, 0.25))


def test_a_policy_keeps_as_many_keys_as_it_counts(make_qkv):
    length, rows = 256, slice(128, 192)
    _, k, v = make_qkv(1, 8, 2, length, 16)
    q = torch.randn(1, 8, length, 16)
    inputs = type("Inputs", (), {"of": {0: torch.randn(1, length, 12)}})()
    indexers = {0: {"weight": torch.randn(12, 8) / 4, "constant": torch.ones(8)}}
    for method in refine.methods(length, indexers, inputs, "cpu")[:2]:
        for policy in method.policies:
            scores = method.scores(0, q, k, refine.logits_of(q, k, rows, 0.25), rows, 0.25)
            found = refine.kept(method, policy, scores, v, rows, length)
            assert torch.equal(found.sum(-1)[0].int(), policy.counts[rows])
