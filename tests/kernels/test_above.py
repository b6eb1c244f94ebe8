"""The largest entries of a head within a part of its sum by Triton: in Triton's interpreter, and compiled."""

from __future__ import annotations

import pytest
import torch

from stem_flex.kernels import above
from stem_flex.selectors.flexprefill import largest_within
from tests.kernels.loops import devices

pytestmark = pytest.mark.usefixtures("poisoned")


def check(x, part, device):
    """What is kept fits the part, is an upper end of the entries, and no more of them would fit."""
    found = largest_within(x.to(device), part, "triton").cpu()
    for one, kept in zip(x.flatten(0, 1), found.flatten(0, 1), strict=True):
        values, limit = one.double(), part * float(one.double().sum())
        least = one[kept].min() if kept.any() else torch.inf
        assert torch.equal(kept, (one > 0) & (one >= least))
        assert float(values[kept].sum()) <= limit * (1 + 4e-6)
        below = one[~kept & (one > 0)]
        if len(below):
            assert float(values[one >= below.max()].sum()) > limit * (1 - 4e-6)


@devices
@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(2, 3, 5, 17), (1, 2, 70, 70)])
def test_parts(device, shape, part):
    """One tile a head and several, the last one ragged; equal entries, a head of zeros."""
    x = torch.rand(shape).mul(8).softmax(-1).tril()
    x[0, 0] = x[0, 0].round(decimals=1)
    x[-1, -1] = 0
    check(x, part, device)


@devices
def test_more_tiles_than_are_added_at_once(device, monkeypatch):
    monkeypatch.setattr(above, "TILE", 16)
    monkeypatch.setattr(above, "ADDED", 32)
    check(torch.rand(1, 2, 40, 40), 0.4, device)


@devices
def test_numbers_of_all_sizes(device):
    """Denormals and large numbers, whose bits lie far apart."""
    x = torch.rand(1, 1, 30, 30) * 10.0 ** torch.randint(-44, 30, (1, 1, 30, 30))
    for part in (0.2, 0.99, 1.0):
        check(x, part, device)


@devices
def test_more_heads_after_fewer(device):
    """The plan of a call with fewer heads does not serve more."""
    for heads in (2, 8, 2):
        check(torch.rand(1, heads, 9, 9), 0.5, device)
