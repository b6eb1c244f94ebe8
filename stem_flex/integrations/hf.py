"""Stem in transformers: ``attn_implementation="stem_flex"`` for causal language models.

    import stem_flex.integrations.hf as stem_hf     # registers the name

    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="stem_flex")
    # or, for an existing model, with options and checks:
    stem_hf.apply(model, StemConfig(...), dense_layers=(0, 1))

Long plain-causal prefill runs block-sparse by Stem, padded, packed, chunked or over a cache as it comes. Window
and chunk layers, and masks that are not recognised, run exactly under compiled flex_attention. Decode, short
prompts, tiny chunks and encoders run as before.

Budgets follow the whole prompt's length. ``generate`` of a model that :func:`apply` prepared knows it, also with
``prefill_chunk_size``; around forwards of your own say it with :func:`prompt_length`. Where it is not known, the
tokens seen so far (cache and chunk) count as the prompt, so that an early chunk gets the budget of a prompt that
ends with it.

Under tensor parallelism (``tp_plan="auto"`` and torchrun) every rank serves its own heads.

Models that select keys by themselves are refused, but for DeepSeek-V3.2, on whose sparse attention
:func:`refine_dsa` puts Stem.

Models that bring attention of their own instead of transformers' interface (bloom, falcon, gptj) are not served.
The name alone is refused at the first forward where such a model asks for a mask, and fails or is ignored where it
does not; use :func:`apply`, which refuses all of them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from stem_flex import selectors
from stem_flex.budget import Budget
from stem_flex.config import StemConfig
from stem_flex.integrations import hf_versions
from stem_flex.integrations.hf_attention import MODE, stem_attention_forward
from stem_flex.integrations.hf_dsa import DSA_NAME, dsa_attention_forward, dsa_mask, unwrap_indexers, wrap_indexers
from stem_flex.integrations.hf_interface import no_interface, refuse_undivided_heads
from stem_flex.integrations.hf_masks import stem_mask
from stem_flex.integrations.hf_prompts import Prompt, prompt_length, reading, tokens_of
from stem_flex.integrations.hf_settings import (
    DEFAULT_DENSE_LAYERS,
    DEFAULT_MIN_TOKENS,
    DSA_MODEL,
    FALLBACKS,
    Settings,
    layer_numbers,
    refuse_own_selection,
)
from stem_flex.integrations.hf_trace import Call, Trace, trace
from stem_flex.selectors import Selector

__all__ = ["Call", "Trace", "apply", "prompt_length", "refine_dsa", "register", "remove", "trace"]

_STATE = "_stem_flex_before"
# transformers looks for these inside a name and then runs other checks, or other kernels
_TAKEN = ("flash", "sdpa", "flex_attention", "eager", "/", "|")


def register(name: str = "stem_flex") -> None:
    """Make ``attn_implementation=name`` known to transformers. Importing this module does it for "stem_flex".

    Raises:
        ImportError: transformers is older than 5.5, whose mask functions are called differently, or has changed since.
        ValueError: transformers would take the name for another implementation.
    """
    hf_versions.check_release()
    taken = [part for part in _TAKEN if part in name]
    if taken or not name:
        raise ValueError(f"name must not be empty or contain {taken}, got {name!r}; use 'stem_flex:fast', say")
    AttentionInterface.register(name, stem_attention_forward)
    AttentionMaskInterface.register(name, stem_mask)


def apply(
    model: PreTrainedModel,
    config: StemConfig | None = None,
    *,
    dense_layers: Iterable[int] | Callable[[int], bool] = DEFAULT_DENSE_LAYERS,
    min_tokens: int = DEFAULT_MIN_TOKENS,
    selector: str | Selector | None = None,
    budget: int | Budget | None = None,
    name: str = "stem_flex",
) -> PreTrainedModel:
    """Switch a causal language model to Stem, in place; of a composite model the text model only.

    Args:
        model: any transformers causal model that uses the attention interface.
        config: Stem's options, None means ``StemConfig()``.
        dense_layers: layers that stay dense, as ``layer_idx`` (negative ones count from the end), or a function
            of ``layer_idx``. Window and chunk layers are exact in any case.
        min_tokens: a forward that makes fewer keys (cache included) runs as before, and so does a chunk of fewer
            than ``min(min_tokens, 128)`` queries. 0 with ``dense_layers=()`` sends every plain-causal prefill
            of more than one token to Stem; with more, prompts that are as fast dense run dense.
        selector: how block pairs are scored, as :func:`stem_flex.stem_block_mask` has it: the name of a registered
            selector, or the object. None: by Stem, with ``config`` to the letter.
        budget: blocks to keep instead of ``config``'s schedule: an int, or a rule of :mod:`stem_flex.budget` without
            tensors, which one forward's sizes would fit and no other's.
        name: as registered.

    Returns:
        The same model. The settings are kept as JSON on its text config (``config.stem_flex``), which
        ``save_pretrained`` saves, and on the attention modules (attribute ``stem_flex_mode``, "stem" or
        "dense", which may be changed). Applied again, the new settings take the place of the old ones.

    Raises (and leaves the model as it was):
        TypeError: ``model`` is no transformers model, a class of it has no attention interface, or a wrong option.
        NotImplementedError: the model selects its own keys.
        ValueError: a layer that the model does not have, a name or selector that is not registered, or heads that the
            tensor parallel ranks do not divide.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    if name not in AttentionInterface().valid_keys():
        raise ValueError(f"name must be registered, got {name!r}; call stem_flex.integrations.hf.register({name!r})")
    text = model.config.get_text_config(decoder=True)
    refuse_own_selection(text)
    refuse_undivided_heads(text, getattr(model, "tp_size", None))
    settings = Settings(
        config=StemConfig() if config is None else config,
        min_tokens=min_tokens,
        selector=_registered(selector) if isinstance(selector, Selector) else selector,
        budget=budget,
    )
    return _switched(model, text, settings, dense_layers, name)


