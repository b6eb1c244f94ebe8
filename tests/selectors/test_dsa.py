"""DSA with Stem: lightning scores, the tokens chosen, and attention to them, against loops over queries."""

from __future__ import annotations

import pytest
import torch

from stem_flex import StemConfig, layout, reference
from stem_flex.reference.refined import dsa_keep
from stem_flex.selectors.dsa import Tokens, dsa_tokens, lightning_scores, listed, token_attention

PLAIN = StemConfig(mu=1.0, value_weight=0.0)
CONFIGS = {
    "plain": PLAIN,
    "paper": StemConfig.paper(),
    "operator": StemConfig.operator(),
    "heavy": StemConfig(schedule="paper", mu=0.4, value_weight=1.5),
}


def indexer(batch=2, heads=3, queries=90, keys=None, dim=8):
    """q, k, weights with weights of both signs: relu and sum do not commute with a common sign."""
    keys = queries if keys is None else keys
    kind = dict(dtype=torch.float64)
    q, k = torch.randn(batch, heads, queries, dim, **kind), torch.randn(batch, keys, dim, **kind)
    return q, k, torch.randn(batch, queries, heads, **kind)


def as_mask(tokens: Tokens, keys: int) -> torch.Tensor:
    found = torch.zeros(*tokens.indices.shape[:2], keys + 1, dtype=torch.bool)
    found.scatter_(-1, torch.where(tokens.indices < 0, keys, tokens.indices).long(), True)
    return found[..., :keys]


def test_scores_are_the_published_sum():
    q, k, weights = indexer(queries=7, keys=9)
    expected = torch.zeros(2, 7, 9, dtype=torch.float64)
    for head in range(3):
        for t in range(7):
            for s in range(9):
                product = (q[:, head, t] * k[:, s]).sum(-1)
                expected[:, t, s] += weights[:, t, head] * product.clamp(min=0)
    torch.testing.assert_close(lightning_scores(q, k, weights), expected)
    half = lightning_scores(q.bfloat16(), k.bfloat16(), weights.bfloat16())
    assert half.dtype == torch.float32


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("queries", [1, 33, 90])
def test_tokens_equal_loops(name, queries):
    q, k, weights = indexer(queries=queries)
    v = torch.randn(2, 4, queries, 8, dtype=torch.float64) * torch.rand(2, 4, queries, 1).mul(3).exp()
    found = dsa_tokens(q, k, weights, v, CONFIGS[name], keep=20)
    expected = dsa_keep(q, k, weights, v, CONFIGS[name], keep=20)
    assert torch.equal(as_mask(found, queries), expected)
    assert torch.equal(found.counts, expected.sum(-1, dtype=torch.int32))
    assert found.indices.shape == (2, queries, min(20, queries))


