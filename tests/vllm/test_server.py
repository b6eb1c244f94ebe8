"""The OpenAI-compatible server, by the example: start, ask, fifty at once, stop."""

from __future__ import annotations

import importlib.util
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own: .ci/vllm makes one")
pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).resolve().parent.parent.parent
# two sparse layers of eight: on a CPU, choosing blocks is most of the work
STEM = {
    "config": {"schedule": "fixed", "k_start": 0.25, "block_size": 64},
    "min_tokens": 256,
    "dense_layers": [0, 1, 2, 4, 5, 6],
}
AT_ONCE, SECONDS = 50, 200


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("vllm_serve", ROOT / "examples" / "vllm_serve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_start_ask_fifty_at_once_stop(example):
    arguments = ("--max-model-len", "4096", "--dtype", "float32", "--enforce-eager", "--max-num-batched-tokens", "1024")
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(200, 600, (AT_ONCE,), generator=generator).tolist()
    prompts = [torch.randint(10, 4000, (length,), generator=generator).tolist() for length in lengths]
    with example.server(example.MODEL, STEM, arguments, wait=300) as address:
        answer, before = example.ask(address, 1500)
        assert answer
        assert before["chunks"] >= 2
        assert 0 < before["density"] < 0.9

        def one(prompt):
            return example.complete(address, prompt, 3, ignore_eos=True, return_token_ids=True)

        start = time.monotonic()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            choices = list(pool.map(one, prompts, timeout=SECONDS))
        assert time.monotonic() - start < SECONDS
        assert [len(choice["token_ids"]) for choice in choices] == [3] * AT_ONCE
        assert {choice["finish_reason"] for choice in choices} == {"length"}
        after = example.measured(address)
        # those of 256 tokens and more, in one chunk or several, whose tails of fewer than 128 tokens run dense
        long = [length for length in lengths if length >= 256]
        assert after["chunks"] - before["chunks"] >= len(long)
        assert sum(long) - 128 * len(long) < after["tokens"] - before["tokens"] <= sum(long)
        assert one(prompts[0])["token_ids"] == choices[0]["token_ids"]
    assert not example.answers(address)


def test_a_server_that_cannot_start_says_why(example):
    refused = example.server(example.MODEL, {"min_token": 3}, ("--max-model-len", "4096"), wait=120)
    with pytest.raises(RuntimeError, match=r"must have settings of .*got \['min_token'\]"), refused:
        pass
