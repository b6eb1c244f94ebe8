"""Two cards and NCCL: `cards.py` holds what the ranks check together. ``python -m pytest -m gpu tests/distributed``."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import ranks


@pytest.mark.gpu
def test_two_cards(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, got {torch.cuda.device_count()}")
    pytest.importorskip("transformers", reason="tensor parallelism is transformers' own")
    from tests.hf_models import tiny_model

    tiny_model("llama").save_pretrained(tmp_path / "whole")
    assert len(ranks.agreed(2, "tests.distributed.cards", tmp_path, cuda=True)) == 3
