"""The tensors that the kernels are timed on: 128K tokens of 32 query and 8 key heads of 128."""

from __future__ import annotations

import pytest
import torch

import stem_flex
from bench.report import inputs

LENGTH, HEADS, KV_HEADS, DIM = 131072, 32, 8, 128


@pytest.fixture(scope="session")
def qkv():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, torch.cuda.is_available() is False")
    return inputs(LENGTH, HEADS, KV_HEADS, DIM, torch.bfloat16, torch.device("cuda"), bshd=False)


@pytest.fixture(scope="session")
def bound(qkv):
    return stem_flex.layout.causal().bind(1, HEADS, LENGTH, LENGTH, device="cuda")


@pytest.fixture
def timed(benchmark):
    def run(call):
        def synchronized():
            out = call()
            torch.cuda.synchronize()
            return out

        synchronized()  # compiles
        return benchmark(synchronized)

    return run
