"""Proxies of blocks by Triton against the definition: in Triton's interpreter on the CPU, compiled on the GPU."""

from __future__ import annotations

import math

import pytest
import torch

from stem_flex.kernels.sketch_proxies import key_plane, proxies, query_plane
from stem_flex.reference import sketch as reference
from tests.kernels.loops import devices, on

pytestmark = pytest.mark.usefixtures("poisoned")


def made(device, x, valid, outliers, means, block=16, row=0, count=None, keys=True):
    """Proxies (B, H, blocks, P, D) by the kernel, of the blocks [row, row + count)."""
    B, H, L, D = x.shape
    count = -(-L // block) if count is None else count
    plane = key_plane(H, L, D, block, outliers, means) if keys else query_plane(H, L, D, block, outliers, means, count)
    out = torch.full((B * H * plane.stride_h,), math.nan, dtype=x.dtype, device=device)
    bounds = [None if valid is None else torch.tensor(end, dtype=torch.int32) for end in (valid or (0, 0))]
    x = x.to(device) if device != "cpu" else x
    proxies(x, *on(device, *bounds), out, plane, {}, row=row, count=count, slot="test")
    strides = (H * plane.stride_h, plane.stride_h, plane.stride_i, plane.stride_p, 1)
    whole = out.as_strided((B, H, count, plane.proxies, plane.width), strides).cpu()
    assert not whole.isnan().any()
    assert (whole[..., D:] == 0).all()
    return whole[..., :D]


def defined(x, valid, outliers, means, block=16):
    """The same by the definition in float64, zeros for what stands for no token."""
    B, H, L, D = x.shape
    out = torch.zeros(B, H, -(-L // block), outliers + means, D, dtype=torch.float64)
    for b in range(B):
        low, high = (0, L) if valid is None else (valid[0][b], valid[1][b])
        for h in range(H):
            for i, of_block in enumerate(reference.proxies(x[b, h].double(), (low, high), block, outliers, means)):
                tokens = range(max(low, i * block), min(high, L, (i + 1) * block))
                single = min(outliers, len(tokens))
                groups = [g for g in range(means) if any((t % block) * means // block == g for t in tokens)]
                for place, (vector, _) in zip([*range(single), *(outliers + g for g in groups)], of_block, strict=True):
                    out[b, h, i, place] = vector
    return out


@devices
@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize(("outliers", "means"), [(3, 4), (0, 16), (16, 2)])
def test_proxies_are_the_definition(device, outliers, means, keys):
    """Means and outliers in their places, rows of a batch with tokens that are not real, dims filled up with zeros."""
    x = torch.randn(2, 2, 40, 20)
    for valid in (None, ([0, 5], [40, 33])):
        got = made(device, x, valid, outliers, means, keys=keys)
        torch.testing.assert_close(got.double(), defined(x, valid, outliers, means), atol=1e-6, rtol=1e-6)


@devices
def test_rows_of_a_chunk(device):
    """Blocks from a row on, the first of them first; both orders of heads and tokens in memory."""
    x = torch.randn(1, 70, 2, 16).transpose(1, 2)
    got = made(device, x, None, 2, 4, row=2, count=3, keys=False)
    torch.testing.assert_close(got.double(), defined(x, None, 2, 4)[:, :, 2:], atol=1e-6, rtol=1e-6)
    assert torch.equal(got, made(device, x.contiguous(), None, 2, 4, row=2, count=3, keys=False))


@devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_proxies(device, dtype):
    """Outliers are the tokens themselves, means are rounded once."""
    x = torch.randn(1, 1, 32, 16).to(dtype)
    expected = defined(x, None, 2, 4)
    got = made(device, x, None, 2, 4)
    assert torch.equal(got[..., :2, :], expected[..., :2, :].to(dtype))
    torch.testing.assert_close(got.double(), expected, atol=0, rtol=torch.finfo(dtype).eps)


@devices
def test_equally_far_tokens_are_taken_in_their_order(device):
    """Ties to the lower index; tokens of NaN are farthest, and each has a place of its own."""
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    x = torch.cat([torch.zeros(4, 2), corners.repeat(3, 1)])[None, None]
    assert torch.equal(made(device, x, None, 3, 1)[0, 0, 0, :3], corners[:3])
    x[0, 0, 9] = math.inf
    plane = key_plane(1, 16, 2, 16, 16, 1)
    out = torch.full((plane.stride_h,), 7.0, device=device)
    proxies(*on(device, x), None, None, out, plane, {}, row=0, count=1, slot="test")
    assert out[plane.width * 16 :].isinf().any()  # the mean
    assert not (out == 7).any()


@pytest.mark.gpu
def test_far_rows():
    """Tokens of a block that lie 2^31 elements apart are found with 64-bit addresses."""
    x = torch.empty(16, 2**28, device="cuda", dtype=torch.bfloat16)[None, None, :, -16:]
    x.normal_()
    assert torch.equal(made("cuda", x, None, 2, 4), made("cuda", x.contiguous(), None, 2, 4))
