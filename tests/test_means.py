"""Mean correction: against the slow reference, against dense attention where it is exact, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

from stem_flex import StemConfig, compose, layout, reference, stem_attention, stem_block_mask, testing
from stem_flex.attention import sparse_prefill
from stem_flex.mask import layout_block_mask
from stem_flex.plumbing import means
from stem_flex.plumbing.slices import rows_of
from stem_flex.plumbing.tables import block_classes, kept_bits

SMALL = StemConfig(block_size=16, stride=4, schedule="fixed", k_start=1, sink_blocks=0, local_blocks=1)
CONFIG = StemConfig(block_size=64, schedule="fixed", k_start=1, sink_blocks=1, local_blocks=1, correction="mean")


def executed(q, k, v, mask, score_mod=None):
    """Output and log-sum-exp under a BlockMask's lists and mask_mod, in float64."""
    lengths, size = mask.seq_lengths, mask.BLOCK_SIZE
    allowed = create_mask(mask.mask_mod, q.shape[0], q.shape[1], *lengths, device="cpu")  # it may tell heads apart
    partial, full = (
        blocks.repeat_interleave(size[0], 2).repeat_interleave(size[1], 3)[:, :, : lengths[0], : lengths[1]]
        for blocks in reference.dense_blocks(mask)
    )
    tokens = (partial & allowed) | full
    return reference.masked_attention(q, k, v, tokens, score_mod=score_mod)


def two_calls(q, k, v, mask):
    """As on CUDA: the kept blocks, the means, merged."""
    more = means.alone(q, k, v, mask)
    out, lse = executed(q, k, v, mask)
    other, other_lse = executed(q, more.k, more.v, more.mask)
    return means.merged(out, lse, other, other_lse + torch.tensor(mask.BLOCK_SIZE[1]).double().log())


def one_call(q, k, v, mask):
    """As on the CPU: the means behind the tokens."""
    more = means.behind(q, k, v, mask)
    assert more.k.shape[2] == more.mask.seq_lengths[1]
    return executed(q, more.k, more.v, more.mask, more.score_mod)


def expected_of(q, k, v, mask, structure, q_offset=0, kv_len=None):
    tokens = reference.token_mask(structure, q.shape[0], q.shape[1], q.shape[2], k.shape[2], q_offset, kv_len)
    keep = block_classes(mask) > 0
    return reference.mean_corrected_attention(q, k, v, tokens, keep, tuple(mask.BLOCK_SIZE))


