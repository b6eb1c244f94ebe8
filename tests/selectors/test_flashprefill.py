"""FlashPrefill keeps what loops over queries keep."""

from __future__ import annotations

import pytest
import torch

from stem_flex import layout, selectors
from stem_flex.plumbing.implementation import installed
from stem_flex.reference import selectors as loops
from stem_flex.selectors import flashprefill
from stem_flex.selectors.rules import Relative
from tests.selectors.cases import CONFIG, EVERY, ONE_PROMPT, agree, inputs


@pytest.mark.parametrize("case", EVERY)
@pytest.mark.parametrize("name", ["flashprefill", "flashprefill-v2"])
def test_flashprefill(case, name):
    """Both versions; the rows that are dense as a whole are the prompt's last, a document's too."""
    rule = selectors.get(name).budget
    agree(name, EVERY[case], loops.flashprefill, fast={}, alpha=rule.alpha, full_rows=rule.full_rows)
    agree(name, EVERY[case], loops.flashprefill, fast={}, budget=Relative(0.6), alpha=0.6, full_rows=0)


def test_flashprefill_in_strips(monkeypatch):

    q, k, v = inputs(ONE_PROMPT["ragged, GQA, batch"])
    whole = flashprefill.scores(q, k, v, CONFIG)
    monkeypatch.setattr(flashprefill, "_LOGITS_AT_ONCE", 1)
    torch.testing.assert_close(flashprefill.scores(q, k, v, CONFIG), whole)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", EVERY)
def test_kernel(device, case):
    """The Triton kernel, heads of a dimension that is no power of two, q strided as BSHD, against PyTorch."""
    if device == "cpu":
        if not installed("triton"):
            pytest.skip("the kernel needs Triton")
        from stem_flex.kernels import pool

        if not pool.INTERPRETED:
            pytest.skip("the kernels of this process are compiled")
    batch, heads, _, q_len, k_len, given, offset = EVERY[case]
    q, k, v = (x.float() for x in inputs(EVERY[case], dim=24))
    bound = (given or layout.causal()).bind(batch, heads, q_len, k_len, q_offset=offset, block_size=(16, 16))
    expected = flashprefill.row_sums(q, k, bound)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2).to(device) for x in (q, k, v))
    if device == "cuda":
        given = layout.padding(given.lengths.tolist(), side=given.side) if "padded" in case else given
        offset = offset.cuda() if isinstance(offset, torch.Tensor) else offset
        bound = (given or layout.causal()).bind(
            batch, heads, q_len, k_len, q_offset=offset, block_size=(16, 16), device=device
        )
    found = flashprefill.row_sums(q, k, bound, "triton").cpu()
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    with pytest.raises(TypeError, match="q and k must share a dtype of float16, bfloat16, float32 for Triton, got"):
        flashprefill.scores(q.double(), k.double(), v.double(), CONFIG, layout=bound, impl="triton")
