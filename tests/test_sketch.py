"""The block sketch against its definition, one proxy at a time in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stem_flex import StemConfig, layout, reference, testing
from stem_flex.selectors import oracle, sketch

SIZES = ((16, 8, 4, 8), (0, 16, 0, 16), (8, 8, 4, 8), (3, 1, 16, 2), (0, 1, 0, 1))
CONFIG = StemConfig(block_size=(32, 16), stride=8)


def assert_scores(got, expected, tolerance):
    """The same structure, and no score (0 to 2) off by more than ``tolerance``."""
    allowed = ~expected.isneginf()
    assert torch.equal(~got.isneginf(), allowed)
    assert not got.isnan().any()
    off = (got.double() - expected.double())[allowed].abs()
    assert off.numel() == 0 or off.max() <= tolerance


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("heads", [(3, 1), (4, 2)])
@pytest.mark.parametrize("length", [1, 31, 96, 145])
def test_scores_are_the_definition(make_qkv, length, heads, sizes):
    q, k, v = make_qkv(2, *heads, length, 16)
    got, expected = (f(q, k, v, CONFIG, sketch=sizes) for f in (sketch.scores, reference.sketch_scores))
    assert got.dtype == torch.float32
    assert_scores(got, expected, 1e-5)
    double = [x.double() for x in (q, k, v)]
    assert_scores(sketch.scores(*double, CONFIG, sketch=sizes), expected, 1e-6)
    exact = reference.sketch_scores(*double, CONFIG, sketch=sizes)
    assert_scores(sketch.scores(*double, CONFIG, sketch=sizes), exact, 1e-12)


@given(st.data())
def test_scores_under_any_layout(data):
    """Padding on both sides, documents, windows, mask_mods, kv_len and offsets: only real tokens are represented."""
    q, k, v = (x.double() for x in data.draw(testing.qkv(past=(0, 70), q_len=(1, 120), groups=(1, 3), ties=False)))
    config = data.draw(testing.stem_configs())
    offset = data.draw(st.integers(0, k.shape[2] - q.shape[2]))
    structure = data.draw(testing.layouts(q, k))
    kv_len = data.draw(st.none() | st.integers(1, k.shape[2]))
    sizes = data.draw(st.sampled_from(SIZES))
    options = {"layout": structure, "q_offset": offset, "kv_len": kv_len, "sketch": sizes}
    got, expected = (f(q, k, v, config, **options) for f in (sketch.scores, reference.sketch_scores))
    assert_scores(got, expected, 1e-10)


@given(st.data())
def test_proposals_under_any_layout(data):
    """A coarse sketch proposes, the fine one scores what it proposed, by the definition; also where it is crowded."""
    q, k, v = (x.double() for x in data.draw(testing.qkv(past=(0, 90), q_len=(1, 120), groups=(1, 3), ties=False)))
    structure = data.draw(testing.layouts(q, k))
    threshold, cap = data.draw(st.sampled_from([0.02, 0.2, 0.7])), data.draw(st.sampled_from([2, 256]))
    sizes = data.draw(st.sampled_from([(4, 2, 3, 2), (2, 1, 1, 8)]))
    few = data.draw(st.sampled_from([(0, 0), (2, 1)]))
    config = replace(CONFIG, routing="sketch", sketch=sizes, coarse=few, budget="mass", threshold=threshold, cap=cap,
                     mu=1.0)  # fmt: skip
    options = {"layout": structure, "q_offset": data.draw(st.integers(0, k.shape[2] - q.shape[2]))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stem_flex.budget.PROPOSED", cap)
        got = sketch.scores(q, k, v, config, **options)
    room = min(cap, -(-k.shape[2] // 16))
    expected = reference.sketch_scores(
        q, k, v, config, sketch=sizes, coarse=few, threshold=threshold, capacity=room, **options
    )
    assert_scores(got, expected, 1e-10)


def test_rows_of_a_batch_may_differ(make_qkv):
    """Padding, offsets and lengths of each batch row count; what is padded may hold NaN."""
    q, k, v = make_qkv(3, 4, 2, 70, 16, Lk=150)
    offset, lengths = torch.tensor([0, 33, 80]), torch.tensor([150, 97, 61])
    options = {"q_offset": offset, "layout": layout.padding(lengths, "right"), "kv_len": torch.tensor([140, 150, 99])}
    expected = reference.sketch_scores(q, k, v, CONFIG, **options)
    assert_scores(sketch.scores(q, k, v, CONFIG, **options), expected, 1e-5)
    for b, length in enumerate(lengths.tolist()):
        k[b, :, length:] = math.nan
        q[b, :, max(0, length - int(offset[b])) :] = math.nan
    assert_scores(sketch.scores(q, k, v, CONFIG, **options), expected, 1e-5)


def test_chunks_score_as_one_shot(make_qkv):
    """A block-aligned chunk's rows are the whole prompt's."""
    q, k, v = make_qkv(1, 4, 2, 200, 16)
    whole = sketch.scores(q, k, v, CONFIG)
    chunk = sketch.scores(q[:, :, 64:160], k[:, :, :160], v[:, :, :160], CONFIG, q_offset=64)
    assert_scores(chunk, whole[:, :, 2:5, :10], 1e-6)


def test_rows_at_a_time_change_nothing(make_qkv, monkeypatch):
    """The PyTorch path goes through the rows under bounded memory."""
    q, k, v = make_qkv(2, 4, 2, 200, 16)
    whole = sketch.scores(q, k, v, CONFIG, layout=layout.documents([0, 90, 200]))
    monkeypatch.setattr(sketch, "_PAIRS_AT_ONCE", 1)
    torch.testing.assert_close(sketch.scores(q, k, v, CONFIG, layout=layout.documents([0, 90, 200])), whole)


def test_equally_far_tokens_are_taken_in_their_order():
    """Ties to the lower index: of the corners of a square about the mean the first ones."""
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    x = torch.cat([torch.zeros(4, 2), corners.repeat(3, 1)])[None, None]
    found, counts = sketch.proxies(x, 16, 3, 1)
    assert torch.equal(found[0, 0, 0, :3], corners[:3])
    assert counts.tolist() == [[[1.0, 1.0, 1.0, 16.0]]]


def test_single_tokens_give_attention_without_the_mask(make_qkv):
    """With as many means as tokens a proxy is a token: mean + largest mass, every key of allowed blocks seen."""
    q, k, v = make_qkv(1, 4, 2, 96, 16)
    scores = sketch.scores(q, k, v, StemConfig(block_size=16, stride=8), sketch=(0, 16, 0, 16))
    for h in range(4):
        for row in range(6):
            queries, keys = q[0, h, row * 16 : row * 16 + 16].double(), k[0, h // 2, : row * 16 + 16].double()
            mass = torch.softmax(queries @ keys.T / 4, -1).unflatten(1, (-1, 16)).sum(-1)
            expected = mass.mean(0) + mass.amax(0)
            torch.testing.assert_close(scores[0, h, row, : row + 1].double(), expected, atol=1e-5, rtol=1e-5)


def test_proxies_stand_for_every_token():
    """Token counts add up to the length; outliers are the tokens farthest from their block's mean."""
    x = torch.randn(1, 2, 75, 8)
    x[0, :, 40] *= 50
    found, counts = sketch.proxies(x, 32, 0, 4)
    assert found.shape == (1, 2, 3, 4, 8)
    assert counts.tolist() == [[[8.0] * 4, [8.0] * 4, [8.0, 3.0, 0.0, 0.0]]]
    torch.testing.assert_close(found[0, :, 2, 1], x[0, :, 72:75].mean(1))
    found, counts = sketch.proxies(x, 32, 2, 4)
    assert found.shape == (1, 2, 3, 6, 8)
    assert counts.shape == (1, 3, 6)
    torch.testing.assert_close(found[0, :, 1, 0], x[0, :, 40])


