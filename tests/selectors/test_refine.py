"""Stem on foreign scores: magnitudes, decaying counts, ranking, and what the decay saves."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from stem_flex import StemConfig, layout, tpd_budget
from stem_flex.budget import Mass, Peak
from stem_flex.reference import refined as reference
from stem_flex.score import value_magnitude
from stem_flex.select import top_blocks
from stem_flex.selectors.refine import best, bind_rows, decayed_budget, key_magnitude, refine, saved

PAPER = StemConfig.paper()
OPERATOR = StemConfig.operator()


def bound_of(v, size, **lengths):
    given = dict(q_offset=0, prompt_len=None, kv_len=None) | lengths
    return bind_rows(v, v, given.pop("layout", None), rows=1, size=size, **given)


@pytest.mark.parametrize("config", [PAPER, OPERATOR], ids=["paper", "operator"])
@pytest.mark.parametrize(("keep", "prompt"), [(1, 1), (7, 3), (7, 8), (7, 9), (20, 97), (2048, 5000)])
def test_budget_is_the_reference_row_by_row(config, keep, prompt):
    position = torch.arange(prompt)
    found = decayed_budget(position, torch.full_like(position, prompt), config, keep=keep)
    assert found.dtype == torch.int32
    rows = range(0, prompt, 1 + prompt // 300)
    assert found[:: 1 + prompt // 300].tolist() == [reference.decayed(i, prompt, keep, config) for i in rows]


def test_the_operators_decay_is_tpd_with_a_fixed_start():
    position = torch.arange(90)
    found = decayed_budget(position, torch.full_like(position, 90), StemConfig(), keep=17)
    assert torch.equal(found, tpd_budget(90, StemConfig(schedule="fixed", k_start=17)))


@pytest.mark.parametrize("metric", ["zscore", "log"])
@pytest.mark.parametrize("length", [256, 203, 33])
def test_magnitude_of_blocks_is_stems_own(metric, length, make_qkv):
    config = StemConfig(block_size=32, stride=8, metric=metric)
    _, _, v = make_qkv(2, 4, 2, length, 16)
    for chosen in (layout.causal(), layout.padding([length, length // 2])):
        bound = chosen.bind(2, 4, length, length, block_size=(32, 32))
        found = key_magnitude(v, config, bound, heads=2)
        torch.testing.assert_close(found, value_magnitude(v, bound, config), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("metric", ["zscore", "log"])
@pytest.mark.parametrize("key", [1, 4, 64])
def test_magnitude_equals_the_reference(metric, key, make_qkv):
    """Tokens and blocks, heads that share a score and heads that repeat one, rows of different lengths."""
    config = StemConfig(metric=metric)
    _, _, v = make_qkv(2, 4, 2, 171, 16, dtype=torch.float64)
    bound = bound_of(v, (1, key), layout=layout.padding([171, 64], "right"))
    for heads in (1, 2, 4):
        found = key_magnitude(v, config, bound, heads=heads)
        assert found.shape == (2, heads, -(-171 // key))
        for b, end in enumerate((171, 64)):
            for h in range(heads):
                mine = v[b, :, :end].transpose(0, 1).flatten(1) if heads == 1 else v[b, h * 2 // heads, :end]
                expected = reference.magnitude(mine.norm(dim=-1), key, config)
                torch.testing.assert_close(found[b, h, : len(expected)], expected)
                assert not found[b, h, len(expected) :].any()


def test_best_is_top_blocks():
    """Ties to the lower index, -0.0 equal to 0.0, NaN after -inf, forbidden never."""
    scores = torch.randint(-3, 4, (3, 2, 40, 61)).float()
    scores[torch.rand(scores.shape) < 0.1] = -0.0
    scores[torch.rand(scores.shape) < 0.1] = math.nan
    scores[torch.rand(scores.shape) < 0.1] = -math.inf
    scores[torch.rand(scores.shape) < 0.05] = math.inf
    allowed = torch.rand(3, 1, 40, 61) < 0.7
    counts = torch.randint(1, 50, (3, 1, 40), dtype=torch.int32)
    expected = top_blocks(scores, allowed.expand(scores.shape), counts)
    assert torch.equal(best(scores, allowed, counts, 50), expected)
    assert torch.equal(best(scores.double(), allowed, counts, 80), expected)


@pytest.mark.parametrize("unit", ["logit", "mass"])
def test_refined_scores_and_counts(unit, make_qkv):
    """The formula of each unit; mass keeps what is forced (+inf) and what is nothing (0)."""
    _, _, v = make_qkv(2, 4, 2, 150, 16)
    config = replace(PAPER, value_weight=0.4)
    scores = torch.rand(2, 2, 150, 150)
    scores[..., 0], scores[..., 1] = math.inf, 0.0
    found = refine(scores, v, config, keep=30, unit=unit)
    bonus = 0.4 * key_magnitude(v, config, bound_of(v, (1, 1)), heads=2)[:, :, None]
    expected = scores + bonus if unit == "logit" else scores * bonus.exp()
    causal = torch.ones(150, 150).tril().bool()
    assert torch.equal(found.scores, expected.masked_fill(~causal, -math.inf))
    assert found.counts.flatten().tolist() == [reference.decayed(i, 150, 30, config) for i in range(150)]
    kept = found.keep(30)
    assert torch.equal(kept.sum(-1), torch.minimum(found.counts, torch.arange(1, 151)).expand(2, 2, -1))
    assert kept[..., 0].all()


@pytest.mark.parametrize("size", [(1, 1), (1, 16), (32, 16)])
def test_strips_equal_the_whole(size, make_qkv):
    """A prompt in strips of rows, by their offset and the prompt's length, also where the keys are padded."""
    _, _, v = make_qkv(2, 4, 2, 192, 16)
    scores = torch.randn(2, 4, 192 // size[0], 192 // size[1])
    for given in ({}, {"layout": layout.padding([192, 101])}, {"kv_len": torch.tensor([192, 70])}):
        whole = refine(scores, v, PAPER, keep=9, size=size, **given)
        for first in range(0, scores.shape[2], 5):
            part = refine(
                scores[:, :, first : first + 5], v, PAPER, keep=9, size=size, q_offset=first * size[0], **given
            )
            for one, all_rows in zip(part, whole, strict=True):
                axis = -1 if one is part.counts else 2
                rows = all_rows.narrow(axis, first, one.shape[axis])
                assert torch.equal(one, rows)


def test_budgets_follow_documents_and_padding(make_qkv):
    _, _, v = make_qkv(1, 2, 2, 100, 8)
    scores = torch.randn(1, 2, 100, 100)
    found = refine(scores, v, PAPER, keep=10, layout=layout.documents(cu_seqlens=[0, 40, 100]))
    expected = [reference.decayed(i, 40, 10, PAPER) for i in range(40)]
    expected += [reference.decayed(i, 60, 10, PAPER) for i in range(60)]
    assert found.counts.flatten().tolist() == expected
    assert not found.keep(10)[..., 40:, :40].any()


def test_a_prompt_that_is_not_there_yet_sets_the_budget(make_qkv):
    """A chunk spends what one-shot prefill spends: the prompt's length counts, not the keys so far."""
    _, _, v = make_qkv(1, 2, 2, 60, 8)
    found = refine(torch.randn(1, 2, 20, 60), v, PAPER, keep=10, q_offset=40, prompt_len=200)
    assert found.counts.flatten().tolist() == [reference.decayed(i, 200, 10, PAPER) for i in range(40, 60)]


@pytest.mark.parametrize("ratio", [2, 3, 8, 50])
def test_the_papers_decay_saves_half_of_what_it_decays(ratio):
    """(1 - mu) / 2 of everything, and more, but for half a key a row that rounding up keeps."""
    keep = 640
    found = saved(keep * ratio, PAPER, keep=keep)
    r = 1 / ratio
    least = 0.3 * (1 - r * r) / (2 - r)
    assert least >= 0.15 - 1e-9
    assert least - 0.51 / keep <= found.share <= least + 0.01


@pytest.mark.parametrize("length", [2**n for n in range(12, 20)])
def test_dsa_saves_15_percent_at_every_length(length):
    assert saved(length, PAPER, keep=2048).share >= 0.15
    assert saved(length, OPERATOR, keep=2048).share < 0.1501  # which leaves the first 2048 rows alone


@pytest.mark.parametrize("length", [2**n for n in range(14, 21)])
def test_infllm_saves_18_percent_at_mu_062(length):
    config = StemConfig(schedule="paper", mu=0.62)
    assert saved(length, config, keep=96, key_size=64, floor=34).share >= 0.18


def test_saved_counts_rows_one_by_one():
    found = saved(100, PAPER, keep=12, key_size=8, floor=2)
    blocks = [i // 8 + 1 for i in range(100)]
    kept = [min(n, max(2, reference.decayed(i // 8, 13, 12, PAPER))) for i, n in enumerate(blocks)]
    assert found.native == sum(min(n, 12) for n in blocks)
    assert found.kept == sum(kept)
    assert found.share == 1 - found.kept / found.native


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (dict(keep=0), ValueError, "keep must be at least 1"),
        (dict(unit="nats"), ValueError, "unit must be one of"),
        (dict(size=(1, 0)), ValueError, r"size\[1\]"),
        (dict(size=(1, 4)), ValueError, "scores must have v's batch"),
        (dict(layout="causal"), TypeError, "layout must come from stem_flex.layout"),
        (dict(config={}), TypeError, "config must be"),
        (dict(scores=torch.randn(1, 3, 20, 20)), ValueError, "multiple or a divisor"),
        (dict(scores=torch.randn(20, 20)), ValueError, r"\(B, H, R, K\)"),
        (dict(v=None), TypeError, "v must be a tensor"),
    ],
)
def test_errors_name_the_argument(change, error, match):
    given = dict(scores=torch.randn(1, 2, 20, 20), v=torch.randn(1, 2, 20, 8), config=None, keep=4) | change
    scores, v, config = given.pop("scores"), given.pop("v"), given.pop("config")
    with pytest.raises(error, match=match):
        refine(scores, v, config, **given)


def test_layouts_without_intervals_are_refused():
    mine = layout.from_mask_mod(lambda b, h, q, kv: q >= kv, 1, 1, 20, 20)
    with pytest.raises(ValueError, match="one interval of keys"):
        refine(torch.randn(1, 2, 20, 20), torch.randn(1, 2, 20, 8), keep=4, layout=mine)


@pytest.mark.parametrize("unit", ["logit", "mass"])
def test_a_mass_budget_keeps_shares_above_its_threshold(unit, make_qkv):
    """Row by row: what the decay leaves, of it the keys whose own share exceeds the threshold, floor and cap active."""
    _, _, v = make_qkv(2, 2, 1, 70, 8)
    scores = torch.randn(2, 2, 70, 70) * 2
    scores = scores if unit == "logit" else scores.sigmoid() / 10
    config, rule = replace(PAPER, mu=0.5, value_weight=0.3), Mass(0.05, floor=3, cap=9)
    found = refine(scores, v, config, keep=12, unit=unit, budget=rule)
    ranked = refine(scores, v, config, keep=12, unit=unit)
    assert torch.equal(found.scores, ranked.scores)
    for row in range(70):
        seen = scores[:, :, row, : row + 1].double()
        shares = seen.softmax(-1) if unit == "logit" else seen
        wanted = (shares > 0.05).sum(-1).clamp(3, 9).clamp(max=reference.decayed(row, 70, 12, config))
        assert torch.equal(found.counts[:, :, row].long(), wanted)
        assert torch.equal(found.keep(12)[:, :, row].sum(-1), wanted.clamp(max=row + 1))


def test_a_mass_budget_is_no_other_rule(make_qkv):
    _, _, v = make_qkv(1, 1, 1, 8, 8)
    with pytest.raises(TypeError, match=r"budget must be a stem_flex\.budget\.Mass or None, got Peak"):
        refine(torch.randn(1, 1, 8, 8), v, PAPER, keep=4, budget=Peak(0.5))
