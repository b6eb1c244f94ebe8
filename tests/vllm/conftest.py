"""One tiny model, and one vLLM engine at a time in this process, its attention evaluated without a compiler."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

# Read where vLLM is first imported: one process, whose counters and classes the tests see; threads left alone.
for name, value in {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}.items():
    os.environ.setdefault(name, value)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama of 3 layers on disk, with heads of a size that CPU_ATTN serves."""
    from tests.hf_models import tiny_model

    sizes = dict(hidden_size=128, head_dim=32, num_hidden_layers=3, max_position_embeddings=4096, vocab_size=128)
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("llama", **sizes).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def open_engine(model_folder: str) -> Callable[..., Any]:
    """``with open_engine(stem, **options) as llm``: an engine with these settings, None for vLLM's own attention."""
    from vllm import LLM

    from stem_flex.integrations.vllm.counters import counters

    @contextmanager
    def make(stem: dict | None = None, **options: Any) -> Iterator[Any]:
        counters.reset()
        additional = {} if stem is None else {"stem_flex": stem}
        common = dict(dtype="float32", enforce_eager=True, max_model_len=2048, skip_tokenizer_init=True)
        llm = LLM(model_folder, additional_config=additional, **(common | options))
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()  # vLLM's state of a process is freed with the engine, which must be before the next

    return make


@pytest.fixture
def engine(open_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``open_engine`` with the block lists and mask_mods evaluated token by token, instead of compiled."""
    from stem_flex.integrations.vllm import sparse
    from tests.hf_models import dense_sparse_prefill

    monkeypatch.setattr(sparse, "sparse_prefill", dense_sparse_prefill)
    return open_engine
