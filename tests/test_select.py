"""Selection against a brute-force ranking in Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stem_flex import StemConfig, layout, reference, testing
from stem_flex.select import select_blocks

SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 2.0, 1e-30, -1e-30, 5e-324]


def bind(structure, blocks, *, B=1, H=1, size=16):
    return structure.bind(B, H, blocks * size, blocks * size, block_size=(size, size))


def selected(tables, bound):
    """Kept blocks and, checked on the way, well-formed tables."""
    mask = tables.block_mask(bound.mask_mod, bound.seq_lengths, bound.block_size)
    testing.assert_valid_block_mask(mask)
    partial, full = reference.dense_blocks(mask)
    return partial | full, mask


@st.composite
def score_tables(draw, blocks, B, H):
    """Scores full of ties, zeros of both signs, NaN and infinities."""
    values = draw(st.lists(st.sampled_from(SPECIAL) | st.floats(-3, 3, width=16), min_size=1, max_size=12))
    seed = draw(st.integers(0, 2**31 - 1))
    index = torch.randint(len(values), (B, H, blocks, blocks), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(values, dtype=draw(st.sampled_from([torch.float32, torch.float64])))[index]


@given(st.data())
def test_selection_is_the_brute_force_ranking(data):
    B, H, blocks = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    structure = data.draw(testing.layouts(max_parts=2))
    config = data.draw(testing.stem_configs(block_sizes=(16,)))
    bound = bind(structure, blocks, B=B, H=H)
    scores = data.draw(score_tables(blocks, B, H))
    shape = data.draw(st.sampled_from([(), (blocks,), (H, blocks), (B, H, blocks)]))
    seed = data.draw(st.integers(0, 2**31 - 1))
    budget = torch.randint(1, blocks + 3, shape, generator=torch.Generator().manual_seed(seed))
    given_budget = int(budget) if shape == () else budget
    keep, mask = selected(select_blocks(scores, bound, config, budget=given_budget), bound)

    q = torch.empty(B, H, blocks * 16, 1)
    expected = reference.block_keep(q, q, q, config, layout=structure, budget=budget, scores=scores)
    assert torch.equal(keep, expected)
    allowed = bound.allowed().expand_as(keep)
    forced = reference.block_keep(q, q, q, config, layout=structure, budget=1, scores=-1.0 * arange_like(scores))
    testing.assert_selection_optimal(mask, scores, budget, forced=forced & expected, allowed=allowed)


def arange_like(scores):
    return torch.arange(scores.shape[-1], dtype=torch.float64).expand(scores.shape)


def keep_row(row, budget, *, sink=0, local=0, structure=None):
    """Blocks that the last row of a causal (or other) mask keeps, of these scores."""
    scores = torch.tensor(row)[None, None, None].expand(1, 1, len(row), -1)
    bound = bind(structure or layout.causal(), len(row))
    config = StemConfig(block_size=16, stride=4, sink_blocks=sink, local_blocks=local)
    keep, _ = selected(select_blocks(scores, bound, config, budget=budget), bound)
    return keep[0, 0, -1].nonzero().flatten().tolist()


def test_ties_go_to_the_lower_index():
    assert keep_row([1.0, 1.0, 1.0, 1.0, 0.0], 2) == [0, 1, 4]
    assert keep_row([0.0, 1.0, 0.0, 1.0, 1.0, 9.0], 3) == [1, 3, 5]


def test_zeros_of_both_signs_tie():
    assert keep_row([-0.0, 0.0, -0.0, 0.0, 1.0], 3) == [0, 1, 4]
    assert keep_row([0.0, -0.0, 1e-30, -1e-30, 1.0], 4) == [0, 1, 2, 4]


def test_nan_ranks_below_minus_infinity_and_plus_infinity_first():
    nan, inf = math.nan, math.inf
    assert keep_row([nan, -inf, 0.0, inf, nan], 1) == [3, 4]
    assert keep_row([nan, -inf, 0.0, inf, nan], 3) == [1, 2, 3, 4]
    assert keep_row([nan, -inf, nan, inf, 9.0], 4) == [0, 1, 3, 4]
    assert keep_row([-nan, nan, nan, nan, nan], 2) == [0, 1, 4]


def test_the_budget_counts_forced_blocks_that_rank_among_the_best():
    assert keep_row([9.0, 8.0, 7.0, 6.0, 5.0, 9.0], 2, sink=1, local=1) == [0, 5]
    assert keep_row([0.0, 8.0, 7.0, 6.0, 5.0, 0.0], 2, sink=1, local=1) == [0, 1, 2, 5]
    assert keep_row([0.0, 8.0, 7.0, 6.0, 0.0, 0.0], 1, sink=0, local=3) == [1, 3, 4, 5]


def test_counts_are_exact_without_forced_blocks_but_the_diagonal():
    blocks = 20
    bound = bind(layout.causal(), blocks, B=2, H=2)
    scores = torch.randn(2, 2, blocks, blocks)
    scores[..., torch.arange(blocks), torch.arange(blocks)] = 100.0  # the diagonal is the best of its row
    config = StemConfig(block_size=16, stride=4, sink_blocks=0, local_blocks=0)
    for budget in (1, 3, 7, 20, 1000):
        keep, _ = selected(select_blocks(scores, bound, config, budget=budget), bound)
        expected = torch.arange(1, blocks + 1).clamp(max=budget)
        assert torch.equal(keep.sum(-1), expected.expand(2, 2, -1))


def test_the_diagonal_is_always_kept():
    blocks = 12
    bound = bind(layout.causal(), blocks)
    scores = torch.zeros(1, 1, blocks, blocks)
    scores[..., torch.arange(blocks), torch.arange(blocks)] = -math.inf
    config = StemConfig(block_size=16, stride=4, sink_blocks=0, local_blocks=0)
    keep, _ = selected(select_blocks(scores, bound, config, budget=1), bound)
    assert keep.diagonal(dim1=-2, dim2=-1).all()


def test_forced_blocks_stand_in_the_rows_own_range():
    window = layout.sliding_window(5 * 16)
    assert keep_row([1.0] * 10, 1, sink=2, local=0, structure=window) == [4, 5, 9]
    two_documents = layout.documents([0, 4 * 16, 10 * 16])
    assert keep_row([1.0] * 10, 1, sink=2, local=1, structure=two_documents) == [4, 5, 9]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_of_any_float_dtype(dtype):
    blocks = 9
    bound = bind(layout.causal(), blocks)
    scores = torch.randn(1, 1, blocks, blocks).to(dtype)
    config = StemConfig(block_size=16, stride=4, sink_blocks=0, local_blocks=1)
    keep, mask = selected(select_blocks(scores, bound, config, budget=3), bound)
    testing.assert_selection_optimal(mask, scores, 3, forced=torch.eye(blocks).bool(), allowed=bound.allowed())
    assert keep.any(-1).all()


def test_the_schedule_sets_the_budget_of_each_row():
    blocks = 80
    bound = bind(layout.causal(), blocks)
    config = StemConfig(block_size=16, stride=4, schedule="fixed", k_start=10, mu=0.3, sink_blocks=0, local_blocks=0)
    scores = -arange_like(torch.empty(1, 1, blocks, blocks))
    scores[..., torch.arange(blocks), torch.arange(blocks)] = 1.0
    keep, _ = selected(select_blocks(scores, bound, config), bound)
    rows = reference.tpd_budget(blocks, config)
    assert rows.min() < rows.max()
    assert keep[0, 0].sum(-1).tolist() == torch.minimum(rows, torch.arange(1, blocks + 1)).tolist()


def test_tables_are_as_wide_as_the_largest_budget_not_the_keys():
    blocks = 128
    bound = bind(layout.causal(), blocks, H=2)
    config = StemConfig(block_size=16, stride=4, schedule="fixed", k_start=6, sink_blocks=1, local_blocks=1)
    tables = select_blocks(torch.randn(1, 2, blocks, blocks), bound, config)
    assert tables.buffer.numel() <= 2 * blocks * 24 + 2 * blocks
    selected(tables, bound)


@pytest.mark.parametrize(
    ("budget", "error", "match"),
    [
        (0, ValueError, "budget must be at least 1 block, got 0"),
        (2.5, TypeError, "budget must be an int or an int tensor, got 2.5"),
        (True, TypeError, "budget must be an int or an int tensor"),
        (torch.ones(4), TypeError, "budget must hold integers, got torch.float32"),
        (torch.ones(3, dtype=torch.int32), ValueError, r"budget must have shape \(4,\).* got \(3,\)"),
        (torch.ones(3, 4, dtype=torch.int32), ValueError, r"budget must have shape .* got \(3, 4\)"),
        (torch.ones(2, 1, 2, 4, dtype=torch.int32), ValueError, r"budget must have shape .* got \(2, 1, 2, 4\)"),
        (torch.ones(5, 2, 4, dtype=torch.int32), ValueError, r"budget must have shape .* got \(5, 2, 4\)"),
        (torch.ones(4, dtype=torch.int32, device="meta"), ValueError, "budget must be on q's device cpu, got meta"),
    ],
)
def test_wrong_budgets_are_refused(budget, error, match):
    bound = bind(layout.causal(), 4, B=1, H=2)
    with pytest.raises(error, match=match):
        select_blocks(torch.zeros(1, 2, 4, 4), bound, StemConfig(block_size=16), budget=budget)


@pytest.mark.parametrize("shape", [(1, 1, 4, 5), (1, 1, 3, 4), (4, 4)])
def test_scores_of_the_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"scores must have shape \(B, Hq, 4, 4\), got"):
        select_blocks(torch.zeros(shape), bind(layout.causal(), 4), StemConfig(block_size=16), budget=1)


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [1, 5, 64, 300])
def test_triton_selects_what_pytorch_selects(blocks):
    bound, on_gpu = (
        layout.causal().bind(2, 3, blocks * 16, blocks * 16, block_size=(16, 16), device=device)
        for device in ("cpu", "cuda")
    )
    values = torch.tensor(SPECIAL, dtype=torch.float32)
    scores = values[torch.randint(len(values), (2, 3, blocks, blocks))]
    scores[:, 1] = torch.randn(2, blocks, blocks)
    config = StemConfig(block_size=16, stride=4, sink_blocks=1, local_blocks=2)
    for budget in (1, 4, 33, 1000):
        expected, _ = selected(select_blocks(scores, bound, config, budget=budget), bound)
        got, _ = selected(select_blocks(scores.cuda(), on_gpu, config, budget=budget, impl="triton"), on_gpu)
        assert torch.equal(got, expected), budget
