"""The attention a model had before: everything of the transformers integration that is no long prefill."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from stem_flex.integrations.hf_interface import models_of
from stem_flex.integrations.hf_settings import raw_settings
from stem_flex.integrations.hf_trace import record


def fallback_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    """Attention as the model did it before, under a mask tensor or None: decode, short prompts, encoders."""
    eager = _eager_function(module) if _needs_eager(module, kwargs) else None
    if not torch.compiler.is_compiling():
        record(module, "sdpa" if eager is None else "eager", query, key)
    if eager is None:
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    mask = _additive(module, query, key, mask, kwargs)
    return eager(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)[0], None


def _needs_eager(module: torch.nn.Module, kwargs: dict[str, Any]) -> bool:
    """transformers' sdpa function drops softcap and s_aux without a word, and some models have none."""
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        return True
    settings = raw_settings(getattr(module, "config", None))
    return settings.get("fallback", "sdpa") == "eager" or not _supports_sdpa(type(module).__module__)


@torch.compiler.assume_constant_result  # around the cache, which a compiler would look through
def _supports_sdpa(module_name: str) -> bool:
    return _models_support_sdpa(module_name)


@functools.cache
def _models_support_sdpa(module_name: str) -> bool:
    return all(model._supports_sdpa for model in models_of(module_name))


def _eager_function(module: torch.nn.Module):
    name = type(module).__module__
    eager = getattr(sys.modules[name], "eager_attention_forward", None)
    if eager is None:
        raise NotImplementedError(
            f"{type(module).__name__} needs its own eager attention here, which {name} does not have; "
            "use model.set_attn_implementation('eager')"
        )
    return eager


def _additive(
    module: torch.nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> Tensor | None:
    """What eager attention adds to the scores: it takes neither bool masks nor None for causal."""
    if mask is None:
        is_causal = kwargs.get("is_causal")
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if query.shape[2] == 1 or not is_causal:
            return None
        kept = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    elif mask.dtype == torch.bool:
        kept = mask
    else:
        return mask
    zero = torch.zeros((), dtype=query.dtype, device=query.device)
    return torch.where(kept, zero, torch.finfo(query.dtype).min)