@pytest.mark.parametrize("run", [two_calls, one_call])
@given(data=st.data())
def test_the_correction_is_the_references(run, data):
    q, k, v = data.draw(testing.qkv(dtypes=(torch.float64,), past=(0, 60)))
    structure = data.draw(testing.layouts(q, k, mask_mod=False))
    offset, config = k.shape[2] - q.shape[2], data.draw(testing.stem_configs(max_blocks=2, schedules=("fixed",)))
    config = replace(config, sink_blocks=0, local_blocks=data.draw(st.integers(0, 1)))
    mask = stem_block_mask(q, k, v, config, layout=structure, q_offset=offset)
    expected = expected_of(q, k, v, mask, structure, offset)
    # means are of q's dtype, summed in float32
    for got, want in zip(run(q, k, v, mask), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("run", [two_calls, one_call])
def test_chunks_of_a_buffer_whose_rows_differ(run, make_qkv):
    q, k, v = make_qkv(Lq=70, Lk=300, dtype=torch.float64)
    offset, valid = torch.tensor([130, 201]), torch.tensor([200, 271])
    structure = layout.causal()
    mask = stem_block_mask(q, k, v, SMALL, layout=structure, q_offset=offset, kv_len=valid)
    expected = expected_of(q, k, v, mask, structure, offset, valid)
    dropped = executed(q, k, v, mask)
    for got, want, without in zip(run(q, k, v, mask), expected, dropped, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(got, without, atol=1e-2)


def equal_keys(k, block):
    """The first key of each block in all of its places."""
    return k[:, :, ::block].repeat_interleave(block, 2)[:, :, : k.shape[2]]


@pytest.mark.parametrize("run", [two_calls, one_call])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (7, 1)])
def test_blocks_of_equal_keys_lose_nothing(run, heads, make_qkv):
    q, k, v = make_qkv(Hq=heads[0], Hkv=heads[1], Lq=250, dtype=torch.float64)
    k = equal_keys(k, 16)
    mask = stem_block_mask(q, k, v, SMALL)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert not torch.allclose(executed(q, k, v, mask)[0], dense, atol=1e-2)
    torch.testing.assert_close(run(q, k, v, mask)[0], dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("run", [two_calls, one_call])
def test_where_nothing_is_dropped_nothing_changes(run, make_qkv):
    q, k, v = make_qkv(Lq=100, dtype=torch.float64)
    structure = layout.padding([100, 63])
    mask = layout_block_mask(structure, 2, 4, 100, 100, block_size=16)
    for got, want in zip(run(q, k, v, mask), executed(q, k, v, mask), strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    assert run(q, k, v, mask)[1][1, :, :37].isneginf().all()


def test_means_are_lower_bounds_of_the_mass(make_qkv):
    q, k, v = make_qkv(Lq=250, dtype=torch.float64)
    mask = stem_block_mask(q, k, v, SMALL)
    corrected, dense = two_calls(q, k, v, mask)[1], executed(q, k, v, layout_block_mask(
        layout.causal(), 2, 4, 250, 250, block_size=16))[1]  # fmt: skip
    assert (corrected <= dense + 1e-6).all()
    assert (corrected >= executed(q, k, v, mask)[1] - 1e-6).all()


def test_bits_are_the_lists(make_qkv):
    q, k, v = make_qkv(Lq=40 * 16 - 3)
    for mask in (
        stem_block_mask(q, k, v, replace(SMALL, k_start=7)),
        stem_block_mask(q, k, v, SMALL)._adjust(600, 630),
    ):
        bits = kept_bits(mask)
        assert bits.dtype == torch.int32
        block = torch.arange(40)
        assert torch.equal((bits[..., block // 32] >> (block % 32)) & 1 == 1, block_classes(mask) > 0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_attention_is_the_references(make_qkv, dtype):
    for length in (500, 320):
        q, k, v = make_qkv(Lq=length, D=32, dtype=dtype)
        got = stem_attention(q, k, v, CONFIG)
        assert got.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        expected = reference.stem_attention(q, k, v, CONFIG)
        torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)
        without = reference.stem_attention(q, k, v, replace(CONFIG, correction=None))
        assert not torch.allclose(without, expected, atol=0.1)


def test_compiled_attention_of_padded_rows_and_equal_keys(make_qkv):
    q, k, v = make_qkv(Lq=500, D=32)
    k = equal_keys(k, 64)
    structure = layout.padding([500, 320])
    got = stem_attention(q, k, v, CONFIG, layout=structure)
    expected = reference.masked_attention(q, k, v, reference.token_mask(structure, 2, 4, 500, 500))[0]
    torch.testing.assert_close(got.double()[0], expected[0], atol=1e-5, rtol=1e-5)
    want = reference.stem_attention(q, k, v, CONFIG, layout=structure)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


def test_what_is_not_served_is_refused(make_qkv):
    q, k, v = make_qkv(Lq=200, D=32)
    mask = stem_block_mask(q, k, v, CONFIG)
    with pytest.raises(ValueError, match=r"correction must be one of \(None, 'mean'\), got 'median'"):
        sparse_prefill(q, k, v, mask, correction="median")
    with pytest.raises(ValueError, match="correction must be one of"):
        StemConfig(correction="median")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="correction='mean' serves no score_mod"):
        stem_attention(q, k, v, CONFIG, score_mod=lambda score, b, h, i, j: score)
    with pytest.raises(ValueError, match="correction='mean' has no backward"):
        sparse_prefill(q.clone().requires_grad_(), k, v, mask, correction="mean")
    exact = stem_block_mask(q, k, v, CONFIG, mask_mod="exact")
    with pytest.raises(ValueError, match="needs a block_mask of stem_block_mask with mask_mod='layout'"):
        sparse_prefill(q, k, v, exact, correction="mean")
    composed = compose(mask, lambda b, h, i, j: (i - j) % 3 > 0)
    with pytest.raises(ValueError, match="needs a layout of one interval of keys for each query"):
        sparse_prefill(q, k, v, composed, correction="mean")
    traced = torch.compile(stem_attention, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="correction='mean' is not served inside"):
        traced(q, k, v, CONFIG)
    with pytest.raises(ValueError, match="return_lse must be False on the CPU"):
        stem_attention(q, k, v, CONFIG, return_lse=True)


@given(data=st.data())
def test_rows_apart_are_the_rows_of_the_whole(data):
    q, k, v = data.draw(testing.qkv(dtypes=(torch.float64,), past=(0, 60), q_len=(40, 200)))
    structure = data.draw(testing.layouts(q, k, mask_mod=False))
    (B, H, Lq, _), Lk = q.shape, k.shape[2]
    bound = structure.bind(B, H, Lq, Lk, q_offset=Lk - Lq, block_size=(16, 16))
    whole = two_calls(q, k, v, stem_block_mask(q, k, v, SMALL, layout=bound))
    for first, last in ((0, 1), (1, bound.q_blocks)):
        rows = slice(first * 16, min(last * 16, Lq))
        mask = stem_block_mask(q[:, :, rows], k, v, SMALL, layout=rows_of(bound, first, last))
        for got, want in zip(two_calls(q[:, :, rows], k, v, mask), whole, strict=True):
            torch.testing.assert_close(got, want[:, :, rows], atol=1e-9, rtol=1e-9)


def test_a_composed_interval_is_served(make_qkv):
    q, k, v = make_qkv(Lq=250, dtype=torch.float64)
    mask = compose(stem_block_mask(q, k, v, SMALL), layout.sliding_window(130))
    expected = expected_of(q, k, v, mask, layout.sliding_window(130))
    torch.testing.assert_close(two_calls(q, k, v, mask)[0], expected[0], atol=1e-5, rtol=1e-5)