def refine_dsa(
    model: PreTrainedModel,
    config: StemConfig | None = None,
    *,
    plain_layers: Iterable[int] | Callable[[int], bool] = (),
    min_tokens: int | None = None,
) -> PreTrainedModel:
    """Put Stem on top of DeepSeek sparse attention, in place: fewer tokens along the prompt, value magnitude.

    The indexer of every layer scores as before; of its ``index_topk`` tokens a prefill's queries keep what the decay
    leaves, ranked with the value magnitude (:func:`stem_flex.selectors.dsa.dsa_tokens`), and attend to them exactly.
    Decode and short prompts run the model's own selection. Nothing of queries x keys is held. The attention gathers
    its keys in PyTorch: it shows what the model says, not how fast it could be.

    Args:
        model: a ``deepseek_v32`` of transformers.
        config: ``value_weight``, ``metric``, ``mu`` and ``schedule`` count. None means ``StemConfig.paper()``, which
            saves 15 to 16 % of the tokens of prompts of 2 to 256 times ``index_topk``. ``metric="zscore"`` normalises a
            chunk's values by the keys so far, see :class:`StemConfig`.
        plain_layers: layers that keep the model's own selection, as ``dense_layers`` of :func:`apply`.
        min_tokens: as for :func:`apply`; None means twice ``index_topk``.

    Returns:
        The same model; :func:`remove` undoes it.

    Raises (and leaves the model as it was):
        TypeError, ValueError: as :func:`apply`.
        NotImplementedError: another model, or tensor parallelism, whose ranks would choose by their own values.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    text = model.config.get_text_config(decoder=True)
    if text.model_type != DSA_MODEL:
        raise NotImplementedError(f"model must be a {DSA_MODEL!r}, got {text.model_type!r}; hf.apply serves others")
    if (getattr(model, "tp_size", None) or 1) > 1:
        raise NotImplementedError(f"refine_dsa does not serve tensor parallelism, got {model.tp_size} ranks")
    settings = Settings(
        config=StemConfig.paper() if config is None else config,
        min_tokens=2 * text.index_topk if min_tokens is None else min_tokens,
    )
    _switched(model, text, settings, plain_layers, DSA_NAME)
    wrap_indexers(model)
    return model


def _switched(
    model: PreTrainedModel,
    text: Any,
    settings: Settings,
    dense_layers: Iterable[int] | Callable[[int], bool],
    name: str,
) -> PreTrainedModel:
    """The model with attention ``name``, its settings noted on its text config and layers."""
    owner = _owner(model, text)
    state = model.__dict__.get(_STATE) or {
        "implementation": hf_versions.implementation(text),
        "settings": getattr(text, "stem_flex", None),
    }
    before = state["implementation"]
    layers = _attention_layers(owner, text)
    dense = _dense(dense_layers, [module.layer_idx for module in layers])
    fallback = before if before in FALLBACKS else "sdpa"
    settings = dataclasses.replace(settings, dense_layers=dense, fallback=fallback)
    owner.set_attn_implementation({"": name})
    if hf_versions.implementation(text) != name:
        raise RuntimeError(f"{type(owner).__name__} kept its attention; transformers refused {name!r}")
    model.__dict__[_STATE] = state
    text.stem_flex = settings.to_json()
    for module in layers:
        setattr(module, MODE, "dense" if module.layer_idx in dense else "stem")
    _wrap_generate(model, state)
    return model


def remove(model: PreTrainedModel) -> PreTrainedModel:
    """Undo :func:`apply`: the attention, the config and the modules as they were. Returns the same model.

    Raises:
        ValueError: ``apply`` did not prepare this model.
    """
    state = model.__dict__.pop(_STATE, None)
    if state is None:
        raise ValueError("model must have been prepared by stem_flex.integrations.hf.apply, which it was not")
    text = model.config.get_text_config(decoder=True)
    owner = _owner(model, text)
    owner.set_attn_implementation({"": state["implementation"]})
    if state["settings"] is None:
        text.__dict__.pop("stem_flex", None)
    else:
        text.stem_flex = state["settings"]
    unwrap_indexers(model)
    for module in _attention_layers(owner, text):
        if MODE in module.__dict__:
            delattr(module, MODE)
    if _is_ours(model.__dict__.get("generate")):  # else someone has put another in its place, which stays
        del model.__dict__["generate"]
        if state["generate"] is not None:
            model.__dict__["generate"] = state["generate"]
    return model


def _wrap_generate(model: PreTrainedModel, state: dict[str, Any]) -> None:
    own = model.__dict__.get("generate")
    if hasattr(model, "generate") and not _is_ours(own):
        state["generate"] = own
        # A partial, unlike a bound method, is pickled with what it calls.
        model.__dict__["generate"] = functools.partial(_generate, model, own)


def _generate(model: Any, own: Callable | None, /, *args: Any, **kwargs: Any) -> Any:
    """``generate`` of the model, or of its class, which lets the masks know how long the prompt is."""
    call = functools.partial(type(model).generate, model) if own is None else own
    tokens = tokens_of(model, args, kwargs)
    if tokens == 0:
        return call(*args, **kwargs)
    with reading(Prompt(tokens, model.config.get_text_config(decoder=True), once=True)):
        return call(*args, **kwargs)


def _registered(selector: Selector) -> str:
    if selector.name not in selectors.names() or selectors.get(selector.name) is not selector:
        raise ValueError(
            f"selector must be a registered one, which a model's config can name, got another {selector.name!r}; "
            "use what stem_flex.selectors.register returns"
        )
    return selector.name


def _is_ours(generate: Any) -> bool:
    return isinstance(generate, functools.partial) and generate.func is _generate


def _owner(model: PreTrainedModel, text: Any) -> PreTrainedModel:
    """The outermost model that has the text config as its own."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config is text:
            if not _has_interface(module):
                raise TypeError(no_interface(type(module).__name__))
            return module
    raise TypeError(f"{type(model).__name__} holds no model for its text config, so nothing can be switched")


def _has_interface(model: PreTrainedModel) -> bool:
    return all(
        hf_versions.has_interface(type(module)) for module in model.modules() if isinstance(module, PreTrainedModel)
    )


def _attention_layers(model: PreTrainedModel, text: Any) -> list[Any]:
    return [
        module
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and getattr(module, "config", text) is text
        and "attention" in type(module).__name__.lower()
    ]


def _dense(dense_layers: Iterable[int] | Callable[[int], bool], layers: list[int]) -> tuple[int, ...]:
    known = sorted(set(layers))
    if callable(dense_layers):
        return tuple(layer for layer in known if dense_layers(layer))
    wanted = layer_numbers(dense_layers)
    count = max(known, default=-1) + 1
    chosen = [layer + count if layer < 0 else layer for layer in wanted]
    if wanted != list(DEFAULT_DENSE_LAYERS) and any(layer < 0 or layer >= count for layer in chosen):
        raise ValueError(f"dense_layers must be layers of the model, 0 to {count - 1}, got {wanted}")
    return tuple(sorted(set(chosen)))


register()
AttentionInterface.register(DSA_NAME, dsa_attention_forward)
AttentionMaskInterface.register(DSA_NAME, dsa_mask)
