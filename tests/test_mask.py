"""stem_block_mask: the reference's selection AND the layout's token mask, as well-formed tables."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from stem_flex import StemConfig, layout, reference, stem_block_mask, testing

SMALL = {"block_size": 16, "stride": 4, "schedule": "fixed", "k_start": 3, "sink_blocks": 1, "local_blocks": 1}


def kept(mask):
    partial, full = reference.dense_blocks(mask)
    return partial | full


def tokens_of(keep, mask_size, block_size):
    (BQ, BK), (Lq, Lk) = block_size, mask_size
    return keep.repeat_interleave(BQ, -2)[..., :Lq, :].repeat_interleave(BK, -1)[..., :Lk]


@st.composite
def calls(draw, **options):
    """(q, k, v, config, keywords) of any call; scores are exact or in float64, so that ties are no accident."""
    config = draw(testing.stem_configs())
    exact = config.value_weight == 0 and draw(st.booleans())
    dtypes = (torch.float32, torch.bfloat16) if exact else (torch.float64,)
    past = draw(st.sampled_from([(0, 0), (0, 60)]))
    q, k, v = draw(testing.qkv(past=past, head_dims=(16,), dtypes=dtypes, ties=exact, q_len=(1, 120), **options))
    offset = draw(st.integers(0, k.shape[2] - q.shape[2]))
    structure = draw(testing.layouts(q, k))
    kv_len = draw(st.none() | st.integers(1, k.shape[2]))
    documents = any(isinstance(part, layout.Documents) for part in structure.parts())
    prompt_len = None if documents else draw(st.none() | st.integers(1, 400))
    keywords = {"layout": structure, "q_offset": offset, "kv_len": kv_len, "prompt_len": prompt_len}
    return q, k, v, config, keywords


@given(st.data())
def test_mask_is_the_references_selection_and_the_token_mask(data):
    q, k, v, config, keywords = data.draw(calls())
    B, H, Lq, Lk = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    budget = data.draw(st.none() | st.integers(1, 5))
    mask = stem_block_mask(q, k, v, config, budget=budget, **keywords)
    expected = reference.block_keep(q, k, v, config, budget=budget, **keywords)
    got = kept(mask)
    assert torch.equal(got, expected), f"first differences {(got != expected).nonzero()[:5].tolist()}"
    testing.assert_valid_block_mask(mask)
    tokens = reference.token_mask(keywords["layout"], B, H, Lq, Lk, keywords["q_offset"], keywords["kv_len"])
    selected = tokens_of(expected, (Lq, Lk), (config.query_block, config.key_block))
    assert torch.equal(testing.block_mask_to_dense(mask), tokens & selected)
    full_width = reference.stem_block_mask(q, k, v, config, budget=budget, **keywords)
    assert torch.equal(mask.to_dense(), full_width.to_dense())


@given(st.data())
def test_create_block_mask_finds_the_same_classes(data):
    q, k, v, config, keywords = data.draw(calls(batch=(1, 2), groups=(1, 2)))
    mask = stem_block_mask(q, k, v, config, mask_mod="exact", **keywords)
    size = (config.query_block, config.key_block)
    torchs = create_block_mask(mask.mask_mod, *q.shape[:3], k.shape[2], device="cpu", BLOCK_SIZE=size)
    for got, expected in zip(reference.dense_blocks(mask), reference.dense_blocks(torchs), strict=True):
        assert torch.equal(got, expected)
    eager = create_mask(mask.mask_mod, *q.shape[:3], k.shape[2], device="cpu")
    assert torch.equal(eager, testing.block_mask_to_dense(mask))


@given(st.data())
def test_a_batch_row_alone_is_itself_in_the_batch(data):
    B = 3
    config = data.draw(testing.stem_configs())
    q, k, v = data.draw(testing.qkv(batch=(B, B), past=(0, 40), dtypes=(torch.float64,), ties=False))
    Lk = k.shape[2]
    offset = torch.tensor(data.draw(st.lists(st.integers(0, Lk - q.shape[2]), min_size=B, max_size=B)))
    lengths = data.draw(st.lists(st.integers(0, Lk), min_size=B, max_size=B))
    side = data.draw(st.sampled_from(["left", "right"]))
    extra = data.draw(testing.layouts())
    structure = layout.padding(lengths, side=side) & extra
    together = kept(stem_block_mask(q, k, v, config, layout=structure, q_offset=offset))
    for b in range(B):
        row = [x[b : b + 1] for x in (q, k, v)]
        alone = layout.padding(lengths[b : b + 1], side=side) & extra
        single = stem_block_mask(*row, config, layout=alone, q_offset=int(offset[b]))
        assert torch.equal(kept(single)[0], together[b])


@given(st.data())
def test_a_document_alone_is_itself_packed(data):
    config = data.draw(testing.stem_configs())
    config = StemConfig(**{**vars(config), "metric": "log"})
    size = max(config.query_block, config.key_block)
    lengths = data.draw(st.lists(st.integers(1, 4).map(lambda n: n * size), min_size=1, max_size=4))
    lengths.append(data.draw(st.integers(1, 3 * size)))  # the last may be ragged
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    total = int(bounds[-1])
    q, k, v = data.draw(testing.qkv(q_len=(total, total), batch=(1, 1), dtypes=(torch.float64,), ties=False))
    packed = kept(stem_block_mask(q, k, v, config, layout=layout.documents(bounds)))
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        alone = kept(stem_block_mask(*(x[:, :, start:end] for x in (q, k, v)), config))
        rows, columns = start // config.query_block, start // config.key_block
        part = packed[:, :, rows : rows + alone.shape[2]]
        assert torch.equal(part[..., columns : columns + alone.shape[3]], alone)
        assert part.sum() == alone.sum()


@given(st.data())
def test_left_padded_is_unpadded(data):
    config = data.draw(testing.stem_configs())
    size = max(config.query_block, config.key_block)
    pad = data.draw(st.integers(0, 3)) * size
    q, k, v = data.draw(testing.qkv(dtypes=(torch.float64,), ties=False))
    B, length = q.shape[0], q.shape[2]
    padded = [torch.nn.functional.pad(x, (0, 0, pad, 0), value=float("nan")) for x in (q, k, v)]
    structure = layout.padding([length] * B, side="left")
    mask = kept(stem_block_mask(*padded, config, layout=structure))
    expected = kept(stem_block_mask(q, k, v, config))
    assert torch.equal(mask[:, :, pad // config.query_block :, pad // config.key_block :], expected)
    assert mask.sum() == expected.sum()


def test_right_padded_is_unpadded(make_qkv):
    q, k, v = make_qkv(B=1, Lq=100, dtype=torch.float64)
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 60), value=float("nan")) for x in (q, k, v)]
    config = StemConfig(**SMALL)
    mask = kept(stem_block_mask(*padded, config, layout=layout.padding([100], side="right")))
    expected = kept(stem_block_mask(q, k, v, config))
    assert torch.equal(mask[:, :, :7, :7], expected)
    assert mask.sum() == expected.sum()


def test_padded_queries_attend_to_nothing(make_qkv):
    q, k, v = make_qkv(Lq=100)
    mask = stem_block_mask(q, k, v, StemConfig(**SMALL), layout=layout.padding([100, 33]))
    rows = testing.block_mask_to_dense(mask)[1].any(-1)
    assert not rows[:, :67].any()
    assert rows[:, 67:].all()


FIELDS = [
    {"block_size": (32, 16)},
    {"stride": 16},
    {"metric": "log"},
    {"value_weight": 5.0},
    {"schedule": "envelope", "k_start": None},
    {"k_start": 5},
    {"mu": 0.2},
    {"sink_blocks": 3},
    {"local_blocks": 3},
    {"routing": "sketch"},
]
MASS = {"routing": "sketch", "budget": "mass", "sketch": (2, 4, 1, 4), "threshold": 0.3, "cap": 6, "mu": 1.0}
MASS_FIELDS = [
    {"budget": "peak"},
    {"sketch": (0, 2, 0, 2)},
    {"threshold": 0.1},
    {"floor": 4},
    {"cap": 1},
    {"coarse": (0, 0)},
]


@pytest.mark.parametrize("change", FIELDS + MASS_FIELDS, ids=lambda change: next(iter(change)))
def test_every_config_field_changes_the_mask(make_qkv, monkeypatch, change):
    monkeypatch.setattr("stem_flex.budget.PROPOSED", 4)  # else a coarse sketch of random inputs proposes every block
    # 80 blocks, so that the budget has rows to decay over
    q, k, v = make_qkv(Lq=80 * 16)
    given = SMALL | (MASS if change in MASS_FIELDS else {})
    base, changed = (stem_block_mask(q, k, v, StemConfig(**{**given, **options})) for options in ({}, change))
    base, changed = (testing.block_mask_to_dense(mask) for mask in (base, changed))
    assert not torch.equal(base, changed)
    # a correction is attention's, no part of the mask
    assert set(vars(StemConfig())) - {"correction"} == {next(iter(option)) for option in FIELDS + MASS_FIELDS}


@pytest.mark.parametrize("schedule", ["envelope", "operator", "paper"])
def test_published_schedules_leave_blocks_out_where_they_should(make_qkv, schedule):
    q, k, v = make_qkv(B=1, Hq=1, Hkv=1, Lq=90 * 16, D=4)
    config = StemConfig(block_size=16, stride=4, schedule=schedule, sink_blocks=0, local_blocks=0)
    counts = kept(stem_block_mask(q, k, v, config))[0, 0].sum(-1)
    budget = torch.minimum(reference.tpd_budget(90, config), torch.arange(1, 91))
    assert budget.sum() < 90 * 91 // 2
    assert ((counts == budget) | (counts == budget + 1)).all()  # the diagonal may come on top
    assert torch.equal(kept(stem_block_mask(q, k, v, config)), reference.block_keep(q, k, v, config))


@pytest.mark.parametrize("size", [1, 15, 16, 17, 31, 33])
def test_odd_lengths(make_qkv, size):
    q, k, v = make_qkv(Lq=size)
    mask = stem_block_mask(q, k, v, StemConfig(**SMALL))
    testing.assert_valid_block_mask(mask)
    assert torch.equal(kept(mask), reference.block_keep(q, k, v, StemConfig(**SMALL)))
    assert mask.seq_lengths == (size, size)


@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (5, 5), (10, 2), (7, 1), (28, 4)])
def test_any_group_size(make_qkv, heads):
    q, k, v = make_qkv(B=1, Hq=heads[0], Hkv=heads[1], Lq=100, dtype=torch.float64)
    config = StemConfig(**SMALL)
    assert torch.equal(kept(stem_block_mask(q, k, v, config)), reference.block_keep(q, k, v, config))


@pytest.mark.parametrize("block_size", [(128, 128), (128, 64), (256, 128), (64, 64), (64, 128)])
def test_block_sizes_of_the_kernels(make_qkv, block_size):
    q, k, v = make_qkv(B=1, Lq=600, dtype=torch.float64)
    config = StemConfig(**{**SMALL, "block_size": block_size, "stride": 8, "k_start": 2})
    mask = stem_block_mask(q, k, v, config)
    testing.assert_valid_block_mask(mask)
    assert tuple(mask.BLOCK_SIZE) == block_size
    assert torch.equal(kept(mask), reference.block_keep(q, k, v, config))


@pytest.mark.parametrize("shape", [(), (7,), (4, 7), (2, 4, 7), (1, 1, 7)])
def test_budgets_of_rows_heads_and_batch(make_qkv, shape):
    q, k, v = make_qkv(Lq=100, dtype=torch.float64)
    budget = torch.randint(1, 6, shape, dtype=torch.int32)
    config = StemConfig(**{**SMALL, "sink_blocks": 0, "local_blocks": 0})
    keep = kept(stem_block_mask(q, k, v, config, budget=budget if shape else int(budget)))
    assert torch.equal(keep, reference.block_keep(q, k, v, config, budget=budget))


def test_a_budget_of_everything_keeps_everything(make_qkv):
    q, k, v = make_qkv(Lq=100)
    mask = stem_block_mask(q, k, v, StemConfig(**SMALL), budget=7)
    assert torch.equal(testing.block_mask_to_dense(mask)[0, 0], torch.ones(100, 100, dtype=torch.bool).tril())


def test_tables_share_one_buffer_as_wide_as_the_largest_budget(make_qkv):
    q, k, v = make_qkv(Lq=80 * 16)
    mask = stem_block_mask(q, k, v, StemConfig(**SMALL))
    assert mask.kv_indices.untyped_storage().data_ptr() == mask.full_kv_indices.untyped_storage().data_ptr()
    assert mask.kv_indices.stride() == mask.full_kv_indices.stride()
    assert mask.kv_indices.untyped_storage().nbytes() <= 4 * (2 * 4 * 80 * 16 + 200)
    assert mask.shape == (2, 4, 1280, 1280)


def test_query_tables_come_on_request(make_qkv):
    q, k, v = make_qkv(Lq=100)
    assert stem_block_mask(q, k, v, StemConfig(**SMALL)).q_indices is None
    mask = stem_block_mask(q, k, v, StemConfig(**SMALL), compute_q_blocks=True)
    partial, full = reference.dense_blocks(mask)
    for counts, expected in ((mask.q_num_blocks, partial), (mask.full_q_num_blocks, full)):
        assert torch.equal(counts, expected.sum(-2).int())


def test_no_gradient_flows_through_the_choice(make_qkv):
    q, k, v = (x.requires_grad_() for x in make_qkv(Lq=100))
    mask = stem_block_mask(q, k, v, StemConfig(**SMALL))
    assert not mask.kv_indices.requires_grad


def test_inputs_are_not_changed(make_qkv):
    inputs = make_qkv(Lq=100)
    copies = [x.clone() for x in inputs]
    stem_block_mask(*inputs, StemConfig(**SMALL), layout=layout.padding([100, 33]))
    assert all(torch.equal(x, y) for x, y in zip(inputs, copies, strict=True))


def test_nan_inputs_still_give_valid_tables(make_qkv):
    q, k, v = make_qkv(Lq=200)
    k[0, 0, 40] = float("nan")
    v[1, 1, 60] = float("inf")
    mask = stem_block_mask(q, k, v, StemConfig(**SMALL))
    testing.assert_valid_block_mask(mask)


def test_one_graph_traces_it_whole(make_qkv):
    @torch.compile(fullgraph=True, backend="eager", dynamic=False)
    def tables(q, k, v):
        mask = stem_block_mask(q, k, v, StemConfig(**SMALL))
        return mask.kv_num_blocks, mask.full_kv_num_blocks

    q, k, v = make_qkv(Lq=100)
    mask = stem_block_mask(q, k, v, StemConfig(**SMALL))
    partial, full = tables(q, k, v)
    assert torch.equal(partial, mask.kv_num_blocks)
    assert torch.equal(full, mask.full_kv_num_blocks)


def test_one_traced_graph_serves_all_lengths(make_qkv):
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=count)
    def tables(q, k, v):
        return stem_block_mask(q, k, v, StemConfig(**SMALL)).kv_num_blocks

    for tokens in (100, 90, 51, 200, 300):
        q, k, v = make_qkv(Lq=tokens)
        assert torch.equal(tables(q, k, v), stem_block_mask(q, k, v, StemConfig(**SMALL)).kv_num_blocks)
    assert len(graphs) <= 2


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"mask_mod": "none"}, ValueError, "mask_mod must be 'layout' or 'exact', got 'none'"),
        ({"impl": "cuda"}, ValueError, "impl must be 'auto', 'triton' or 'torch', got 'cuda'"),
        ({"budget": 0}, ValueError, "budget must be at least 1 block, got 0"),
        ({"budget": torch.ones(5, 4, 7, dtype=torch.int32)}, ValueError, r"budget must have shape .*got \(5, 4, 7\)"),
        ({"q_offset": -1}, ValueError, "q_offset must be 0 or more, got -1"),
        ({"kv_len": 101}, ValueError, "kv_len must be at most the 100 keys of k, got 101"),
        ({"layout": "causal"}, TypeError, r"layout must come from stem_flex\.layout, got str"),
        ({"layout": layout.padding([3, 4, 5])}, ValueError, r"padding lengths must have shape \(2,\)"),
        (
            {"layout": layout.documents([0, 100]), "prompt_len": 100},
            ValueError,
            "prompt_len must be None with documents",
        ),
    ],
)
def test_wrong_options_are_refused(make_qkv, options, error, match):
    with pytest.raises(error, match=match):
        stem_block_mask(*make_qkv(Lq=100), StemConfig(**SMALL), **options)


@pytest.mark.gpu
@given(st.data())
def test_triton_keeps_what_the_reference_keeps(data):
    config = data.draw(testing.stem_configs(strides=(4, 8, 16)))
    config = StemConfig(**{**vars(config), "value_weight": 0.0})  # small integers then score exactly, ties and all
    q, k, v = data.draw(testing.qkv(past=(0, 60), head_dims=(16,), ties=True, device="cuda"))
    offset = data.draw(st.integers(0, k.shape[2] - q.shape[2]))
    structure = data.draw(testing.layouts(q, k))
    kv_len = data.draw(st.none() | st.integers(1, k.shape[2]))
    keywords = {"layout": structure, "q_offset": offset, "kv_len": kv_len}
    mask = stem_block_mask(q, k, v, config, **keywords, impl="triton")
    testing.assert_valid_block_mask(mask)
    assert torch.equal(kept(mask), reference.block_keep(q, k, v, config, **keywords))
