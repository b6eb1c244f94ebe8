"""Pooling by Triton against small loops: in Triton's interpreter on the CPU, compiled on the GPU."""

from __future__ import annotations

import math

import pytest
import torch

from stem_flex.kernels import ops, stem_scores
from stem_flex.kernels import pool as pool_module
from tests.kernels.loops import (
    TOLERANCE,
    block_magnitudes,
    block_means,
    causal_rows,
    devices,
    inputs,
    on,
)

pytestmark = pytest.mark.usefixtures("poisoned")


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("metric", ["zscore", "log"])
def test_pool_honours_valid_ranges(device, dtype, metric):
    """Tokens outside the ranges and tail padding count as zeros, whatever they hold; divisors stay BLOCK/s."""
    B, Hq, Hkv, L, D, Dv, block, stride = 3, 2, 1, 150, 32, 48, 64, 8
    q, k, v = inputs(B, Hq, Hkv, L, L, D, Dv, dtype)
    ks, ke = torch.tensor([0, 13, 130]), torch.tensor([L, 77, 131])
    qs, qe = torch.tensor([5, 0, 64]), torch.tensor([L, 70, 64])
    token = torch.arange(L)
    for x, start, end in ((q, qs, qe), (k, ks, ke), (v, ks, ke)):
        outside = (token < start[:, None]) | (token >= end[:, None])
        x.masked_fill_(outside[:, None, :, None], math.nan)
    qf = block_means(q, qs, qe, block, stride, False).flatten()
    kf = block_means(k, ks, ke, block, stride, True).flatten()
    bias = 0.5 * block_magnitudes(v.nan_to_num(), ks, ke, block, stride, metric).flatten()
    sizes = pool_module.sizes_of(tuple(q.shape), tuple(k.shape), Dv, block, block, stride)
    args = on(device, q, k, v, *(x.int() for x in (ks, ke, qs, qe)))
    flats, stats = ops._pooled(*args, sizes, metric, 0.5, {})
    assert flats.dtype == dtype
    assert sizes.flats == flats.numel() == qf.numel() + kf.numel()
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(flats.cpu().double(), torch.cat([qf, kf]), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(stats[: sizes.key_blocks].cpu().double(), bias, rtol=2e-5, atol=2e-6)


@devices
def test_strided_views_are_read_in_place(device):
    """A BSHD projection, a slice of a wider tensor and a broadcast batch give what their copies give."""
    g = torch.Generator().manual_seed(3)
    q = torch.randn(2, 150, 4, 32, generator=g).transpose(1, 2)
    k = torch.randn(2, 2, 150, 48, generator=g)[..., 16:]
    v = torch.randn(1, 150, 2, 32, generator=g).transpose(1, 2).expand(2, -1, -1, -1)
    options = dict(block_q=64, block_k=64, stride=8, metric="zscore", value_weight=0.3)
    rows = causal_rows(150, 150, 64, 64)
    views = [x.to(device).as_strided(x.shape, x.stride()) if device == "cpu" else x.to(device) for x in (q, k, v)]
    (rows_d,) = on(device, rows)
    got = stem_scores(*views, rows_d, **options)
    copies = [x.contiguous() for x in views]
    torch.testing.assert_close(got, stem_scores(*copies, rows_d, **options), rtol=0, atol=0)
