"""compose: the intersection of what two masks keep, exact classes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from stem_flex import StemConfig, compose, layout, reference, stem_block_mask, testing
from stem_flex.mask import layout_block_mask

SMALL = StemConfig(block_size=16, stride=4, schedule="fixed", k_start=3, sink_blocks=1, local_blocks=1)


def check(mask, other, other_tokens):
    """``compose(mask, other)`` is the intersection: tokens, classes, tables."""
    both = compose(mask, other)
    expected = testing.block_mask_to_dense(mask) & other_tokens
    assert torch.equal(testing.block_mask_to_dense(both), expected)
    testing.assert_valid_block_mask(both, allow_empty_rows=True)
    classes = reference.block_classes(expected, mask.BLOCK_SIZE)
    assert both.BLOCK_SIZE == mask.BLOCK_SIZE
    for got, wanted in zip(reference.dense_blocks(both), (1, 2), strict=True):
        # A block of the lists may be chosen whole only if its mask_mod allows it whole.
        assert torch.equal(got, classes == wanted)
    return both


@st.composite
def masks(draw, **options):
    q, k, v = draw(testing.qkv(past=(0, 40), groups=(1, 2), **options))
    config = draw(testing.stem_configs())
    offset = draw(st.integers(0, k.shape[2] - q.shape[2]))
    structure = draw(testing.layouts(q, k, max_parts=2))
    mask = stem_block_mask(q, k, v, config, layout=structure, q_offset=offset)
    return mask, q, k, offset


@given(st.data())
def test_with_a_layout(data):
    mask, q, k, offset = data.draw(masks())
    other = data.draw(testing.layouts(q, k, max_parts=2))
    check(mask, other, reference.token_mask(other, *q.shape[:3], k.shape[2], offset))


@given(st.data())
def test_with_a_mask_mod(data):
    mask, q, k, _ = data.draw(masks())
    f = data.draw(testing.mask_mods(q, k))
    check(mask, f, create_mask(f, *q.shape[:3], k.shape[2], device="cpu"))


@given(st.data())
def test_with_torchs_block_mask_of_any_block_size(data):
    mask, q, k, _ = data.draw(masks())
    f = data.draw(testing.mask_mods(q, k))
    size = data.draw(st.sampled_from([16, 32, (32, 16), 128]))
    by_head = f.__name__.startswith(("block_table", "head_window"))
    B, H = (full if by_head else data.draw(st.sampled_from([1, full])) for full in q.shape[:2])
    other = create_block_mask(f, B, H, q.shape[2], k.shape[2], device="cpu", BLOCK_SIZE=size)
    check(mask, other, testing.block_mask_to_dense(other))


@given(st.data())
def test_with_another_stem_mask(data):
    mask, q, k, offset = data.draw(masks())
    structure = data.draw(testing.layouts(q, k, max_parts=2))
    other = stem_block_mask(q.flip(2), k, k, data.draw(testing.stem_configs()), layout=structure, q_offset=offset)
    check(mask, other, testing.block_mask_to_dense(other))


@given(st.data())
def test_torchs_block_masks_compose_too(data):
    q, k, _ = data.draw(testing.qkv(groups=(1,)))
    first, second = (data.draw(testing.mask_mods(q, k)) for _ in range(2))
    mask = create_block_mask(first, *q.shape[:3], k.shape[2], device="cpu", BLOCK_SIZE=32)
    check(mask, second, create_mask(second, *q.shape[:3], k.shape[2], device="cpu"))


def test_equals_the_reference(make_qkv):
    mask = stem_block_mask(*make_qkv(Lq=100), SMALL)
    for other in (layout.sliding_window(37), lambda b, h, i, j: (i - j) % 3 == 0, mask):
        got, expected = compose(mask, other), reference.compose(mask, other)
        assert torch.equal(got.to_dense(), expected.to_dense())
        assert torch.equal(testing.block_mask_to_dense(got), testing.block_mask_to_dense(expected))


def test_with_itself_changes_nothing(make_qkv):
    mask = stem_block_mask(*make_qkv(Lq=100), SMALL)
    for got, expected in zip(reference.dense_blocks(compose(mask, mask)), reference.dense_blocks(mask), strict=True):
        assert torch.equal(got, expected)


def test_blocks_left_out_do_not_come_back(make_qkv):
    mask = stem_block_mask(*make_qkv(Lq=200), SMALL)
    both = compose(mask, layout.full())
    assert torch.equal(testing.block_mask_to_dense(both), testing.block_mask_to_dense(mask))
    assert not testing.block_mask_to_dense(both)[:, :, -1].all()


def test_chains(make_qkv):
    mask = stem_block_mask(*make_qkv(Lq=100), SMALL)
    window, documents = layout.sliding_window(40), layout.documents([0, 37, 100])
    chained = compose(compose(mask, window), documents)
    together = compose(mask, window & documents)
    assert torch.equal(testing.block_mask_to_dense(chained), testing.block_mask_to_dense(together))
    assert torch.equal(chained.to_dense(), together.to_dense())


def test_offsets_of_a_chunk_are_kept(make_qkv):
    q, k, v = make_qkv(Lq=40, Lk=100)
    mask = stem_block_mask(q, k, v, SMALL, q_offset=torch.tensor([60, 17]), kv_len=90)
    window = layout.sliding_window(30)
    check(mask, window, reference.token_mask(window, 2, 4, 40, 100, torch.tensor([60, 17]), 90))


def test_heads_are_broadcast(make_qkv):
    mask = stem_block_mask(*make_qkv(Lq=100), SMALL)
    shared = create_block_mask(lambda b, h, i, j: i - j < 50, None, None, 100, 100, device="cpu", BLOCK_SIZE=16)
    assert compose(mask, shared).kv_num_blocks.shape[:2] == (2, 4)
    assert compose(shared, mask).kv_num_blocks.shape[:2] == (2, 4)


def test_query_tables_follow(make_qkv):
    mask = stem_block_mask(*make_qkv(Lq=100), SMALL, compute_q_blocks=True)
    both = compose(mask, layout.sliding_window(40))
    partial, _ = reference.dense_blocks(both)
    assert torch.equal(both.q_num_blocks, partial.sum(-2).int())
    assert compose(stem_block_mask(*make_qkv(Lq=100), SMALL), layout.causal()).q_indices is None


def test_wrong_arguments_are_refused(make_qkv):
    mask = stem_block_mask(*make_qkv(Lq=100), SMALL)
    with pytest.raises(TypeError, match="block_mask must be a BlockMask, got str"):
        compose("mask", mask)
    with pytest.raises(TypeError, match="other must be a BlockMask, a layout or a mask_mod, got int"):
        compose(mask, 3)
    shorter = stem_block_mask(*make_qkv(Lq=90), SMALL)
    with pytest.raises(ValueError, match=r"other must have block_mask's lengths \(100, 100\), got \(90, 90\)"):
        compose(mask, shorter)
    heads = stem_block_mask(*make_qkv(Hq=6, Lq=100), SMALL)
    with pytest.raises(ValueError, match="other must have block_mask's H=4 or 1, got 6"):
        compose(mask, heads)
    elsewhere = BlockMask.from_kv_blocks(
        torch.zeros(1, 1, 7, dtype=torch.int32, device="meta"),
        torch.zeros(1, 1, 7, 7, dtype=torch.int32, device="meta"),
        BLOCK_SIZE=16,
        seq_lengths=(100, 100),
        compute_q_blocks=False,
    )
    with pytest.raises(ValueError, match="other must be on block_mask's device cpu, got meta"):
        compose(mask, elsewhere)


def dense_of(mask):
    return testing.block_mask_to_dense(mask)


@pytest.mark.parametrize("what", ["q_offset", "kv_len", "padding", "prefix"])
def test_a_mask_stays_what_it_was_when_its_tensors_move(make_qkv, what):
    q, k, v = make_qkv(B=1, Hq=1, Hkv=1, Lq=64, Lk=96)
    value = torch.tensor([32])
    options = {what: value} if what in ("q_offset", "kv_len") else {"layout": getattr(layout, what)(value)}
    mask = stem_block_mask(q, k, v, SMALL, **options)
    before = dense_of(mask)
    value.fill_(5)
    assert torch.equal(dense_of(compose(mask, layout.full())), before)
    window = layout.sliding_window(20)
    offset = 32 if what == "q_offset" else 0
    expected = before & reference.token_mask(window, 1, 1, 64, 96, offset)
    assert torch.equal(dense_of(compose(mask, window)), expected)


@pytest.mark.parametrize(
    "other",
    [
        layout.padding([30, 20]),
        layout.prefix(torch.tensor([9, 40])),
        layout.documents(ids=torch.arange(128).view(2, 64) // 20),
    ],
    ids=["padding", "prefix", "documents"],
)
def test_a_mask_of_one_row_takes_a_layout_of_several(other):
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 64, 64, device="cpu", BLOCK_SIZE=16)
    both = compose(mask, other)
    assert both.kv_num_blocks.shape[0] == 2
    tokens = reference.token_mask(other & layout.causal(), 2, 1, 64, 64, 0)
    assert torch.equal(dense_of(both), tokens)


def test_tables_do_not_grow_with_every_composition(make_qkv):
    mask = stem_block_mask(*make_qkv(B=1, Hq=1, Hkv=1, Lq=1024), SMALL)
    widths = []
    for _ in range(4):
        mask = compose(mask, layout.from_mask_mod(lambda b, h, i, j: i - j < 500, 1, 1, 1024, 1024))
        widths.append(mask.kv_indices.stride(2))
    assert len(set(widths)) == 1


def test_masks_of_tensor_and_int_offsets_compose():
    ours = layout_block_mask(layout.causal(), 2, 1, 32, 64, q_offset=torch.tensor([0, 32]), block_size=16)
    theirs = layout_block_mask(layout.causal(), 2, 1, 32, 64, block_size=16)
    expected = dense_of(ours) & dense_of(theirs)
    assert torch.equal(dense_of(compose(ours, theirs)), expected)
    assert torch.equal(dense_of(compose(theirs, ours)), expected)
