"""transformers' tensor parallelism on two processes against one: `tensor_parallel.py` holds the checks."""

from __future__ import annotations

import pytest

from tests.distributed import ranks


def test_two_ranks(tmp_path):
    pytest.importorskip("transformers", reason="tensor parallelism is transformers' own")
    pytest.importorskip("accelerate", reason="transformers loads a tensor parallel model with it")
    from tests.hf_models import tiny_model

    tiny_model("llama").save_pretrained(tmp_path / "whole")
    six = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96}
    tiny_model("llama", **six).save_pretrained(tmp_path / "three_key_heads")
    assert len(ranks.agreed(2, "tests.distributed.tensor_parallel", tmp_path)) == 2
