"""InfLLM-v2 with Stem: the blocks of each token against loops, the bits, and the BlockMask that runs them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stem_flex import StemConfig, reference
from stem_flex.attention import sparse_prefill
from stem_flex.budget import Mass
from stem_flex.plumbing.classes import over_tokens
from stem_flex.plumbing.tables import block_classes, block_mask_mod
from stem_flex.reference.refined import infllm_keep
from stem_flex.selectors.infllm import InfLLM, folded, infllm_blocks
from stem_flex.testing import assert_valid_block_mask

PLAIN = StemConfig(mu=1.0, value_weight=0.0)
CONFIGS = {"plain": PLAIN, "stem": StemConfig(schedule="paper", mu=0.5, value_weight=0.8)}
SIZES = InfLLM(keep=6, block=16, window=8, stride=4, first=1, local=2)


def keywords(sizes: InfLLM) -> dict:
    return {name: getattr(sizes, name) for name in ("keep", "block", "window", "stride", "first", "local")}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("length", [1, 7, 130])
def test_blocks_equal_loops(name, length, make_qkv):
    q, k, v = make_qkv(2, 4, 2, length, 8, dtype=torch.float64)
    found = infllm_blocks(q, k, v, CONFIGS[name], sizes=SIZES)
    expected = infllm_keep(q, k, v, CONFIGS[name], **keywords(SIZES))
    assert torch.equal(found.dense(), expected)
    assert torch.equal(found.kept, expected.sum(-1, dtype=torch.int32))


def test_a_mass_budget_equals_loops(make_qkv):
    """Blocks whose own mass exceeds the threshold: rows keep fewer or more than a decay would leave them."""
    q, k, v = make_qkv(2, 4, 2, 130, 8, dtype=torch.float64)
    found = infllm_blocks(q * 3, k, v, CONFIGS["stem"], sizes=SIZES, budget=Mass(0.6, cap=None))
    expected = infllm_keep(q * 3, k, v, CONFIGS["stem"], **keywords(SIZES), threshold=0.6)
    assert torch.equal(found.dense(), expected)
    assert len(found.kept[0, 0, 100:].unique()) > 1


def test_the_published_sizes_equal_loops(make_qkv):
    q, k, v = make_qkv(1, 4, 1, 1100, 8, dtype=torch.float64)
    sizes = InfLLM(keep=8, local=3)
    found = infllm_blocks(q[:, :, 1060:], k, v, CONFIGS["stem"], sizes=sizes, q_offset=1060)
    expected = infllm_keep(q[:, :, 1060:], k, v, CONFIGS["stem"], **keywords(sizes), q_offset=1060)
    assert torch.equal(found.dense(), expected)


def test_rows_of_different_lengths_equal_loops(make_qkv):
    q, k, v = make_qkv(2, 4, 2, 150, 8, dtype=torch.float64)
    found = infllm_blocks(q, k, v, CONFIGS["stem"], sizes=SIZES, kv_len=torch.tensor([150, 83])).dense()
    expected = infllm_keep(q, k, v, CONFIGS["stem"], **keywords(SIZES), end=[150, 83])
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1, :, :83], expected[1, :, :83])


def test_chunks_and_strips_choose_what_the_whole_prompt_does(make_qkv):
    """Chunks with a metric that looks at no other key, and the prompt's length."""
    q, k, v = make_qkv(2, 4, 2, 300, 8, dtype=torch.float64)
    config = StemConfig(schedule="paper", metric="log", value_weight=0.5)
    whole = infllm_blocks(q, k, v, config, sizes=SIZES)
    small = infllm_blocks(q, k, v, config, sizes=SIZES, workspace=1)
    for name in ("words", "some", "all", "kept"):
        assert torch.equal(getattr(small, name), getattr(whole, name))
    for first, last in ((0, 160), (160, 161), (161, 300)):
        part = q[:, :, first:last], k[:, :, :last], v[:, :, :last]
        chunk = infllm_blocks(*part, config, sizes=SIZES, q_offset=first, prompt_len=300).dense()
        assert torch.equal(chunk, whole.dense()[:, :, first:last, : chunk.shape[-1]])


