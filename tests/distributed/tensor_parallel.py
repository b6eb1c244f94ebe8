"""What two ranks check together of transformers' tensor parallelism; `test_tensor_parallel.py` starts them."""

from __future__ import annotations

import os
import warnings
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from stem_flex import StemConfig
from stem_flex.integrations import hf, hf_attention
from tests.hf_models import dense_sparse_prefill

SPARSE = StemConfig(schedule="fixed", k_start=2, block_size=16, stride=4, sink_blocks=1, local_blocks=0)


@cache
def ids() -> torch.Tensor:
    return torch.randint(2, 64, (1, 150), generator=torch.Generator().manual_seed(0))


def load(name: str, **options: Any) -> Any:
    folder = os.path.join(os.environ["RANKS_FOLDER"], name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer releases prefer DistributedConfig to tp_plan, older have no other
        return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="stem_flex", **options).eval()


def say(model: Any) -> tuple[torch.Tensor, list[list[int]], hf.Trace]:
    """Logits of the prompt, six generated tokens, and the paths taken."""
    before, hf_attention.sparse_prefill = hf_attention.sparse_prefill, dense_sparse_prefill
    try:
        with torch.no_grad(), hf.trace() as seen:
            logits = model(ids()).logits
            answer = model.generate(ids(), max_new_tokens=6, do_sample=False)
    finally:
        hf_attention.sparse_prefill = before
    return logits, answer.tolist(), seen


def check_tokens_are_one_processs(rank: int, world: int) -> None:
    models = [load("whole", tp_plan="auto"), load("whole")]
    assert [getattr(model, "tp_size", None) or 1 for model in models] == [2, 1]
    for model in models:
        hf.apply(model, SPARSE, dense_layers=(0,), min_tokens=0)
    (logits, answer, seen), (one_logits, one_answer, one_seen) = map(say, models)
    assert answer == one_answer
    torch.testing.assert_close(logits, one_logits, atol=1e-4, rtol=1e-4)
    assert seen.layers("stem") == one_seen.layers("stem") == [1]
    dense = load("whole")
    hf.apply(dense, SPARSE, dense_layers=(0, 1), min_tokens=0)
    assert (say(dense)[0] - one_logits).abs().max() > 1e-2  # the choice of blocks matters to these tokens


def check_heads_that_do_not_divide(rank: int, world: int) -> None:
    model = load("three_key_heads", tp_plan="auto")
    match = "num_key_value_heads must be a multiple of the tensor parallel ranks, 2, got 3"
    with pytest.raises(ValueError, match=match):
        hf.apply(model)
    if hasattr(model.config, "distributed_config"):
        with pytest.raises(ValueError, match=match), torch.no_grad():
            model(ids())
