"""Chunked prefill, prefix caches and static buffers against one-shot prefill."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stem_flex import StemConfig, layout, reference, stem_block_mask, testing

SMALL = {"block_size": 16, "stride": 4, "schedule": "fixed", "k_start": 3, "sink_blocks": 1, "local_blocks": 1}


def kept(mask):
    partial, full = reference.dense_blocks(mask)
    return partial | full


def chunk_of(q, k, v, start, end, *, buffer=0):
    """The chunk's queries and all keys so far, in a buffer that is longer by ``buffer`` dirty slots."""
    keys, values = (torch.nn.functional.pad(x[:, :, :end], (0, 0, 0, buffer), value=torch.nan) for x in (k, v))
    return q[:, :, start:end], keys, values


@given(st.data())
def test_aligned_chunks_select_what_one_shot_selects_with_log(data):
    config = data.draw(testing.stem_configs())
    config = StemConfig(**{**vars(config), "metric": "log"})
    size = max(config.query_block, config.key_block)
    q, k, v = data.draw(testing.qkv(q_len=(1, 200), dtypes=(torch.float64,), ties=False))
    total = q.shape[2]
    window = data.draw(st.sampled_from([layout.causal(), layout.sliding_window(50), layout.prefix(1)]))
    whole = kept(stem_block_mask(q, k, v, config, layout=window))
    cuts = data.draw(st.lists(st.integers(1, max(1, total // size)).map(lambda n: n * size), max_size=3, unique=True))
    bounds = [0, *sorted(cut for cut in cuts if cut < total), total]
    buffer = data.draw(st.integers(0, 40))
    for start, end in pairwise(bounds):
        chunk = chunk_of(q, k, v, start, end, buffer=buffer)
        mask = stem_block_mask(*chunk, config, layout=window, q_offset=start, prompt_len=total, kv_len=end)
        part, rows = kept(mask), start // config.query_block
        columns = min(part.shape[3], whole.shape[3])
        assert torch.equal(part[..., :columns], whole[:, :, rows : rows + part.shape[2], :columns])
        assert not part[..., columns:].any()


def test_aligned_chunks_spend_one_shots_budget_with_zscore(make_qkv):
    q, k, v = make_qkv(B=1, Lq=60 * 16, dtype=torch.float64)
    config = StemConfig(**{**SMALL, "k_start": 20, "mu": 0.3, "sink_blocks": 0, "local_blocks": 0})
    whole = kept(stem_block_mask(q, k, v, config)).sum(-1)
    parts = []
    for start in range(0, 960, 240):
        chunk = chunk_of(q, k, v, start, start + 240)
        parts.append(kept(stem_block_mask(*chunk, config, q_offset=start, prompt_len=960)).sum(-1))
    # the diagonal is kept on top of the budget where it does not rank: counts may differ by that one block
    assert (torch.cat(parts, 2) - whole).abs().max() <= 1


def test_prompt_len_and_not_the_chunk_sets_the_budget(make_qkv):
    q, k, v = make_qkv(B=1, Lq=80 * 16, D=4)
    config = StemConfig(block_size=16, stride=4, schedule="operator", sink_blocks=0, local_blocks=0)
    chunk = chunk_of(q, k, v, 0, 40 * 16)
    counts = [kept(stem_block_mask(*chunk, config, prompt_len=n * 16))[0, 0, -1].sum().item() for n in (40, 64, 600)]
    assert counts[0] == 40
    budgets = [int(reference.tpd_budget(n, config)[39]) for n in (40, 64, 600)]
    assert all(count - min(budget, 40) in (0, 1) for count, budget in zip(counts, budgets, strict=True))


@given(st.data())
def test_any_offset_of_each_batch_row(data):
    config = data.draw(testing.stem_configs())
    q, k, v = data.draw(testing.qkv(past=(0, 90), dtypes=(torch.float64,), ties=False, q_len=(1, 90)))
    B, past = q.shape[0], k.shape[2] - q.shape[2]
    offset = torch.tensor(data.draw(st.lists(st.integers(0, past), min_size=B, max_size=B)))
    kv_len = data.draw(st.none() | st.just(offset + q.shape[2]))
    prompt_len = data.draw(st.none() | st.integers(1, 400) | st.just(offset + 300))
    keywords = {"q_offset": offset, "kv_len": kv_len, "prompt_len": prompt_len}
    mask = stem_block_mask(q, k, v, config, **keywords)
    testing.assert_valid_block_mask(mask)
    assert torch.equal(kept(mask), reference.block_keep(q, k, v, config, **keywords))
    for b in range(B):
        alone = {x: int(y[b]) if isinstance(y, torch.Tensor) else y for x, y in keywords.items()}
        single = stem_block_mask(*(x[b : b + 1] for x in (q, k, v)), config, **alone)
        assert torch.equal(kept(single)[0], kept(mask)[b])


def test_an_unaligned_chunk_keeps_every_block_of_its_own(make_qkv):
    q, k, v = make_qkv(B=1, Lq=32, Lk=200)
    config = StemConfig(**{**SMALL, "sink_blocks": 0, "local_blocks": 0})
    mask = kept(stem_block_mask(q, k, v, config, q_offset=100, budget=1))
    assert mask[0, :, 0, 6:8].all()  # keys 96 to 127 hold queries 100 to 115
    assert mask[0, :, 1, 7:9].all()
    dense = testing.block_mask_to_dense(stem_block_mask(q, k, v, config, q_offset=100, budget=1))
    assert all(dense[0, :, i, 100 + i].all() for i in range(32))  # each query sees itself


def test_dirty_slots_past_kv_len_change_nothing(make_qkv):
    q, k, v = make_qkv(Lq=64, Lk=160, dtype=torch.float64)
    dirty_k, dirty_v = k.clone(), v.clone()
    dirty_k[:, :, 130:], dirty_v[:, :, 130:] = torch.nan, torch.inf
    for metric in ("zscore", "log"):
        config = StemConfig(**{**SMALL, "metric": metric})
        clean, dirty = (
            kept(stem_block_mask(q, *kv, config, q_offset=66, kv_len=130)) for kv in ((k, v), (dirty_k, dirty_v))
        )
        assert torch.equal(clean, dirty)
        trimmed = kept(stem_block_mask(q, k[:, :, :130], v[:, :, :130], config, q_offset=66))
        assert torch.equal(clean[..., :9], trimmed)
        assert not clean[..., 9:].any()


def test_zscore_statistics_follow_the_keys_so_far(make_qkv):
    # stated difference from one-shot prefill: z-scores are taken over the keys that are there
    q, k, v = make_qkv(B=1, Lq=40 * 16, dtype=torch.float64)
    v[:, :, 320:] *= 50
    config = StemConfig(**{**SMALL, "value_weight": 3.0})
    whole = kept(stem_block_mask(q, k, v, config))[:, :, :20, :20]
    first = kept(stem_block_mask(*chunk_of(q, k, v, 0, 320), config, prompt_len=640))
    assert not torch.equal(first, whole)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"q_offset": -3}, ValueError, "q_offset must be 0 or more, got -3"),
        ({"q_offset": 0.5}, TypeError, "q_offset must be an int or an int tensor"),
        ({"q_offset": torch.zeros(2, 1, dtype=torch.int)}, ValueError, r"q_offset must be .* got shape \(2, 1\)"),
        ({"kv_len": -1}, ValueError, "kv_len must be 0 or more, got -1"),
        ({"kv_len": 999}, ValueError, "kv_len must be at most the 100 keys of k, got 999"),
        ({"prompt_len": torch.ones(2)}, TypeError, "prompt_len must hold integers"),
        ({"prompt_len": True}, TypeError, "prompt_len must be an int or an int tensor"),
    ],
)
def test_wrong_lengths_are_refused(make_qkv, options, error, match):
    with pytest.raises(error, match=match):
        stem_block_mask(*make_qkv(Lq=100), StemConfig(**SMALL), **options)
