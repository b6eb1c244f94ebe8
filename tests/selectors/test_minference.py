"""MInference keeps what loops over tokens keep, and reads published pattern files."""

from __future__ import annotations

import json

import pytest
import torch

from stem_flex import selectors, stem_block_mask
from stem_flex.plumbing.tables import block_classes
from stem_flex.reference import selectors as loops
from stem_flex.selectors import minference
from tests.selectors.cases import CONFIG, ONE_PROMPT, agree, inputs


@pytest.mark.parametrize("case", ONE_PROMPT)
def test_minference(case):
    heads = ((("vertical_and_slash", 35, 110),), ("columns", 35), ("offsets", 110))[0]
    kept = agree("minference", ONE_PROMPT[case], loops.minference, fast={"heads": heads}, columns=35, offsets=110)
    assert 0 < kept.float().mean() < 1


def test_minference_heads_and_kinds():
    """Each head by its own pattern, one of every kind."""
    case = ONE_PROMPT["ragged, GQA, batch"]
    q, k, v = inputs(case)
    heads = (
        ("vertical_and_slash", 31, 105),
        ("stream_llm", 20, 50),
        ("block_sparse", 100, 0),
        ("vertical_and_slash", 60, 130),
    )
    scores = selectors.get("minference").scores(q, k, v, CONFIG, heads=heads) >= 2
    for index, (rule, options) in enumerate((
        (loops.minference, {"columns": 31, "offsets": 105}), (loops.a_shape, {"initial": 20, "local": 50}),
        (None, {}), (loops.minference, {"columns": 60, "offsets": 130}),
    )):  # fmt: skip
        if rule is None:
            assert torch.equal(scores[:, index], scores[:, index].tril()), "100 blocks of 64 are all"
            continue
        expected = loops.kept(rule, q, k, v, CONFIG, **options)[:, index]
        assert torch.equal(scores[:, index] | torch.eye(11, dtype=torch.bool), expected)
    with pytest.raises(ValueError, match=r"heads must be one or 4 patterns of .*, got"):
        selectors.get("minference").scores(q, k, v, CONFIG, heads=heads[:2])


def test_minference_block_sparse_is_the_best_of_the_means():
    """100 blocks of 64 keys are 400 of 16: of longer prompts the best by unscaled block means."""
    q, k, v = inputs((1, 1, 1, 6600, 6600), dim=4)
    got = selectors.get("minference").scores(q, k, v, CONFIG, heads=(("block_sparse", 100, 0),)) >= 2
    means = [torch.nn.functional.pad(x[0, 0], (0, 0, 0, 8)).unflatten(0, (-1, 16)).sum(1) for x in (q, k)]
    logits = (means[0] @ means[1].T).masked_fill(torch.ones(413, 413).triu(1) > 0, -torch.inf)[:-1, :-1]
    expected = torch.zeros(412, 412, dtype=torch.bool).scatter_(1, logits.topk(400, 1).indices, True).tril()
    assert torch.equal(got[0, 0, :412, :412], expected)


def test_minference_pattern_files(tmp_path):
    """The published form: a list over layers of heads; what is missing is (1000, 6096)."""
    path = tmp_path / "model.json"
    path.write_text(json.dumps([{}, {"0": ["vertical_and_slash", 40, 120, 0.9], "3": ["stream_llm", 16, 32, 1.0]}]))
    selector = minference.from_file(path, 1)
    assert selector.scores.keywords["heads"] == (
        ("vertical_and_slash", 40, 120), minference.DEFAULT, minference.DEFAULT, ("stream_llm", 16, 32)
    )  # fmt: skip
    assert minference.from_file(path, 1, ratio=0.5).scores.keywords["heads"][0] == ("vertical_and_slash", 20, 60)
    assert minference.from_file(path, 0).scores.keywords["heads"] == (minference.DEFAULT,)
    case = ONE_PROMPT["ragged, GQA, batch"]
    qkv = inputs(case)
    kept = block_classes(stem_block_mask(*qkv, CONFIG, selector=selector)) > 0
    assert torch.equal(kept[:, 0], loops.kept(loops.minference, *qkv, CONFIG, columns=40, offsets=120)[:, 0])
    assert torch.equal(kept[:, 3], loops.kept(loops.a_shape, *qkv, CONFIG, initial=16, local=32)[:, 3])
    with pytest.raises(ValueError, match=r"layer must be one of the 2 layers of model.json, got 2"):
        minference.from_file(path, 2)
    path.write_text(json.dumps([{"0": ["dense", 1, 2, 3]}]))
    with pytest.raises(ValueError, match=r"path must hold entries .* got \['dense', 1, 2, 3\] in model.json"):
        minference.from_file(path, 0)
