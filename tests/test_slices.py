"""Rows of a bound layout against the whole: what context parallel prefill stands on."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stem_flex import StemConfig, layout, reference, stem_block_mask, testing
from stem_flex.attention import sparse_prefill
from stem_flex.plumbing.slices import rows_of
from stem_flex.plumbing.tables import block_classes


def kept(mask):
    partial, full = reference.dense_blocks(mask)
    return partial | full


@given(st.data())
def test_rows_chosen_apart_are_the_rows_of_one_choice(data):
    config = data.draw(testing.stem_configs())
    q, k, v = data.draw(testing.qkv(past=(0, 60), dtypes=(torch.float64,), ties=False))
    (B, Hq, Lq, _), Lk = q.shape, k.shape[2]
    structure = data.draw(testing.layouts(q, k))
    keywords = {"q_offset": Lk - Lq, "kv_len": data.draw(st.none() | st.integers(0, Lk))}
    block = (config.query_block, config.key_block)
    whole = stem_block_mask(q, k, v, config, layout=structure, **keywords)
    bound = structure.bind(B, Hq, Lq, Lk, block_size=block, **keywords)
    cuts = sorted(data.draw(st.sets(st.integers(0, bound.q_blocks), max_size=3)) | {0, bound.q_blocks})
    for first, last in pairwise(cuts):
        rows = slice(first * config.query_block, min(last * config.query_block, Lq))
        part = stem_block_mask(q[:, :, rows], k, v, config, layout=rows_of(bound, first, last))
        testing.assert_valid_block_mask(part)
        assert torch.equal(kept(part), kept(whole)[:, :, first:last])
        assert torch.equal(reference.dense_mask(part), reference.dense_mask(whole)[:, :, rows])


@pytest.mark.parametrize("offset", [0, 40, torch.tensor([3, 17])], ids=str)
def test_padded_queries_and_offsets_of_a_slice(make_qkv, offset):
    q, k, v = make_qkv(Lq=150, Lk=200, dtype=torch.float64)
    config = StemConfig(block_size=16, stride=4, schedule="fixed", k_start=2, sink_blocks=0, local_blocks=0)
    padded = layout.padding([120, 35], "left")
    whole = stem_block_mask(q, k, v, config, layout=padded, q_offset=offset)
    bound = padded.bind(2, 4, 150, 200, q_offset=offset, block_size=(16, 16))
    for first, last in ((0, 3), (3, 10), (2, 4)):
        rows = slice(first * 16, min(last * 16, 150))
        part = stem_block_mask(q[:, :, rows], k, v, config, layout=rows_of(bound, first, last))
        assert torch.equal(kept(part), kept(whole)[:, :, first:last])
        assert torch.equal(reference.dense_mask(part), reference.dense_mask(whole)[:, :, rows])


def test_slices_are_remembered_with_their_binding():
    bound = layout.causal().bind(1, 2, 100, 100, block_size=(16, 16))
    assert rows_of(bound, 2, 5) is rows_of(bound, 2, 5)
    assert rows_of(bound, 2, 5).causal_offset == 32
    assert rows_of(bound, 0, 5).mask_mod is bound.mask_mod


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "flash"])
@pytest.mark.parametrize("length", [8192, 8192 - 57])
def test_rows_apart_on_a_gpu(make_qkv, backend, length):
    """Compiled kernels under masks of rows, keys in memory by tokens as ranks gather them."""
    if backend == "flash":
        pytest.importorskip("flash_attn.cute", reason="flash-attn-4 is not installed")
    q, k, v = make_qkv(1, 8, 2, length, 64, dtype=torch.bfloat16, device="cuda")
    k, v = (x.movedim(2, 0).contiguous().movedim(0, 2) for x in (k, v))
    config = StemConfig(schedule="fixed", k_start=8)
    for structure in (layout.causal(), layout.documents([0, 3000, length]), layout.sliding_window(2000)):
        whole = stem_block_mask(q, k, v, config, layout=structure)
        expected = sparse_prefill(q, k, v, whole, backend=backend)
        for first, last in ((0, 20), (20, 57), (57, 64)):
            rows = slice(first * 128, min(last * 128, length))
            part = stem_block_mask(q[:, :, rows], k, v, config, layout=rows_of(whole.structure, first, last))
            assert torch.equal(block_classes(part), block_classes(whole)[:, :, first:last])
            out = sparse_prefill(q[:, :, rows], k, v, part, backend=backend)
            assert (out - expected[:, :, rows]).abs().max() <= 1e-2 * expected.abs().max()
