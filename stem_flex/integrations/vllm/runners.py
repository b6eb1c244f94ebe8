"""vLLM's model runners: they know the prompts' lengths, which the metadata of attention does not have."""

from __future__ import annotations

import functools
import sys
import weakref
from typing import Any

from stem_flex.integrations.vllm import logger
from stem_flex.integrations.vllm.options import asked

_CLASSES = (
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner"),  # the CPU's runner is a subclass
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner"),
)
_runners: weakref.WeakSet[Any] = weakref.WeakSet()
_warned: set[str] = set()


def watch_runners() -> None:
    """Remember each model runner where it makes its KV cache, and check there that something runs sparse."""
    for module, name in _CLASSES:
        runner = getattr(sys.modules.get(module), name, None)
        initialize = getattr(runner, "initialize_kv_cache", None)
        if runner is None or initialize is None or getattr(initialize, "stem_flex", False):
            continue
        runner.initialize_kv_cache = _watching(initialize)


def _watching(initialize: Any) -> Any:
    @functools.wraps(initialize)
    def initialize_kv_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = initialize(self, *args, **kwargs)
        if asked(self.vllm_config):
            _runners.add(self)
            _check_layers(self.vllm_config)
        return result

    initialize_kv_cache.stem_flex = True  # type: ignore[attr-defined]
    return initialize_kv_cache


def _check_layers(vllm_config: Any) -> None:
    layers = vllm_config.compilation_config.static_forward_context
    impls = {name: layer.impl for name, layer in layers.items() if hasattr(layer, "impl")}
    if any(getattr(impl, "stem_sparse", False) for impl in impls.values()):
        return
    reasons = {str(getattr(impl, "stem_reason", "not stem_flex's backend")) for impl in impls.values()}
    message = f"no attention layer runs sparse: {', '.join(sorted(reasons)) or 'the model has none'}"
    if vllm_config.parallel_config.pipeline_parallel_size > 1:  # other stages may have some
        logger().warning("stem_flex: in this pipeline stage %s", message)
        return
    raise ValueError(
        f"additional_config['stem_flex'] asks for Stem, but {message}; change dense_layers, or leave it out"
    )


def prompt_lengths(vllm_config: Any, common: Any) -> list[int | None]:
    """Tokens of the prompt of each request of a batch, as the runner of this configuration has them.

    None for each, with one warning, where no runner is known.
    """
    count = common.num_reqs
    runner = next((runner for runner in _runners if runner.vllm_config is vllm_config), None)
    lengths = None
    if hasattr(runner, "req_states"):
        if common.req_idx is not None:
            lengths = runner.req_states.prompt_len.np[common.req_idx[:count]].tolist()  # type: ignore[union-attr]
    elif hasattr(runner, "input_batch"):
        lengths = runner.input_batch.num_prompt_tokens[:count].tolist()  # type: ignore[union-attr]
    if lengths is None:
        warn_once(
            "vLLM's runner does not tell the prompts' lengths: a chunk gets the budget of a prompt that ends with it"
        )
        return [None] * count
    return [*lengths, *[None] * (count - len(lengths))]


def warn_once(message: str) -> None:
    """Log a warning of the plug-in, each once in a process."""
    if message not in _warned:
        _warned.add(message)
        logger().warning("stem_flex: %s", message)
