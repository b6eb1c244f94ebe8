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

LAST_QUERIES = ("proxyattn", "minference", "flexprefill")  # they take one prompt
NAMES = ("xattention", "cosa", "vecattention", "flashprefill", *LAST_QUERIES)
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
@pytest.mark.parametrize(
    ("name", "case"),
    [
        (name, case)
        for name in NAMES
        for case in ("ragged, GQA, batch", "offsets by batch row", "padded left", "documents")
        if case in ONE_PROMPT or name not in LAST_QUERIES
    ],
)
def test_scores(device, name, case):
    """Heads of a dimension that is no power of two, q, k, v strided as BSHD, against PyTorch in float64."""
    qkv = inputs(EVERY[case], dim=24)
    known = selectors.get(name)
    config = known.configured(CONFIG)
    expected = known.scores(*qkv, config, layout=bound_to(EVERY[case], "cpu", 16), impl="torch")
    strided = (x.float().transpose(1, 2).contiguous().transpose(1, 2).to(device) for x in qkv)
    found = known.scores(*strided, config, layout=bound_to(EVERY[case], device, 16), impl="triton").cpu()
    assert torch.equal(found == -torch.inf, expected == -torch.inf)
    torch.testing.assert_close(found.double(), expected.double(), atol=2e-5, rtol=1e-5)


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
