"""Whether a model's attention goes through transformers' attention interface, which is where stem_flex comes in."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from transformers import PreTrainedModel

from stem_flex.integrations import hf_versions


def no_interface(name: str) -> str:
    """What to say of a model class without the interface."""
    return (
        f"{name} does not use transformers' attention interface, so its attention "
        "cannot be replaced; stem_flex serves models that do, and stem_flex.stem_attention any tensors"
    )


def refuse_without_interface(config: Any) -> None:
    """Raise for a model that accepted the name alone, but takes from it no more than a mask it cannot read."""
    name = _model_without_interface(type(config).__module__)
    if name is not None:
        raise TypeError(f"{no_interface(name)}; load the model without attn_implementation")


@torch.compiler.assume_constant_result  # around the cache, which a compiler would look through
def _model_without_interface(config_module: str) -> str | None:
    modeling = config_module.replace(".configuration_", ".modeling_")
    # A module that is not loaded yet may be later, so that is not for the cache.
    return _first_without_interface(modeling) if modeling in sys.modules and modeling != config_module else None


def models_of(modeling: str) -> list[type[PreTrainedModel]]:
    """The model classes that a loaded module defines."""
    return [
        member
        for member in vars(sys.modules[modeling]).values()
        if isinstance(member, type) and issubclass(member, PreTrainedModel) and member.__module__ == modeling
    ]


@functools.cache
def _first_without_interface(modeling: str) -> str | None:
    """The first model class of a module none of whose model classes has the interface."""
    models = models_of(modeling)
    if not models or any(hf_versions.has_interface(model) for model in models):
        return None
    return models[0].__name__


# What a projection's output features are made of, by the names that transformers' models give it.
_HEADS_OF = {
    **dict.fromkeys(("q_proj", "q_b_proj", "kv_b_proj"), ("num_attention_heads",)),
    **dict.fromkeys(("k_proj", "v_proj"), ("num_key_value_heads",)),
    **dict.fromkeys(("qkv_proj", "query_key_value"), ("num_attention_heads", "num_key_value_heads")),
}


def refuse_undivided_heads(config: Any, ranks: int | None = None) -> None:
    """Raise where transformers' tensor parallel plan would cut through heads: those are each one rank's.

    Args:
        config: a text config. ranks: of the plan; None: as the config tells, where it does.
    """
    if ranks is None:
        ranks = getattr(getattr(config, "distributed_config", None), "tp_size", None)
    if not isinstance(ranks, int) or ranks < 2:
        return
    plan = getattr(config, "base_model_tp_plan", None) or {}
    spread = [key.rpartition(".")[2] for key, style in plan.items() if style == "colwise"]
    for name in dict.fromkeys(name for projection in spread for name in _HEADS_OF.get(projection, ())):
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % ranks:
            raise ValueError(
                f"{name} must be a multiple of the tensor parallel ranks, {ranks}, got {heads}: stem_flex needs whole "
                f"heads on each rank; start as many processes as divide {heads}"
            )
