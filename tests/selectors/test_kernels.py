"""Selectors with Triton kernels: their scores are those of PyTorch, their choice is the loops'."""

from __future__ import annotations

import pytest
import torch

from stem_flex import layout, selectors
from stem_flex.budget import Coverage
from stem_flex.plumbing.implementation import installed
from stem_flex.reference import estimates
from stem_flex.reference import selectors as loops
from stem_flex.selectors import flexprefill
from stem_flex.selectors.rules import Relative
from tests.selectors.cases import CONFIG, EVERY, ONE_PROMPT, agree, inputs, longer

NAMES = ("xattention", "cosa", "vecattention", "flashprefill", "proxyattn")
RULES = {
    "xattention": (loops.xattention, {"threshold": 0.7}, Coverage(0.7)),
    "cosa": (estimates.cosa, {"top_p": 0.7}, Coverage(0.7)),
    "vecattention": (estimates.vecattention, {"alpha": 0.3}, Relative(0.3)),
    "flashprefill": (loops.flashprefill, {"alpha": 0.4, "full_rows": 0}, Relative(0.4)),
}
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.fixture(autouse=True)
def _interpreted(request):
    """Skip where the kernels can't run on CPU tensors in this process."""
    if request.node.get_closest_marker("gpu"):
        return
    if not installed("triton"):
        pytest.skip("the kernels need Triton")
    from stem_flex.kernels import pool

    if not pool.INTERPRETED:
        pytest.skip("the kernels of this process are compiled")


def bound_to(case: tuple, device: str, block: int):
    batch, heads, _, q_len, k_len, given, offset = case
    if isinstance(given, type(layout.padding([1]))):
        given = layout.padding(given.lengths.to(device), side=given.side)
    offset = offset.to(device) if isinstance(offset, torch.Tensor) else offset
    return (given or layout.causal()).bind(
        batch, heads, q_len, k_len, q_offset=offset, block_size=(block, block), device=device
    )


@devices
@pytest.mark.parametrize("case", ["ragged, GQA, batch", "offsets by batch row", "padded left", "documents"])
@pytest.mark.parametrize("name", NAMES)
def test_scores(device, name, case):
    """Heads of a dimension that is no power of two, q, k, v strided as BSHD, against PyTorch in float64."""
    if name == "proxyattn" and case not in ONE_PROMPT:
        pytest.skip("proxyattn takes one prompt")
    qkv = inputs(EVERY[case], dim=24)
    known = selectors.get(name)
    config = known.configured(CONFIG)
    expected = known.scores(*qkv, config, layout=bound_to(EVERY[case], "cpu", 16), impl="torch")
    strided = (x.float().transpose(1, 2).contiguous().transpose(1, 2).to(device) for x in qkv)
    found = known.scores(*strided, config, layout=bound_to(EVERY[case], device, 16), impl="triton").cpu()
    assert torch.equal(found == -torch.inf, expected == -torch.inf)
    torch.testing.assert_close(found.double(), expected.double(), atol=2e-5, rtol=1e-5)


@devices
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 17), (1, 2, 70, 70)])
def test_sums_from_several_bounds_on(device, shape, poisoned):
    """One tile and several, a head's last one ragged, zeros and equal entries, against PyTorch one by one."""
    from stem_flex.kernels.above import sums_above

    x = (torch.rand(shape) * torch.randint(0, 3, shape)).round(decimals=2)
    bounds = torch.rand(*shape[:2], 15).view(torch.int32)
    bounds[..., 0], bounds[..., 1], bounds[..., 2] = 0, 1, 0x7F800000
    bounds[..., 3] = x.flatten(2)[..., 0].view(torch.int32)
    expected = flexprefill._sums_above(x.double().float(), bounds)
    found = sums_above(x.to(device), bounds.to(device)).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@devices
@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 1.0])
def test_largest_entries_within_a_part(device, part):
    """By sixteenths the entries are those by halves; a head of zeros keeps none."""
    x = torch.rand(2, 3, 40, 60).mul(8).softmax(-1).tril()
    x[1, 2] = 0
    found = flexprefill.largest_within(x.to(device), part, "triton").cpu()
    expected = flexprefill.largest_within(x.double().float(), part)
    assert not found[1, 2].any()
    if part in (0.0, 1.0):
        assert torch.equal(found, expected if part else torch.zeros_like(expected))
    else:  # sums of another order may end one entry apart
        assert (found.sum((2, 3)) - expected.sum((2, 3))).abs().max() <= 1
        assert (found != expected).sum() <= 6


@devices
@pytest.mark.parametrize("case", ["ragged, GQA, batch", "padded left"])
def test_flexprefill(device, case):
    """Query-aware heads choose what PyTorch chooses."""
    case = longer(case)
    qkv = inputs(case, sharpness=1.0)
    options = {"tau": 2.0, "gamma": 0.4, "min_budget": 32}
    expected = flexprefill.scores(*qkv, CONFIG, layout=bound_to(case, "cpu", 16), impl="torch", **options)
    moved = (x.float().to(device) for x in qkv)
    found = flexprefill.scores(*moved, CONFIG, layout=bound_to(case, device, 16), impl="triton", **options)
    assert 0 < (found > 1).float().mean() < 0.6  # some are lifted, not all
    torch.testing.assert_close(found.cpu().double(), expected.double(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["aligned", "chunk off the blocks"])
@pytest.mark.parametrize("name", RULES)
def test_choice(name, case):
    rule, options, budget = RULES[name]
    qkv = tuple(x.float() for x in inputs(EVERY[case]))
    agree(name, EVERY[case], rule, qkv, fast={"impl": "triton"}, budget=budget, **options)


def test_float64_is_refused():
    qkv = inputs(EVERY["aligned"])
    for name in NAMES:
        with pytest.raises(TypeError, match=r"q and k must share a dtype of .*, got torch.float64"):
            selectors.get(name).scores(*qkv, CONFIG, impl="triton")
