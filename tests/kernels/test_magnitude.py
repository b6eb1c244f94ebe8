"""Magnitudes of key blocks by Triton against small loops: in Triton's interpreter on the CPU, compiled on the GPU."""

from __future__ import annotations

import math

import pytest
import torch

from stem_flex.kernels import stem_scores
from tests.kernels.loops import (
    all_valid,
    causal_rows,
    devices,
    expected_scores,
    inputs,
    masked,
    on,
)

pytestmark = pytest.mark.usefixtures("poisoned")


@devices
@pytest.mark.parametrize("metric", ["zscore", "log"])
def test_nan_values_have_no_magnitude(device, metric):
    q, k, v = inputs(1, 2, 1, 300, 300, 32, 32, torch.float32)
    options = {"block_q": 128, "block_k": 128, "stride": 8, "metric": metric, "value_weight": 0.5}
    zeroed = v.clone()
    zeroed[:, :, 70] = 0.0
    v[:, :, 70, 3] = math.nan
    q, k, v, zeroed, rows = on(device, q, k, v, zeroed, causal_rows(300, 300, 128, 128))
    assert torch.equal(stem_scores(q, k, v, rows, **options), stem_scores(q, k, zeroed, rows, **options))


@devices
def test_fewer_than_two_complete_groups_have_no_magnitude(device):
    q, k, v, rows = on(device, *inputs(1, 1, 1, 15, 15, 16, 16, torch.float32), causal_rows(15, 15, 64, 64))
    options = dict(block_q=64, block_k=64, stride=8, metric="zscore")
    with_values = stem_scores(q, k, v, rows, value_weight=0.5, **options)
    without = stem_scores(q, k, v, rows, value_weight=0.0, **options)
    torch.testing.assert_close(with_values, without)


@devices
def test_statistics_of_many_blocks_combine(device, monkeypatch):
    """More blocks than one step combines and than one program normalises."""
    from stem_flex.kernels import magnitude as magnitude_module

    monkeypatch.setattr(magnitude_module, "COMBINE", 4)
    monkeypatch.setattr(magnitude_module, "BLOCKS", 2)
    q, k, v = inputs(1, 2, 2, 16, 300, 16, 16, torch.float32)
    v += 50  # a mean that dwarfs the spread
    rows = causal_rows(16, 300, 16, 32, offset=284)
    expected = expected_scores(q, k, v, all_valid(1, 16, 300), 16, 32, 4, "zscore", 0.5)
    q, k, v, rows_d = on(device, q, k, v, rows)
    got = stem_scores(q, k, v, rows_d, block_q=16, block_k=32, stride=4, metric="zscore", value_weight=0.5)
    torch.testing.assert_close(got.cpu().double(), masked(expected, rows), rtol=1e-3, atol=1e-3)
