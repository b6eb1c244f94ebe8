"""The attention a model had before: everything of the transformers integration that is no long prefill."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from stem_flex.integrations import hf_versions
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
    eager = hf_versions.eager_attention(module) if _needs_eager(module, kwargs) else None
    if not torch.compiler.is_compiling():
        record(module, "sdpa" if eager is None else "eager", query, key)
    if eager is None:
        return hf_versions.sdpa_attention(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    mask = _additive(module, query, key, mask, kwargs)
    return eager(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)[0], None


def _needs_eager(module: torch.nn.Module, kwargs: dict[str, Any]) -> bool:
    """transformers' sdpa function drops softcap and s_aux without a word, and some models have none."""
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        return True
    settings = raw_settings(getattr(module, "config", None))
    return settings.get("fallback", "sdpa") == "eager" or not _has_sdpa(type(module).__module__)


@torch.compiler.assume_constant_result  # around the cache, which a compiler would look through
def _has_sdpa(module_name: str) -> bool:
    return _models_support_sdpa(module_name)


@functools.cache
def _models_support_sdpa(module_name: str) -> bool:
    return all(hf_versions.supports_sdpa(model) for model in models_of(module_name))


def attends_causally(module: torch.nn.Module, kwargs: dict[str, Any], *, default: bool) -> bool:
    """What the call says, else the module, else ``default``: as transformers' sdpa function has it."""
    is_causal = kwargs.get("is_causal")
    return getattr(module, "is_causal", default) if is_causal is None else is_causal


def _additive(
    module: torch.nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> Tensor | None:
    """What eager attention adds to the scores: it takes neither bool masks nor None for causal."""
    if mask is None:
        if query.shape[2] == 1 or not attends_causally(module, kwargs, default=True):
            return None
        kept = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    elif mask.dtype == torch.bool:
        kept = mask
    else:
        return mask
    zero = torch.zeros((), dtype=query.dtype, device=query.device)
    return torch.where(kept, zero, torch.finfo(query.dtype).min)
