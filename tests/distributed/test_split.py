"""Splits: every token once, kept pairs and tokens in equal parts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stem_flex import StemConfig, layout, testing, tpd_budget
from stem_flex.budget import Budget
from stem_flex.distributed import Split, balanced, zigzag


def kept_pairs(split, config, blocks, layout_kept=None):
    """Pairs of blocks that each rank keeps, by the definition: budget and forced blocks, no more than are causal."""
    forced = config.sink_blocks + config.local_blocks
    row = [min(i + 1, int(n) + forced) for i, n in enumerate(tpd_budget(blocks, config))]
    row = row if layout_kept is None else layout_kept
    size = config.query_block
    return [sum(sum(row[a // size : -(-b // size)]) for a, b in own) for own in split.ranges]


@given(st.data())
def test_every_token_once_and_ranges_of_whole_blocks(data):
    config = data.draw(testing.stem_configs())
    world = data.draw(st.integers(1, 9))
    least = (world - 1) * config.query_block + 1
    tokens = data.draw(st.integers(least, least + 3000))
    structure = data.draw(st.sampled_from([None, layout.sliding_window(50), layout.documents([0, least, tokens])]))
    for split in (zigzag(tokens, world, config.query_block), balanced(tokens, world, config, layout=structure)):
        assert (split.world, split.tokens) == (world, tokens)
        assert torch.equal(torch.cat([split.positions(r) for r in range(world)]).sort().values, torch.arange(tokens))
        assert all(len(own) <= 2 for own in split.ranges)
        assert all(start % config.query_block == 0 for own in split.ranges for start, _ in own)
        assert [split.rows(r) for r in range(world)] == [len(split.positions(r)) for r in range(world)]
        x = torch.arange(2 * tokens).view(2, tokens, 1)
        for r in range(world):
            assert torch.equal(split.shard(x, r, dim=1), x[:, split.positions(r)])


@pytest.mark.parametrize("blocks", [1024, 1023, 4096])
@pytest.mark.parametrize("world", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "config", [StemConfig(), StemConfig.paper(), StemConfig(schedule="fixed", k_start=0.2, mu=0.3)]
)
def test_ranks_keep_equal_parts_of_the_pairs(blocks, world, config):
    split = balanced(blocks * 128, world, config)
    pairs = kept_pairs(split, config, blocks)
    assert max(pairs) <= 1.01 * sum(pairs) / world
    plain = kept_pairs(zigzag(blocks * 128, world), config, blocks)
    assert max(pairs) <= max(plain) + max(1, sum(pairs) // 500)


def test_two_ranks_keep_equal_parts_of_both_pairs_and_tokens():
    for blocks in (1024, 4096, 8192):
        split = balanced(blocks * 128, 2, StemConfig.operator())
        pairs = kept_pairs(split, StemConfig.operator(), blocks)
        assert split.rows(0) == split.rows(1)
        assert abs(pairs[0] - pairs[1]) <= 0.005 * pairs[0]
        plain = kept_pairs(zigzag(blocks * 128, 2), StemConfig.operator(), blocks)
        assert max(plain) > 1.03 * max(pairs)  # what the plain zigzag loses to the first rows, which keep few


def test_budget_layout_offset_and_selector_count():
    config = StemConfig(block_size=16, stride=4, schedule="fixed", k_start=3, sink_blocks=0, local_blocks=0)
    given = torch.tensor([1] * 70 + [30] * 30, dtype=torch.int32)
    pairs = kept_pairs(balanced(1600, 2, config, budget=given), config, 100, given.tolist())
    assert max(pairs) - min(pairs) <= 30
    dense = balanced(1600, 2, config, budget=200)
    assert dense.ranges == balanced(1600, 2, StemConfig(block_size=16, schedule="fixed", k_start=1.0, mu=1.0)).ranges
    window = layout.sliding_window(16)
    # rows keep two blocks each but the first, whatever the budget
    pairs = kept_pairs(balanced(1600, 4, config, layout=window, budget=50), config, 100, [1] + [2] * 99)
    assert max(pairs) - min(pairs) <= 3
    # past 1600 keys every row keeps its whole budget: equal parts are equally long
    assert [balanced(1600, 4, config, q_offset=1600, budget=5).rows(r) for r in range(4)] == [400] * 4
    even = StemConfig(**{**vars(config), "k_start": 60, "mu": 1.0})
    decaying = StemConfig(**{**vars(config), "k_start": 60, "mu": 0.2})
    assert balanced(1600, 4, decaying, selector="sam") == balanced(1600, 4, even) != balanced(1600, 4, decaying)


def test_what_only_the_device_knows_is_a_plain_zigzag():
    class Rule(Budget):
        needs_scores = True

    config = StemConfig(block_size=16)
    unknown = layout.from_mask_mod(lambda b, h, i, j: i >= j, None, None, 1600, 1600)
    assert balanced(1600, 3, config, budget=Rule()) == zigzag(1600, 3, 16)
    assert balanced(1600, 3, config, layout=unknown) == zigzag(1600, 3, 16)
    assert zigzag(1600, 2, 16).ranges == (((0, 400), (1200, 1600)), ((400, 1200),))


def test_chunks_of_a_cache():
    first, second = zigzag(64, 2, 16), zigzag(32, 2, 16)
    both = first.then(second)
    assert both.ranges == (((0, 16), (48, 64), (64, 80)), ((16, 48), (80, 96)))
    assert both.tokens == 96
    with pytest.raises(ValueError, match="chunk must be split over 2 ranks as the tokens before, got 3"):
        first.then(zigzag(64, 3, 16))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: zigzag(0, 2), ValueError, "tokens must be at least 1, got 0"),
        (
            lambda: zigzag(128, 2),
            ValueError,
            r"at least one query block of 128 tokens for each of the 2 ranks, got 128",
        ),
        (lambda: balanced(100.0, 2), TypeError, "tokens must be an int, got 100.0"),
        (lambda: balanced(1000, True), TypeError, "world must be an int, got True"),
        (lambda: balanced(1000, 2, selector=3), TypeError, "selector must be a name"),
        (lambda: balanced(1000, 2, budget=0), ValueError, "budget must be at least 1 block, got 0"),
        (lambda: Split((((0, 5),), ((6, 9),))), ValueError, "ranges must hold every token from 0 on once"),
        (lambda: Split((((0, 5),), ((4, 9),))), ValueError, "ranges must hold every token from 0 on once"),
        (lambda: Split((((1, 5),),)), ValueError, "ranges must hold every token from 0 on once"),
        (lambda: Split((((0, 5),), ())), ValueError, r"ranges must give every rank tokens, got none for ranks \[1\]"),
        (lambda: zigzag(512, 2).shard(torch.ones(1, 2, 500, 4), 0), ValueError, "x must have the split's 512 tokens"),
    ],
)
def test_errors(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_without_a_process_group():
    from stem_flex.distributed import context_prefill

    q = torch.randn(1, 2, 256, 8)
    with pytest.raises(RuntimeError, match=r"torch.distributed must be initialised: start with torchrun"):
        context_prefill(q, q, q, split=zigzag(256, 1))
