"""Block scores by Triton against small loops: in Triton's interpreter on the CPU, compiled on the GPU."""

from __future__ import annotations

import pytest
import torch

from stem_flex.kernels import stem_scores
from tests.kernels.loops import (
    TOLERANCE,
    all_valid,
    causal_rows,
    devices,
    expected_scores,
    inputs,
    masked,
    on,
)

pytestmark = pytest.mark.usefixtures("poisoned")


SHAPES = [  # B, Hq, Hkv, Lq, Lk, D, Dv, block_q, block_k, stride
    pytest.param(1, 1, 1, 1, 1, 16, 16, 128, 128, 8, id="one-token"),
    pytest.param(1, 4, 1, 127, 127, 64, 64, 128, 128, 8, id="block-1"),
    pytest.param(1, 2, 2, 128, 128, 128, 128, 128, 128, 16, id="block"),
    pytest.param(3, 4, 2, 129, 129, 40, 24, 128, 128, 8, id="block+1-D40"),
    pytest.param(1, 7, 1, 130, 300, 80, 128, 128, 64, 4, id="gqa7-128x64-D80"),
    pytest.param(2, 2, 1, 300, 520, 16, 40, 256, 128, 32, id="256x128"),
    pytest.param(1, 2, 1, 200, 200, 17, 16, 64, 64, 8, id="64x64-D17"),
]


@devices
@pytest.mark.parametrize(("B", "Hq", "Hkv", "Lq", "Lk", "D", "Dv", "block_q", "block_k", "stride"), SHAPES)
@pytest.mark.parametrize("metric", ["zscore", "log"])
def test_scores_match_loops(device, B, Hq, Hkv, Lq, Lk, D, Dv, block_q, block_k, stride, metric):
    q, k, v = inputs(B, Hq, Hkv, Lq, Lk, D, Dv, torch.float32)
    rows = causal_rows(Lq, Lk, block_q, block_k, offset=Lk - Lq)
    expected = expected_scores(q, k, v, all_valid(B, Lq, Lk), block_q, block_k, stride, metric, 0.7)
    q, k, v, rows_d = on(device, q, k, v, rows)
    got = stem_scores(q, k, v, rows_d, block_q=block_q, block_k=block_k, stride=stride, metric=metric, value_weight=0.7)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.cpu().double(), masked(expected, rows), rtol=1e-5, atol=2e-6)


@devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_scores(device, dtype):
    q, k, v = inputs(1, 2, 1, 300, 300, 64, 64, dtype)
    rows = causal_rows(300, 300, 128, 128)
    expected = expected_scores(q, k, v, all_valid(1, 300, 300), 128, 128, 8, "zscore", 0.2)
    q, k, v, rows_d = on(device, q, k, v, rows)
    got = stem_scores(q, k, v, rows_d, block_q=128, block_k=128, stride=8, metric="zscore", value_weight=0.2)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got.cpu().double(), masked(expected, rows), rtol=tolerance, atol=tolerance)


@devices
def test_class_table_masks_scores(device):
    q, k, v = inputs(2, 2, 1, 200, 200, 16, 16, torch.float32)
    classes = torch.randint(0, 3, (1, 2, 4, 4), dtype=torch.int8)
    rows = torch.tensor([0, 4, 0, 0, 0, 1, 0, 4], dtype=torch.int32).expand(1, 4, 8).contiguous()
    expected = expected_scores(q, k, v, all_valid(2, 200, 200), 64, 64, 8, "log", 0.2)
    q, k, v, rows_d, classes_d = on(device, q, k, v, rows, classes)
    got = stem_scores(q, k, v, rows_d, classes_d, block_q=64, block_k=64, stride=8, metric="log", value_weight=0.2)
    torch.testing.assert_close(got.cpu().double(), masked(expected, rows, classes), rtol=1e-5, atol=2e-6)
