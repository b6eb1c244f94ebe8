"""What vLLM's configuration asks of Stem, and what it combines that can't be served."""

from __future__ import annotations

import functools
import json
from typing import Any

from stem_flex.integrations.hf_settings import Settings

KEY = "stem_flex"
_NAME = f"additional_config[{KEY!r}]"
_SETTINGS = ("config", "dense_layers", "min_tokens", "selector", "budget")


def asked(vllm_config: Any) -> bool:
    """Whether ``additional_config`` has the key; None (no configuration) asks for nothing."""
    additional = getattr(vllm_config, "additional_config", None)
    return isinstance(additional, dict) and KEY in additional


def parse(data: Any, layers: int | None = None) -> Settings:
    """The settings of ``additional_config["stem_flex"]``; {} is the defaults.

    Raises:
        TypeError, ValueError: what is not as ``Settings.to_json`` makes it, and settings that vLLM decides itself.
    """
    if not isinstance(data, dict):
        raise TypeError(f"{_NAME} must be a dict, got {data!r}; use {{}} for the defaults")
    unknown = sorted(set(map(str, data)) - set(_SETTINGS))
    if unknown:
        raise ValueError(f"{_NAME} must have settings of {_SETTINGS}, got {unknown}; dense attention is vLLM's own")
    return Settings.from_json(data, layers, name=_NAME)


def settings_of(vllm_config: Any) -> Settings:
    """The settings of a configuration that asks for Stem, negative ``dense_layers`` counted from the model's end."""
    layers = getattr(vllm_config.model_config.hf_text_config, "num_hidden_layers", None)
    return _parsed(json.dumps(vllm_config.additional_config[KEY]), layers)


@functools.lru_cache(maxsize=64)
def _parsed(data: str, layers: int | None) -> Settings:
    return parse(json.loads(data), layers)


def refuse(vllm_config: Any) -> None:
    """Raise for what would be wrong, or silently dense, under Stem.

    Raises:
        NotImplementedError: multi-head latent attention, context parallelism, batch-invariant mode, micro-batches.
    """
    import vllm.envs as envs

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    refusals = [
        (model.use_mla, "multi-head latent attention (MLA)", "serve the model without stem_flex"),
        (
            parallel.decode_context_parallel_size > 1,
            "decode context parallelism",
            "set decode_context_parallel_size=1",
        ),
        (
            parallel.prefill_context_parallel_size > 1,
            "prefill context parallelism",
            "set prefill_context_parallel_size=1",
        ),
        (envs.VLLM_BATCH_INVARIANT, "batch-invariant mode", "unset VLLM_BATCH_INVARIANT"),
        (parallel.use_ubatching, "micro-batches (dual batch overlap)", "leave out enable_dbo and ubatch_size"),
    ]
    for holds, what, fix in refusals:
        if holds:
            raise NotImplementedError(f"stem_flex does not serve {what} in vLLM; {fix}")


def layer_reason(layer: Any, spec: Any) -> str | None:
    """Why an attention layer with this KV cache is not one for Stem, or None. ``layer`` is vLLM's ``Attention``."""
    impl = layer.impl
    reason = impl_reason(impl)
    if reason is not None:
        return reason
    if layer.head_size_v != layer.head_size:
        return "value heads of another size"
    if type(spec).__name__ != "FullAttentionSpec":
        return f"a KV cache of kind {type(spec).__name__}"
    if spec.non_causal:
        return "non-causal"
    if spec.kv_quant_mode.name != "NONE" or spec.state_content_bytes is not None or spec.num_head_slots is not None:
        return "quantized KV cache"
    return None


def impl_reason(impl: Any) -> str | None:
    """Why vLLM's attention class was built for something else than plain causal attention, or None."""
    window = impl.sliding_window
    causal = str(getattr(impl.attn_type, "value", impl.attn_type)) == "decoder"
    checks = [
        (not causal, f"attention of kind {impl.attn_type}"),
        (
            window is not None and window != -1 and tuple([window] if isinstance(window, int) else window) != (-1, -1),
            "sliding window",
        ),
        (impl.sinks is not None, "attention sinks"),
        (bool(impl.logits_soft_cap), "softcap"),
        (impl.alibi_slopes is not None, "ALiBi"),
        (impl.kv_sharing_target_layer_name is not None, "another layer's KV cache"),
        (impl.kv_cache_dtype not in ("auto", "float16", "bfloat16", "float32"), "quantized KV cache"),
        (getattr(impl, "chunk_lookback", -1) > -1, "chunked attention"),
    ]
    return next((reason for holds, reason in checks if holds), None)
