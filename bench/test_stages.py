"""``pytest bench``: each stage alone under pytest-benchmark, on CUDA where there is one, else small on the CPU."""

from __future__ import annotations

import pytest
import torch

import stem_flex
from bench.report import inputs
from stem_flex.diagnostics import recall
from stem_flex.select import select_blocks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTH = 131072 if DEVICE.type == "cuda" else 4096
CONFIG = stem_flex.StemConfig(schedule="fixed", k_start=0.2)


@pytest.fixture(scope="module")
def qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if DEVICE.type == "cuda":
        return inputs(LENGTH, 32, 8, 128, torch.bfloat16, DEVICE, bshd=False)
    return inputs(LENGTH, 4, 2, 64, torch.float32, DEVICE, bshd=False)


def synchronized(call):
    def timed():
        out = call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return out

    timed()
    return timed


def test_budget(benchmark):
    assert len(benchmark(lambda: stem_flex.tpd_budget(LENGTH // 128, CONFIG))) == LENGTH // 128


def test_layout(benchmark, qkv):
    q, k, _ = qkv

    def bind():
        return stem_flex.layout.sliding_window(2048).bind(1, q.shape[1], LENGTH, k.shape[2], device=DEVICE)

    assert benchmark(synchronized(bind)).q_blocks == LENGTH // 128


def test_scores(benchmark, qkv):
    q, k, v = qkv
    scores = benchmark(synchronized(lambda: stem_flex.oam_scores(q, k, v, CONFIG)))
    assert scores.shape[-1] == LENGTH // 128


def test_select(benchmark, qkv):
    q, k, v = qkv
    scores = stem_flex.oam_scores(q, k, v, CONFIG)
    bound = stem_flex.layout.causal().bind(1, q.shape[1], LENGTH, k.shape[2], device=DEVICE)
    tables = benchmark(synchronized(lambda: select_blocks(scores, bound, CONFIG)))
    assert tables.k_blocks == LENGTH // 128


def test_block_mask(benchmark, qkv):
    q, k, v = qkv
    mask = benchmark(synchronized(lambda: stem_flex.stem_block_mask(q, k, v, CONFIG)))
    assert stem_flex.block_density(mask) < 1


def test_attention(benchmark, qkv):
    q, k, v = qkv
    out = benchmark(synchronized(lambda: stem_flex.stem_attention(q, k, v, CONFIG)))
    assert out.shape == q.shape


def test_recall(benchmark, qkv):
    q, k, v = (x[:, :, :2048] for x in qkv)
    mask = stem_flex.stem_block_mask(q, k, v, CONFIG)
    assert benchmark(synchronized(lambda: recall(q, k, mask))).max() <= 1.001
