"""The assertions catch what they say they catch; the strategies draw what they promise."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from stem_flex import StemConfig, layout, reference, stem_block_mask, testing

SMALL = StemConfig(block_size=16, stride=4, schedule="fixed", k_start=2, sink_blocks=0, local_blocks=0)


def causal_mod(b, h, i, j):
    return i >= j


def rebuilt(mask, **changes):
    """The mask with other tables; contiguous copies of the old ones."""
    names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
    tables = [changes.get(name, getattr(mask, name)) for name in names]
    return BlockMask.from_kv_blocks(
        *tables,
        BLOCK_SIZE=changes.get("BLOCK_SIZE", mask.BLOCK_SIZE),
        mask_mod=changes.get("mask_mod", mask.mask_mod),
        seq_lengths=mask.seq_lengths,
        compute_q_blocks=False,
    )


@pytest.fixture
def causal():
    return create_block_mask(causal_mod, 1, 2, 100, 100, device="cpu", BLOCK_SIZE=16)


@pytest.mark.parametrize("f", [causal_mod, lambda b, h, i, j: (i - j).abs() < 20, lambda b, h, i, j: i + j < 0])
def test_torchs_masks_are_valid(f):
    for size in (16, 32, (32, 16)):
        testing.assert_valid_block_mask(create_block_mask(f, 1, 2, 100, 90, device="cpu", BLOCK_SIZE=size))


def edited(tensor, index, value):
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


def broken_masks():
    mask = create_block_mask(causal_mod, 1, 2, 100, 100, device="cpu", BLOCK_SIZE=16)
    partial, full = mask.kv_indices, mask.full_kv_indices
    row = (0, 1, 5)
    yield "counts outside", {"full_kv_num_blocks": edited(mask.full_kv_num_blocks, row, 8)}
    yield "counts outside", {"kv_num_blocks": edited(mask.kv_num_blocks, row, -1)}
    yield "indices outside", {"full_kv_indices": edited(full, (*row, 4), 7)}
    yield "indices not ascending", {"full_kv_indices": edited(full, (*row, 1), 3)}
    yield "indices not ascending", {"full_kv_indices": edited(full, (*row, 1), 0)}
    yield "both the partial and the full list", {"full_kv_indices": edited(full, (*row, 4), 5)}
    yield "full list that the mask_mod makes another class", {"mask_mod": lambda b, h, i, j: (i >= j) & (i - j != 30)}
    yield "partial list that the mask_mod makes another class", {"mask_mod": lambda b, h, i, j: (i >= j) | (i < 16)}
    yield (
        "keeps no block although",
        {
            "kv_num_blocks": edited(mask.kv_num_blocks, (0, 1, 0), 0),
        },
    )
    yield "differ in strides", {"full_kv_indices": torch.cat([full, full], -1)[..., :7]}
    yield "not int32", {"kv_indices": partial.long()}
    yield "rows for 100 queries", {"BLOCK_SIZE": (32, 16)}


@pytest.mark.parametrize(("message", "changes"), list(broken_masks()))
def test_broken_masks_are_caught(causal, message, changes):
    testing.assert_valid_block_mask(rebuilt(causal))
    with pytest.raises(AssertionError, match=message):
        testing.assert_valid_block_mask(rebuilt(causal, **changes))


def test_mask_mods_that_read_past_the_lengths_are_caught(causal):
    short = torch.arange(100)
    reading = rebuilt(causal, mask_mod=lambda b, h, i, j: short[i] >= j)
    with pytest.raises(AssertionError, match="must take indices up to whole blocks"):
        testing.assert_valid_block_mask(reading)


def test_classes_and_empty_rows_are_checked_unless_told_not_to(causal):
    empty = rebuilt(causal, kv_num_blocks=edited(causal.kv_num_blocks, (0, 1, 0), 0))
    testing.assert_valid_block_mask(empty, allow_empty_rows=True)
    testing.assert_valid_block_mask(rebuilt(causal, mask_mod=lambda b, h, i, j: i < j), check_classes=False)


def test_dense_masks_read_narrow_tables():
    causal = create_block_mask(causal_mod, 1, 2, 96, 96, device="cpu", BLOCK_SIZE=16)
    dense = testing.block_mask_to_dense(causal)
    assert torch.equal(dense, torch.ones(96, 96, dtype=torch.bool).tril().expand(1, 2, -1, -1))
    counts = causal.full_kv_num_blocks.clamp(max=2)
    narrow = rebuilt(
        causal,
        kv_indices=causal.kv_indices[..., :2],
        full_kv_indices=causal.full_kv_indices[..., :2],
        full_kv_num_blocks=counts,
    )
    testing.assert_valid_block_mask(narrow)
    assert testing.block_mask_to_dense(narrow)[0, 0].sum() < dense[0, 0].sum()


def test_optimal_selections_pass_and_others_do_not(make_qkv):
    q, k, v = make_qkv(Lq=160, dtype=torch.float64)
    scores = reference.oam_scores(q, k, v, SMALL)
    diagonal = torch.eye(10, dtype=torch.bool)
    mask = stem_block_mask(q, k, v, SMALL, budget=3)
    testing.assert_selection_optimal(mask, scores, 3, forced=diagonal)
    testing.assert_selection_optimal(mask, scores + 1e-9 * torch.randn(10, 10), 3, forced=diagonal, atol=1e-6)
    with pytest.raises(AssertionError, match="beyond the budget"):
        testing.assert_selection_optimal(mask, scores, 3)
    with pytest.raises(AssertionError, match="beyond the budget"):
        testing.assert_selection_optimal(mask, scores, 2, forced=diagonal)
    with pytest.raises(AssertionError, match="better blocks left out"):
        testing.assert_selection_optimal(mask, scores, 4, forced=diagonal)
    with pytest.raises(AssertionError, match=r"better blocks left out|beyond the budget"):
        testing.assert_selection_optimal(mask, -scores, 3, forced=diagonal, allowed=~scores.isneginf(), atol=1e-6)
    with pytest.raises(AssertionError, match=r"forced blocks .* are missing"):
        testing.assert_selection_optimal(mask, scores, 3, forced=torch.ones(10, 10).bool())
    with pytest.raises(AssertionError, match="are not allowed"):
        testing.assert_selection_optimal(mask, scores, 3, forced=diagonal, allowed=diagonal)


@given(st.data())
def test_layouts_without_sizes_fit_everything(data):
    q, k, v = data.draw(testing.qkv(q_len=(1, 60)))
    config, structure = data.draw(testing.stem_configs()), data.draw(testing.layouts())
    testing.assert_valid_block_mask(stem_block_mask(q, k, v, config, layout=structure))


@given(testing.qkv(past=(0, 9), value_dims=(24,), dtypes=(torch.float16, torch.float32), groups=(3,)))
def test_inputs_have_the_shapes_asked_for(qkv):
    q, k, v = qkv
    assert q.dtype == k.dtype == v.dtype
    assert q.shape[1] == 3 * k.shape[1]
    assert k.shape[2] == v.shape[2]
    assert 0 <= k.shape[2] - q.shape[2] <= 9
    assert v.shape[3] == 24
    assert all(x.isfinite().all() for x in qkv)


@given(st.data())
def test_mask_mods_may_be_read_past_the_lengths(data):
    q, k, _ = data.draw(testing.qkv())
    f = data.draw(testing.mask_mods(q, k))
    mask = create_block_mask(f, *q.shape[:3], k.shape[2], device="cpu", BLOCK_SIZE=64)
    testing.assert_valid_block_mask(mask)
    assert f.__name__ != "<lambda>"


@given(st.data())
def test_causal_layouts_are_causal(data):
    q, k, _ = data.draw(testing.qkv())
    structure = data.draw(testing.layouts(q, k, causal_only=True))
    tokens = reference.token_mask(structure, *q.shape[:3], k.shape[2])
    assert not tokens.triu(1).any()


@given(st.data())
def test_the_documented_example(data):
    q, k, v = data.draw(testing.qkv())
    config = data.draw(testing.stem_configs())
    structure = data.draw(testing.layouts(q, k))
    mask = stem_block_mask(q, k, v, config, layout=structure)
    testing.assert_valid_block_mask(mask)
    assert testing.block_mask_to_dense(mask).any(-1).shape == q.shape[:3]


def test_assertions_need_no_hypothesis():
    code = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "from stem_flex import testing\n"
        "try: testing.qkv()\n"
        "except ImportError as error: assert 'stem-flex[test]' in str(error)\n"
        "else: raise SystemExit('qkv() without hypothesis')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_reference_block_masks_are_valid(make_qkv):
    q, k, v = make_qkv(Lq=100)
    structure = layout.padding([100, 33]) & layout.sliding_window(40)
    testing.assert_valid_block_mask(reference.stem_block_mask(q, k, v, SMALL, layout=structure))
