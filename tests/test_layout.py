"""Layouts against their meaning token by token, and against torch's create_block_mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from stem_flex import layout, reference, testing
from stem_flex.mask import layout_block_mask

BLOCK_SIZES = [16, 32, (32, 16), (16, 32), (64, 32)]


def pair(block_size):
    return (block_size, block_size) if isinstance(block_size, int) else block_size


def check_bound(structure, B, H, Lq, Lk, block_size, q_offset=0, kv_len=None, prompt_len=None):
    """Everything a binding says, against the reference."""
    size = pair(block_size)
    bound = structure.bind(B, H, Lq, Lk, q_offset=q_offset, kv_len=kv_len, prompt_len=prompt_len, block_size=size)
    tokens = reference.token_mask(structure, B, H, Lq, Lk, q_offset, kv_len)
    assert torch.equal(create_mask(bound.mask_mod, B, H, Lq, Lk, device="cpu"), tokens)
    classes = reference.block_classes(tokens, size)
    got = bound.dense_classes().expand_as(classes)
    assert torch.equal(got, classes), f"classes differ at {(got != classes).nonzero()[:5].tolist()}"
    check_rows(bound, structure, classes, B, Lq, Lk, size, q_offset, kv_len, prompt_len)
    check_valid_tokens(bound, structure, B, Lq, Lk, q_offset, kv_len)
    return bound


def check_rows(bound, structure, classes, B, Lq, Lk, size, q_offset, kv_len, prompt_len):
    rows = bound.rows.expand(B, -1, -1)
    allowed = (classes > 0).any(1)
    for b in range(B):
        places = reference.row_places(structure, b, Lq, Lk, size, q_offset, kv_len, prompt_len)
        for i, place in enumerate(places):
            lo, hi, _, _, own_lo, own_hi, position, prompt_blocks = rows[b, i].tolist()
            found = allowed[b, i].nonzero().flatten().tolist()
            assert (lo, hi) == ((found[0], found[-1] + 1) if found else (0, 0)), f"batch {b} row {i}"
            if not found:
                continue
            assert (own_lo, own_hi) == (place.own_lo, place.own_hi), f"batch {b} row {i}"
            prompt = (position, max(prompt_blocks, 1))  # a prompt of 0 blocks has the budget of 1
            assert prompt == (place.position, place.prompt_blocks), f"batch {b} row {i}"
            if bound.longest_prompt is not None:
                assert prompt_blocks <= bound.longest_prompt
    if bound.partial_columns is not None:
        partial, full = (classes == 1).sum(-1), (classes == 2).sum(-1)
        assert ((partial <= bound.partial_columns) | (full == 0)).all()


def check_valid_tokens(bound, structure, B, Lq, Lk, q_offset, kv_len):
    """Keys that no query may see, or padding, are out of the valid ranges, and nothing else is."""
    tokens = reference.token_mask(structure, B, 1, Lq, Lk, q_offset, kv_len)[:, 0] if bound.classes is None else None
    if tokens is None:
        return
    key = torch.arange(Lk)
    start = torch.zeros(B, dtype=torch.int32) if bound.key_start is None else bound.key_start
    end = torch.full((B,), Lk) if bound.key_end is None else bound.key_end
    inside = (key >= start[:, None]) & (key < end[:, None])
    assert not (tokens.any(1) & ~inside).any(), "an allowed key is outside the valid ones"
    query = torch.arange(Lq)
    start = torch.zeros(B, dtype=torch.int32) if bound.query_start is None else bound.query_start
    end = torch.full((B,), Lq) if bound.query_end is None else bound.query_end
    inside = (query >= start[:, None]) & (query < end[:, None])
    assert not (tokens.any(2) & ~inside).any(), "a query with keys is outside the valid ones"


@given(st.data())
def test_any_layout_is_its_token_mask(data):
    B, H = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    Lk = data.draw(st.integers(1, 200))
    Lq = data.draw(st.integers(1, Lk))
    q, k = torch.empty(B, H, Lq, 1), torch.empty(B, H, Lk, 1)
    structure = data.draw(testing.layouts(q, k))
    offset = data.draw(st.integers(0, Lk - Lq) | st.just(Lk - Lq))
    kv_len = data.draw(st.none() | st.integers(1, Lk))
    check_bound(structure, B, H, Lq, Lk, data.draw(st.sampled_from(BLOCK_SIZES)), offset, kv_len)


@given(st.data())
def test_lengths_and_offsets_of_each_batch_row(data):
    B, Lk = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 200))
    Lq = data.draw(st.integers(1, Lk))
    q, k = torch.empty(B, 1, Lq, 1), torch.empty(B, 1, Lk, 1)
    rows = st.lists(st.integers(0, Lk), min_size=B, max_size=B).map(torch.tensor)
    structure = data.draw(testing.layouts(q, k, mask_mod=False))
    offset, kv_len, prompt_len = (data.draw(rows | st.integers(0, Lk)) for _ in range(3))
    has_documents = any(isinstance(part, layout.Documents) for part in structure.parts())
    prompt_len = None if has_documents else prompt_len
    check_bound(structure, B, 1, Lq, Lk, data.draw(st.sampled_from(BLOCK_SIZES)), offset, kv_len, prompt_len)


@given(st.data())
def test_layout_block_mask_is_create_block_mask(data):
    B, H, Lk = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2)), data.draw(st.integers(1, 150))
    Lq = data.draw(st.integers(1, Lk))
    q, k = torch.empty(B, H, Lq, 1), torch.empty(B, H, Lk, 1)
    structure = data.draw(testing.layouts(q, k))
    block_size = data.draw(st.sampled_from(BLOCK_SIZES))
    mask = layout_block_mask(structure, B, H, Lq, Lk, block_size=block_size)
    testing.assert_valid_block_mask(mask)
    torchs = create_block_mask(mask.mask_mod, B, H, Lq, Lk, device="cpu", BLOCK_SIZE=pair(block_size))
    for got, expected in zip(reference.dense_blocks(mask), reference.dense_blocks(torchs), strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(mask.to_dense(), torchs.to_dense())


def tokens_of(structure, Lq, Lk, *, B=1, H=1, **options):
    check_bound(structure, B, H, Lq, Lk, 16, **options)
    return reference.token_mask(structure, B, H, Lq, Lk, options.get("q_offset", 0), options.get("kv_len"))


P, J = torch.arange(50)[:, None], torch.arange(50)[None, :]


@pytest.mark.parametrize(
    ("structure", "expected"),
    [
        (layout.causal(), P >= J),
        (layout.full(), P >= -J),
        (layout.sliding_window(7), (P >= J) & (P - J < 7)),
        (layout.sliding_window(1), P == J),
        (layout.prefix(20), (P >= J) | (J < 20)),
        (layout.documents([0, 18, 18, 50]), (P >= J) & ((P < 18) == (J < 18))),
        (layout.documents([0, 18, 50], causal=False), (P < 18) == (J < 18)),
        (layout.documents([0, 30]), (P >= J) & (P < 30)),
        (layout.documents(ids=(torch.arange(50) > 9).int()), (P >= J) & ((P > 9) == (J > 9))),
        (layout.padding([30], side="left"), (P >= J) & (J >= 20)),
        (layout.padding([30], side="right"), (P >= J) & (P < 30)),
        (layout.padding([30], side="right", causal=False), (P < 30) & (J < 30)),
        (layout.padding([0]), P < 0 * J),
        (layout.sliding_window(9) & layout.prefix(4), (P >= J) & (P - J < 9)),
        (
            layout.full() & layout.documents([0, 18, 50], causal=False) & layout.sliding_window(5),
            (P >= J) & (P - J < 5) & ((P < 18) == (J < 18)),
        ),
        (layout.from_mask_mod(lambda b, h, i, j: (i + j) % 3 == 0, 1, 1, 50, 50), (P + J) % 3 == 0),
        (
            layout.from_mask_mod(lambda b, h, i, j: i + j < 60, None, None, 50, 50) & layout.causal(),
            (P + J < 60) & (P >= J),
        ),
    ],
)
def test_each_layout_means_what_it_says(structure, expected):
    assert torch.equal(tokens_of(structure, 50, 50)[0, 0], expected.expand(50, 50))


def test_a_window_keeps_as_many_keys_as_it_says():
    for window in (1, 2, 15, 16, 17):
        counts = tokens_of(layout.sliding_window(window), 60, 60)[0, 0].sum(-1)
        assert counts.tolist() == [min(i + 1, window) for i in range(60)]


def test_offset_places_the_queries_among_the_keys():
    assert torch.equal(tokens_of(layout.causal(), 20, 50, q_offset=30)[0, 0], (P >= J)[30:])
    assert torch.equal(tokens_of(layout.causal(), 20, 50)[0, 0], (P >= J)[:20])
    rows = tokens_of(layout.causal(), 20, 50, B=2, q_offset=torch.tensor([30, 7]))
    assert torch.equal(rows[:, 0], torch.stack([(P >= J)[30:], (P >= J)[7:27]]))
    window = tokens_of(layout.sliding_window(7), 20, 50, q_offset=23)
    assert torch.equal(window[0, 0], ((P >= J) & (P - J < 7))[23:43])


def test_kv_len_hides_the_rest_of_the_buffer():
    assert torch.equal(tokens_of(layout.full(), 50, 50, kv_len=33)[0, 0], (J < 33).expand(50, 50))
    left = tokens_of(layout.padding([10]), 5, 50, q_offset=28, kv_len=33)[0, 0]
    assert torch.equal(left, ((P >= J) & (J >= 23))[28:33])  # the last ten valid slots


def test_prefix_of_each_batch_row():
    rows = tokens_of(layout.prefix(torch.tensor([3, 40])), 50, 50, B=2)
    assert torch.equal(rows[:, 0], torch.stack([(P >= J) | (J < 3), (P >= J) | (J < 40)]))


def test_an_existing_block_mask_counts_with_its_lists():
    causal = create_block_mask(lambda b, h, i, j: i >= j, 1, 1, 64, 64, device="cpu", BLOCK_SIZE=16)
    counts, indices = causal.full_kv_num_blocks.clone(), causal.full_kv_indices
    counts[..., 3] = 1  # row 3 loses two full blocks
    cut = type(causal).from_kv_blocks(
        causal.kv_num_blocks, causal.kv_indices, counts, indices, (16, 16), causal.mask_mod, (64, 64)
    )
    tokens = tokens_of(layout.from_block_mask(cut), 64, 64)
    assert torch.equal(tokens, testing.block_mask_to_dense(cut))
    assert int(tokens.sum()) == 64 * 65 // 2 - 2 * 256


def test_straddled_and_ragged_blocks_are_partial():
    bound = check_bound(layout.documents([0, 24, 64], causal=False), 1, 1, 64, 64, 16)
    assert bound.dense_classes()[0, 0].tolist() == [[2, 1, 0, 0], [1, 1, 1, 1], [0, 1, 2, 2], [0, 1, 2, 2]]
    bound = check_bound(layout.full(), 1, 1, 40, 40, 16)
    assert bound.dense_classes()[0, 0].tolist() == [[2, 2, 1], [2, 2, 1], [1, 1, 1]]


def test_each_document_is_a_prompt_of_its_own():
    rows = layout.documents([0, 64, 160]).bind(1, 1, 160, 160, block_size=(16, 16)).rows[0]
    assert rows[:, 6].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]
    assert rows[:, 7].tolist() == [4] * 4 + [6] * 6


def test_padding_moves_the_prompts_start():
    rows = layout.padding([160, 96]).bind(2, 1, 160, 160, block_size=(16, 16)).rows
    assert rows[0, :, 6].tolist() == list(range(10))
    assert rows[1, 4:, 6].tolist() == list(range(6))
    assert rows[1, 4:, 7].tolist() == [6] * 6
    assert rows[1, :4, :2].tolist() == [[0, 0]] * 4


def test_prompt_len_sets_the_length_of_the_prompt():
    rows = layout.causal().bind(1, 1, 32, 96, q_offset=64, prompt_len=1000, block_size=(16, 16)).rows[0]
    assert rows[:, 6].tolist() == [4, 5]
    assert rows[:, 7].tolist() == [63, 63]


def test_a_binding_is_made_once_for_all_layers():
    structure = layout.documents([0, 18, 50])
    one = structure.bind(1, 4, 50, 50, block_size=(16, 16))
    assert structure.bind(1, 4, 50, 50, block_size=(16, 16)) is one
    assert structure.bind(1, 4, 50, 50, block_size=(32, 16)) is not one


def test_a_binding_follows_its_tensors():
    lengths = torch.tensor([50])
    structure = layout.padding(lengths)
    assert structure.bind(1, 1, 50, 50, block_size=(16, 16)).rows[0, 0, 1] == 1
    lengths[0] = 10
    assert structure.bind(1, 1, 50, 50, block_size=(16, 16)).rows[0, 0, 1] == 0


def test_class_tables_are_int8_and_shared_by_heads_unless_they_depend_on_them():
    shared = layout.from_mask_mod(lambda b, h, i, j: i > j, None, None, 64, 64)
    bound = shared.bind(2, 8, 64, 64, block_size=(16, 16))
    assert (bound.classes.dtype, tuple(bound.classes.shape)) == (torch.int8, (1, 1, 4, 4))
    by_head = layout.from_mask_mod(lambda b, h, i, j: i - j < 9 * h, 1, 8, 64, 64)
    assert tuple(by_head.bind(2, 8, 64, 64, block_size=(16, 16)).classes.shape) == (1, 8, 4, 4)


def bound_causal(**options):
    return layout.causal().bind(2, 1, 32, 64, **options)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: layout.sliding_window(0), ValueError, "window must be at least 1, got 0"),
        (lambda: layout.sliding_window(2.5), TypeError, r"window must be an int, got 2\.5"),
        (lambda: layout.prefix(0), ValueError, "prefix length must be at least 1, got 0"),
        (lambda: layout.padding([3], side="middle"), ValueError, "side must be 'left' or 'right', got 'middle'"),
        (lambda: layout.padding([3, -1]), ValueError, "padding lengths must be 0 or more, got -1"),
        (lambda: layout.padding(torch.ones(2)), TypeError, r"padding lengths must hold integers, got torch\.float32"),
        (lambda: layout.padding([[3]]), ValueError, r"padding lengths must have 1 dimension\(s\), got shape \(1, 1\)"),
        (
            lambda: layout.padding([3, 65]).bind(2, 1, 64, 64),
            ValueError,
            "padding lengths must be at most the 64 keys, got 65",
        ),
        (
            lambda: layout.padding([3, 4, 5]).bind(2, 1, 64, 64),
            ValueError,
            r"padding lengths must have shape \(2,\).* got \(3,\)",
        ),
        (lambda: layout.documents(), ValueError, "exactly one of cu_seqlens and ids"),
        (lambda: layout.documents([0, 9], torch.zeros(9)), ValueError, "exactly one of cu_seqlens and ids"),
        (
            lambda: layout.documents([0, 9, 4]),
            ValueError,
            r"cu_seqlens must start at 0 and never fall, got \[0, 9, 4\]",
        ),
        (lambda: layout.documents([2, 9]), ValueError, "cu_seqlens must start at 0 and never fall"),
        (lambda: layout.documents(torch.tensor([0.0, 9.0])), TypeError, "cu_seqlens must hold integers"),
        (lambda: layout.documents(ids=torch.tensor([1, 1, 2, 1])), ValueError, "ids must come in contiguous runs"),
        (
            lambda: layout.documents(ids=torch.zeros(3, 64, dtype=torch.int)).bind(2, 1, 64, 64),
            ValueError,
            "must have 1 or 2 rows.* got 3",
        ),
        (
            lambda: layout.documents([0, 64]).bind(1, 1, 64, 64, prompt_len=64),
            ValueError,
            "prompt_len must be None with documents",
        ),
        (lambda: layout.from_mask_mod("causal", 1, 1, 8, 8), TypeError, "f must be a mask_mod"),
        (lambda: layout.from_mask_mod(lambda *a: a[0], 1, 1, 0, 8), ValueError, "Lq must be at least 1, got 0"),
        (
            lambda: layout.from_mask_mod(lambda b, h, i, j: i > j, 1, 1, 32, 64).bind(1, 1, 64, 64),
            ValueError,
            "Lq=32, Lk=64, got q and k of 64 and 64",
        ),
        (
            lambda: layout.from_mask_mod(lambda b, h, i, j: i > j, 1, 3, 64, 64).bind(1, 4, 64, 64),
            ValueError,
            "B=1, H=3, expected 1 or q's B=1, H=4",
        ),
        (lambda: layout.from_block_mask("mask"), TypeError, "block_mask must be a BlockMask, got str"),
        (
            lambda: layout.causal() & (lambda b, h, i, j: i > j),
            TypeError,
            "& needs a layout on both sides, got function",
        ),
        (lambda: bound_causal(q_offset=-1), ValueError, "q_offset must be 0 or more, got -1"),
        (lambda: bound_causal(q_offset=1.5), TypeError, r"q_offset must be an int or an int tensor \(2,\), got 1\.5"),
        (
            lambda: bound_causal(q_offset=torch.zeros(3, dtype=torch.int)),
            ValueError,
            r"q_offset must be .*\(2,\), got shape \(3,\)",
        ),
        (lambda: bound_causal(q_offset=torch.zeros(2)), TypeError, r"q_offset must hold integers, got torch\.float32"),
        (lambda: bound_causal(kv_len=65), ValueError, "kv_len must be at most the 64 keys of k, got 65"),
        (
            lambda: bound_causal(kv_len=torch.zeros(2, dtype=torch.int, device="meta")),
            ValueError,
            "kv_len must be on q's device cpu, got meta",
        ),
        (lambda: bound_causal(prompt_len=-5), ValueError, "prompt_len must be 0 or more, got -5"),
        (lambda: bound_causal(prompt_len=2**40), ValueError, r"prompt_len must be below 2\*\*31"),
        (lambda: bound_causal(q_offset=torch.tensor([3, -1])), ValueError, "q_offset must be between 0 and .* got -1"),
        (lambda: bound_causal(q_offset=torch.tensor([2**32, 0])), ValueError, "q_offset must be between 0 and"),
        (lambda: bound_causal(kv_len=torch.tensor([64, 65])), ValueError, "kv_len must be between 0 and 64, got 65"),
        (lambda: layout.prefix(torch.tensor([-1])), ValueError, "prefix length must be between 0 and .* got -1"),
        (lambda: layout.padding(None), TypeError, "padding lengths must be ints, a list or a tensor, got None"),
        (lambda: layout.padding([]), ValueError, r"padding lengths must not be empty, got \[\]"),
        (lambda: layout.documents("abc"), TypeError, "cu_seqlens must be ints, a list or a tensor, got 'abc'"),
        (lambda: layout.documents([0, 4], causal="no"), TypeError, "causal must be True or False, got 'no'"),
        (lambda: layout.from_mask_mod(max, 0, 1, 4, 4), ValueError, "B must be at least 1, got 0"),
        (lambda: layout.from_mask_mod(max, 1, "4", 4, 4), TypeError, "H must be an int, got '4'"),
        (
            lambda: layout.from_mask_mod(lambda q, kv: q >= kv, 1, 1, 4, 4),
            TypeError,
            r"f must be a mask_mod .* \(q, kv\)",
        ),
    ],
)
def test_wrong_layouts_are_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.gpu
def test_bindings_are_the_same_on_the_gpu():
    for make in (
        lambda device: layout.causal(),
        lambda device: layout.padding(torch.tensor([300, 77], device=device)) & layout.sliding_window(90),
        lambda device: layout.documents(torch.tensor([0, 100, 300], device=device)),
        lambda device: layout.from_mask_mod(lambda b, h, i, j: (i - j) % 7 < 3, None, None, 300, 300),
    ):
        cpu, gpu = (make(d).bind(2, 2, 300, 300, block_size=(64, 32), device=d) for d in ("cpu", "cuda"))
        assert torch.equal(gpu.rows.cpu(), cpu.rows)
        assert torch.equal(gpu.dense_classes().cpu(), cpu.dense_classes())