def test_none_is_the_papers_decay():
    q, k, weights = indexer()
    v = torch.randn(2, 4, 90, 8, dtype=torch.float64)
    assert torch.equal(
        dsa_tokens(q, k, weights, v, keep=9).indices, dsa_tokens(q, k, weights, v, StemConfig.paper(), keep=9).indices
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_loops(side):
    q, k, weights = indexer(queries=80)
    v = torch.randn(2, 4, 80, 8, dtype=torch.float64) * 3
    config = CONFIGS["heavy"]
    start, end = ([0, 80 - 47], [80, 80]) if side == "left" else ([0, 0], [80, 47])
    found = dsa_tokens(q, k, weights, v, config, keep=12, layout=layout.padding([80, 47], side))
    assert torch.equal(as_mask(found, 80), dsa_keep(q, k, weights, v, config, keep=12, start=start, end=end))


def test_chunks_choose_what_the_whole_prompt_does():
    """With a metric that looks at no other key; also by an offset that only a tensor says, and in a longer buffer."""
    q, k, weights = indexer(queries=100)
    v = torch.randn(2, 4, 100, 8, dtype=torch.float64) * 3
    whole = dsa_tokens(q, k, weights, v, CONFIGS["paper"], keep=15).indices
    for first, last in ((0, 41), (41, 42), (42, 100)):
        part = q[:, :, first:last], k[:, :last], weights[:, first:last], v[:, :, :last]
        chunk = dsa_tokens(*part, CONFIGS["paper"], keep=15, q_offset=first, prompt_len=100)
        assert torch.equal(chunk.indices, whole[:, first:last, : chunk.indices.shape[2]])
        buffer = dsa_tokens(
            part[0],
            k,
            part[2],
            v,
            CONFIGS["paper"],
            keep=15,
            q_offset=torch.tensor([first, first]),
            prompt_len=100,
            kv_len=torch.tensor([last, last]),
        )
        assert torch.equal(buffer.indices, whole[:, first:last])


def test_strips_do_not_show():
    q, k, weights = indexer()
    v = torch.randn(2, 4, 90, 8, dtype=torch.float64)
    whole = dsa_tokens(q, k, weights, v, keep=9)
    assert torch.equal(whole.indices, dsa_tokens(q, k, weights, v, keep=9, workspace=1).indices)
    assert torch.equal(whole.indices, dsa_tokens(q, k, weights, v, keep=9, workspace=40 * 2 * 90 * 7).indices)


def test_ties_go_to_the_earlier_token_and_nan_comes_last():
    q, k, weights = torch.ones(1, 1, 6, 2), torch.ones(1, 6, 2), torch.ones(1, 6, 1)
    k[:, 1] = float("nan")
    found = dsa_tokens(q, k, weights, torch.ones(1, 1, 6, 2), PLAIN, keep=3)
    assert found.indices[0].tolist() == [[0, -1, -1], [0, 1, -1], [0, 1, 2], [0, 2, 3], [0, 2, 3], [0, 2, 3]]


def test_listed():
    keep = torch.tensor([[True, False, True, True], [False, False, False, False], [False, True, False, False]])
    assert listed(keep, 3).tolist() == [[0, 2, 3], [-1, -1, -1], [1, -1, -1]]


@pytest.mark.parametrize("Hkv", [1, 2, 4])
def test_attention_is_dense_attention_under_the_choice(Hkv, make_qkv):
    """GQA, values of another width, a query without keys; also in the smallest strips."""
    q, k, v = make_qkv(2, 4, Hkv, 70, 16, Dv=24, dtype=torch.float64)
    keep = (torch.rand(2, 70, 70) < 0.3) & torch.ones(70, 70).tril().bool()
    keep[1, 5] = False
    indices = listed(keep, 40)
    expected, _ = reference.masked_attention(q, k, v, keep[:, None], scale=0.3)
    torch.testing.assert_close(token_attention(q, k, v, indices, scale=0.3), expected)
    torch.testing.assert_close(token_attention(q, k, v, indices, scale=0.3, workspace=1), expected)


def test_all_tokens_is_dense_attention(make_qkv):
    q, k, v = make_qkv(2, 4, 2, 65, 16)
    indices = dsa_tokens(*(x.float() for x in indexer(queries=65)), v, PLAIN, keep=65).indices
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(token_attention(q, k, v, indices), expected)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(k=torch.randn(2, 90, 7)), "k must be"),
        (dict(weights=torch.randn(2, 3, 90)), "weights must be"),
        (dict(q=torch.randn(3, 90, 8)), "q must be floats of 4"),
        (dict(v=torch.randn(2, 4, 80, 8)), "v must be"),
        (dict(keep=0), "keep must be at least 1"),
        (dict(workspace=0), "workspace must be at least 1"),
    ],
)
def test_errors_name_the_argument(change, match):
    q, k, weights = indexer()
    given = dict(q=q, k=k, weights=weights, v=torch.randn(2, 4, 90, 8)) | change
    with pytest.raises(ValueError, match=match):
        dsa_tokens(given.pop("q"), given.pop("k"), given.pop("weights"), given.pop("v"), **given)


def test_attention_errors(make_qkv):
    q, k, v = make_qkv(2, 4, 2, 20, 8)
    with pytest.raises(ValueError, match="indices must be int"):
        token_attention(q, k, v, torch.zeros(2, 19, 3, dtype=torch.int32))