def test_bits_hold_every_block_of_a_word():
    """The 32nd block of a word is an int32's sign."""
    q = torch.randn(1, 1, 70 * 16, 4)
    found = infllm_blocks(q, q, q, PLAIN, sizes=InfLLM(keep=70, block=16, window=8, stride=4, local=2))
    rows = torch.arange(70 * 16)[:, None] // 16
    assert torch.equal(found.dense()[0, 0], torch.arange(70) <= rows)
    assert found.words.shape[-1] == 3


@pytest.mark.parametrize("length", [256, 203])
def test_block_mask_says_each_tokens_choice(length, make_qkv):
    """Lists and mask_mod together are the choice, token by token; full blocks are those that all queries chose."""
    q, k, v = make_qkv(2, 4, 2, length, 8)
    found = infllm_blocks(q, k, v, CONFIGS["stem"], sizes=SIZES)
    mask = found.block_mask()
    assert_valid_block_mask(mask)
    tokens = found.dense().repeat_interleave(16, -1)[..., :length] & torch.ones(length, length).tril().bool()
    index = torch.arange(length)
    kept = over_tokens(block_mask_mod(mask), torch.arange(4), torch.arange(1), index, index)
    assert torch.equal(kept[:, 0], tokens.flatten(0, 1))
    padded = torch.nn.functional.pad(tokens, (0, -length % 16, 0, -length % 128))
    tiles = padded.unflatten(3, (-1, 16)).unflatten(2, (-1, 128)).transpose(3, 4).flatten(4)
    expected = tiles.any(-1).to(torch.int8) + tiles.all(-1)
    assert torch.equal(block_classes(mask)[:, 0], expected.flatten(0, 1))


def test_flex_attention_runs_it(make_qkv):
    """Compiled flex_attention is dense attention under the choice, in chunks and with rows of different lengths."""
    q, k, v = make_qkv(2, 4, 2, 330, 16)
    every = replace(SIZES, keep=40)
    for first, lengths, sizes in ((0, [330, 200], SIZES), (130, [330, 330], SIZES), (130, [330, 330], every)):
        kv_len, offset = torch.tensor(lengths), torch.tensor([first, first])
        found = infllm_blocks(q[:, :, first:], k, v, CONFIGS["stem"], sizes=sizes, q_offset=offset, kv_len=kv_len)
        inputs = [folded(x, 2) for x in (q[:, :, first:], k, v)]
        out = sparse_prefill(*inputs, found.block_mask()).view(2, 4, -1, 16)
        keep = found.dense().repeat_interleave(16, -1)[..., :330].repeat_interleave(2, 1)
        keep = keep & torch.ones(330, 330).tril().bool()[first:]
        expected, _ = reference.masked_attention(q[:, :, first:], k, v, keep)
        single, _ = reference.masked_attention(q[:, :, first:], k, v, keep, dtype=None)
        for b, end in enumerate(lengths):
            real = (b, slice(None), slice(0, end - first))
            assert (out[real] - expected[real]).abs().max() <= 2 * (single[real] - expected[real]).abs().max() + 1e-6


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(keep=10), "keep must be at least first"),
        (dict(window=24), "block must be a power of two"),
        (dict(block=48), "block must be a power of two"),
        (dict(first=-1), "first must be"),
        (dict(local=0), "local must be at least 1"),
    ],
)
def test_sizes_are_checked(change, match):
    with pytest.raises(ValueError, match=match):
        InfLLM(**change)


def test_errors_name_the_argument(make_qkv):
    q, k, v = make_qkv(1, 4, 2, 40, 8)
    with pytest.raises(TypeError, match="sizes must be"):
        infllm_blocks(q, k, v, sizes=96)
    with pytest.raises(ValueError, match="workspace"):
        infllm_blocks(q, k, v, workspace=0)
    with pytest.raises(ValueError, match="kv_len"):
        infllm_blocks(q, k, v, kv_len=41)
