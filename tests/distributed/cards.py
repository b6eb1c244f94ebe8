"""What two ranks check together, each with a card of its own and NCCL; `test_cuda.py` starts them."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from stem_flex import StemConfig, layout, stem_attention, stem_block_mask
from stem_flex.distributed import Split, balanced, context_prefill, prefill, unshard, zigzag
from stem_flex.plumbing.implementation import installed
from stem_flex.plumbing.tables import block_classes

CUDA = torch.cuda.is_available()
CONFIG = StemConfig(schedule="fixed", k_start=8)
TOKENS = 16384 - 57 if CUDA else 1500


def qkv(tokens: int) -> list[torch.Tensor]:
    """The same whole q, k, v on every rank's card."""
    generator = torch.Generator().manual_seed(tokens)
    drawn = [torch.randn(1, heads, tokens, 64, generator=generator) for heads in (8, 2, 2)]
    return [x.to("cuda", torch.bfloat16) if CUDA else x for x in drawn]


def same(split: Split, backend: str, **options: Any) -> None:
    """Block lists equal, outputs within rounding of one card's."""
    whole = qkv(split.tokens)
    rank, masks = dist.get_rank(), []
    build = prefill.stem_block_mask

    def spy(*args: Any, **keywords: Any) -> Any:
        masks.append(build(*args, **keywords))
        return masks[-1]

    prefill.stem_block_mask = spy
    try:
        out = context_prefill(*(split.shard(x, rank) for x in whole), CONFIG, split=split, backend=backend, **options)
    finally:
        prefill.stem_block_mask = build
    expected = block_classes(stem_block_mask(*whole, CONFIG, **options))
    for mask, (start, end) in zip(masks, split.ranges[rank], strict=True):
        assert torch.equal(block_classes(mask), expected[:, :, start // 128 : -(-end // 128)])
    exact = stem_attention(*whole, CONFIG, backend=backend, **options)
    assert isinstance(out, torch.Tensor)
    assert isinstance(exact, torch.Tensor)
    assert (unshard(out, split) - exact).abs().max() <= 1e-2 * exact.abs().max()


def check_context_parallel(rank: int, world: int) -> None:
    backends = ["triton", *(["flash"] if installed("flash_attn.cute") else [])] if CUDA else ["cpu"]
    for backend in backends:
        for make in (balanced(TOKENS, world, CONFIG), zigzag(TOKENS, world)):
            same(make, backend)
        same(balanced(TOKENS, world, CONFIG), backend, layout=layout.documents([0, 700, TOKENS]))


def check_a_rank_that_fails(rank: int, world: int) -> None:
    split = zigzag(2048, world)
    own = [split.shard(x, rank) for x in qkv(2048)]
    short = [own[0][:, :, 1:], *own[1:]] if rank == 1 else own
    with pytest.raises(ValueError if rank == 1 else RuntimeError, match="q must have the 1024 rows that rank 1 holds"):
        context_prefill(*short, CONFIG, split=split)
    attend = prefill.sparse_prefill

    def fails(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    prefill.sparse_prefill = fails if rank == 0 else attend
    try:
        with pytest.raises(torch.OutOfMemoryError if rank == 0 else RuntimeError, match="CUDA out of memory"):
            context_prefill(*own, CONFIG, split=split)
    finally:
        prefill.sparse_prefill = attend
    assert context_prefill(*own, CONFIG, split=split).shape == own[0].shape


def check_tensor_parallel_tokens(rank: int, world: int) -> None:
    from transformers import AutoModelForCausalLM

    from stem_flex.integrations import hf

    folder = Path(os.environ["RANKS_FOLDER"]) / "whole"
    ids = torch.randint(2, 64, (1, 900), generator=torch.Generator().manual_seed(0)).to("cuda" if CUDA else "cpu")
    config = StemConfig(schedule="fixed", k_start=1, block_size=128, sink_blocks=1, local_blocks=1)
    answers = []
    for options in ({"tp_plan": "auto"}, {}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="stem_flex", **options).eval()
        model = hf.apply(model.to(ids.device) if not options else model, config, dense_layers=(0,), min_tokens=0)
        with torch.no_grad(), hf.trace() as seen:
            logits = model(ids).logits[:, -1]
            answers.append((model.generate(ids, max_new_tokens=8, do_sample=False).tolist(), logits))
        assert seen.layers("stem") == [1]
    assert answers[0][0] == answers[1][0]
    torch.testing.assert_close(answers[0][1], answers[1][1], atol=2e-2, rtol=2e-2)