def test_a_single_strong_pair_is_found():
    """One key that one query looks for: the block mean dilutes it 1024-fold, the sketch ranks its block first."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 1, 512, 64) for _ in range(3))
    direction = torch.nn.functional.normalize(torch.randn(64), dim=0)
    q[0, 0, 500], k[0, 0, 77] = 40 * direction, 40 * direction
    config = StemConfig(block_size=64, stride=8)
    assert int(sketch.scores(q, k, v, config)[0, 0, 7].argmax()) == 1
    assert int(oracle.scores(q, k, v, config)[0, 0, 7].argmax()) == 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 5, 0, 4), r"power of two of query means that divides 32, got \(0, 5, 0, 4\)"),
        ((0, 4, 0, 32), r"power of two of key means that divides 16"),
        ((33, 4, 0, 4), r"0 to 32 query outliers"),
        ((0, 4, -1, 4), r"0 to 16 key outliers"),
    ],
)
def test_errors(make_qkv, sizes, message):
    with pytest.raises(ValueError, match=message):
        sketch.scores(*make_qkv(1, 2, 1, 64, 16), CONFIG, sketch=sizes)


def test_coarse_outliers_are_some_of_the_fine_ones(make_qkv):
    config = replace(StemConfig.mass(), coarse=(4, 1))
    with pytest.raises(ValueError, match=r"at least the outliers of coarse=\(4, 1\), got \(2, 8, 4, 8\)"):
        sketch.scores(*make_qkv(1, 2, 1, 64, 16), config, sketch=(2, 8, 4, 8))
