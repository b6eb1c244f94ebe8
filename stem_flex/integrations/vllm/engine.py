"""Where the engine's configuration is made: settings are checked, and the backend chosen, before anything starts."""

from __future__ import annotations

import copy
import functools
from typing import Any

from stem_flex.integrations.vllm import CUDA_PATH, logger, unsupported
from stem_flex.integrations.vllm.options import KEY, parse, refuse, settings_of

_KIND = "full_attention"  # of vLLM's KV caches; window layers keep the backend that vLLM chooses for them
_EXTENSION = "stem_flex.integrations.vllm.worker.StemWorkerExtension"


def watch_arguments(arguments: type) -> None:
    """Let ``EngineArgs.create_engine_config`` check what it says about Stem. Once a class."""
    create = getattr(arguments, "create_engine_config", None)
    if create is None:
        logger().warning("vLLM's EngineArgs has no create_engine_config: %s", unsupported())
        return
    if getattr(create, "stem_flex", False):
        return

    @functools.wraps(create)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        wanted = prepare(self)
        config = create(self, *args, **kwargs)
        if wanted:
            refuse(config)
            settings_of(config)  # negative dense_layers need the model
        return config

    create_engine_config.stem_flex = True  # type: ignore[attr-defined]
    arguments.create_engine_config = create_engine_config  # type: ignore[attr-defined]


def prepare(arguments: Any) -> bool:
    """Whether ``EngineArgs`` ask for Stem; then its settings are checked and its backend is chosen.

    Raises:
        RuntimeError: vLLM's version is not supported.
        TypeError, ValueError: wrong settings, or another attention backend was chosen.
        NotImplementedError: neither CUDA nor CPU.
    """
    additional = arguments.additional_config
    chosen = _chosen(arguments)
    if not isinstance(additional, dict):
        return False
    if KEY not in additional:
        if chosen != "CUSTOM" or unsupported() is not None or not _is_ours():
            return False
        additional = arguments.additional_config = additional | {KEY: {}}
    reason = unsupported()
    if reason is not None:
        raise RuntimeError(reason)
    parse(additional[KEY], layers=2**31)  # the model's number of layers is not known yet
    from vllm.platforms import current_platform

    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        raise NotImplementedError(f"stem_flex serves vLLM on CUDA and on the CPU, got {current_platform.device_name}")
    if current_platform.is_cuda():
        _choose(arguments, chosen)
    if not arguments.worker_extension_cls:
        arguments.worker_extension_cls = _EXTENSION
    return True


def _chosen(arguments: Any) -> str | None:
    """The name of the backend that full-attention layers were told to take, None where vLLM is to choose."""
    attention = arguments.attention_config
    per_kind = getattr(attention, "backend_per_kind", None) or {}
    chosen = per_kind.get(_KIND) or arguments.attention_backend or getattr(attention, "backend", None)
    name = getattr(chosen, "name", chosen)
    return None if name is None or str(name).lower() == "auto" else str(name).upper()


def _choose(arguments: Any, chosen: str | None) -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if chosen not in (None, "CUSTOM"):
        raise ValueError(
            f"additional_config[{KEY!r}] needs the attention backend CUSTOM in full-attention layers, got {chosen}; "
            "leave the backend out"
        )
    if not _is_ours():
        raise ValueError(
            "the attention backend CUSTOM must be stem_flex's, got "
            f"{AttentionBackendEnum.CUSTOM.get_path()}; set VLLM_PLUGINS=stem_flex"
        )
    if chosen is None:
        attention = arguments.attention_config = copy.deepcopy(arguments.attention_config)  # may be the caller's own
        attention.backend_per_kind[_KIND] = AttentionBackendEnum.CUSTOM


def _is_ours() -> bool:
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if current_platform.is_cpu():
        return not AttentionBackendEnum.CUSTOM.is_overridden()
    return AttentionBackendEnum.CUSTOM.is_overridden() and AttentionBackendEnum.CUSTOM.get_path() == CUDA_PATH
