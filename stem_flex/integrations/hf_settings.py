"""What the transformers integration is told, kept as JSON on the text config, and what it refuses."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from stem_flex import budget, selectors
from stem_flex.budget import Budget, rule_of
from stem_flex.config import StemConfig

DEFAULT_MIN_TOKENS = 8192  # the default budget keeps every block of a prompt below 56 blocks (7168 tokens)
DEFAULT_DENSE_LAYERS = (0, 1)
TINY_QUERIES = 128  # a chunk with fewer queries (decode, speculative tokens) is no prefill worth a selection
FALLBACKS = ("sdpa", "eager")
DSA_MODEL = "deepseek_v32"  # whose own selection hf.refine_dsa refines

# Attention that selects keys by itself and leaves it to the attention function, or to a mask of its own kind,
# to apply the choice. Stem on top, or a dense attention in its place, would be silently another model.
_OWN_SELECTION = frozenset(
    "axk2 deepseek_v32 deepseek_v4 glm_moe_dsa glm5_next glm5_next_text hy_v4 minimax_m3_vl "
    "minimax_m3_vl_text qwen4_exp qwen4_exp_text".split()
)
_OWN_SELECTION_LAYERS = frozenset(
    "compressed_sparse_attention deepseek_sparse_attention heavily_compressed_attention minimax_m3_sparse "
    "qwen_sparse_attention".split()
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the integration.

    Args:
        config: Stem's own options.
        dense_layers: layers (``layer_idx``, 0 or more) whose plain-causal prefill stays exactly dense.
        min_tokens: with fewer keys than this, and in chunks of fewer than ``min(min_tokens, 128)`` queries, a
            forward runs as the model did before.
        fallback: attention of everything that is not prefill, "sdpa" or "eager".
        selector: name of a registered selector, see :func:`stem_flex.stem_block_mask`. None: Stem as ``config`` says.
        budget: an int, or a rule of :mod:`stem_flex.budget` without tensors. None: the selector's, else ``config``'s.
    """

    config: StemConfig = field(default_factory=StemConfig)
    dense_layers: tuple[int, ...] = DEFAULT_DENSE_LAYERS
    min_tokens: int = DEFAULT_MIN_TOKENS
    fallback: str = "sdpa"
    selector: str | None = None
    budget: int | Budget | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.config, StemConfig):
            raise TypeError(f"config must be a StemConfig or None, got {self.config!r}")
        if isinstance(self.min_tokens, bool) or not isinstance(self.min_tokens, int):
            raise TypeError(f"min_tokens must be an int, got {self.min_tokens!r}")
        if self.min_tokens < 0:
            raise ValueError(f"min_tokens must be 0 or more, got {self.min_tokens}")
        if self.fallback not in FALLBACKS:
            raise ValueError(f"fallback must be one of {FALLBACKS}, got {self.fallback!r}")
        if self.selector is not None:
            if not isinstance(self.selector, str):
                raise TypeError(f"selector must be the name of a registered selector or None, got {self.selector!r}")
            selectors.get(self.selector)
        if self.budget is not None:
            rule_to_json(self.budget)
            rule_of(self.budget, self.config)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings, as a transformers config can save them."""
        plain = {
            item.name: getattr(self.config, item.name)
            for item in dataclasses.fields(self.config)
            if getattr(self.config, item.name) != item.default
        }
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}
        return {
            "config": plain,
            "dense_layers": list(self.dense_layers),
            "min_tokens": self.min_tokens,
            "fallback": self.fallback,
            "selector": self.selector,
            "budget": None if self.budget is None else rule_to_json(self.budget),
        }

    @classmethod
    def from_json(
        cls, data: dict[str, Any] | None, layers: int | None = None, *, name: str = "config.stem_flex"
    ) -> Settings:
        """Inverse of :meth:`to_json`; None and missing keys are the defaults, unknown keys an error.

        ``layers`` is how many the model has, from whose end negative ``dense_layers`` count; ``name`` is what errors
        call the settings.
        """
        data = _plain(name, data, cls)
        config = _plain(f"{name}['config']", data.pop("config", None), StemConfig)
        for field_name in ("block_size", "sketch", "coarse"):
            if isinstance(config.get(field_name), list):
                config[field_name] = tuple(config[field_name])
        if "dense_layers" in data:
            data["dense_layers"] = _from_start(layer_numbers(data["dense_layers"]), layers, name)
        if isinstance(data.get("budget"), dict):
            data["budget"] = _rule_from_json(data["budget"], f"{name}['budget']")
        return cls(config=StemConfig(**config), **data)


def rule_to_json(rule: int | Budget) -> int | dict[str, Any]:
    """A budget rule as a config can save it: its name in :mod:`stem_flex.budget` and its fields.

    Raises:
        TypeError: a rule of the caller's own, or one that holds a tensor.
    """
    if not isinstance(rule, Budget):
        if isinstance(rule, bool) or not isinstance(rule, int):
            raise TypeError(f"budget must be an int, a rule of stem_flex.budget or None, got {type(rule).__name__}")
        return rule
    name = type(rule).__name__
    if getattr(budget, name, None) is not type(rule):
        raise TypeError(
            f"budget must be a rule of stem_flex.budget, which a model's config can save, got {name}; register a "
            "selector that brings it: stem_flex.selectors.register(name, scores, note, budget=rule)"
        )
    fields = {item.name: getattr(rule, item.name) for item in _fields(rule)}
    unsaved = {key: value for key, value in fields.items() if not isinstance(value, int | float | str | None)}
    if unsaved:
        key, value = next(iter(unsaved.items()))
        raise TypeError(f"budget must hold numbers, which a model's config can save, got {key} {type(value).__name__}")
    return {"rule": name, **fields}


def _rule_from_json(data: dict[str, Any], name: str) -> Budget:
    data = dict(data)
    given = data.pop("rule", None)
    rule = getattr(budget, given, None) if isinstance(given, str) else None
    if not (isinstance(rule, type) and issubclass(rule, Budget)):
        raise ValueError(f"{name} must name a rule of stem_flex.budget, got {given!r}")
    return rule(**_plain(name, data, rule))


def _fields(cls: Any) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()


def _plain(name: str, data: Any, cls: Any) -> dict[str, Any]:
    """A copy of a dict of the dataclass's fields, {} for None."""
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise TypeError(f"{name} must be a dict, got {data!r}")
    known = [item.name for item in _fields(cls)]
    unknown = data.keys() - set(known)
    if unknown:
        raise ValueError(f"{name} has unknown settings {sorted(map(str, unknown))}; known ones are {known}")
    return dict(data)


def layer_numbers(dense_layers: Iterable[int]) -> list[int]:
    """The layers as ints, or a TypeError that names the argument."""
    try:
        layers = list(dense_layers)
        if not any(isinstance(layer, bool) for layer in layers):
            return [operator.index(layer) for layer in layers]
    except TypeError:
        pass
    raise TypeError(
        f"dense_layers must be layer numbers, such as (0, 1), or for apply a function of one, got {dense_layers!r}"
    )


def _from_start(layers: list[int], count: int | None, name: str) -> tuple[int, ...]:
    if any(layer < -(count or 0) for layer in layers):
        known = "how many the model has is not known" if count is None else f"the model has {count}"
        raise ValueError(f"{name}['dense_layers'] counts from the end in {layers}, but {known}")
    return tuple(layer + (count or 0) if layer < 0 else layer for layer in layers)


def read_settings(config: Any) -> Settings:
    """The settings on a transformers config, checked; settings of the same value are parsed once.

    Raises:
        TypeError, ValueError: settings that are not as :meth:`Settings.to_json` makes them.
    """
    data = getattr(config, "stem_flex", None)
    layers = getattr(config, "num_hidden_layers", None)
    return _parsed(_Data(data), layers if isinstance(layers, int) else None)


class _Data:
    """Settings as a key of a cache: dicts do not hash, and may be changed in place."""

    def __init__(self, data: Any):
        self.data, self.text = data, repr(data)

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Data) and self.text == other.text


@functools.lru_cache(maxsize=64)
def _parsed(data: _Data, layers: int | None) -> Settings:
    return Settings.from_json(data.data, layers)


def raw_settings(config: Any) -> dict[str, Any]:
    """The JSON settings on a transformers config, unchecked: cheap, and readable by a compiler."""
    data = getattr(config, "stem_flex", None)
    return {} if data is None else data


def is_prefill(settings: dict[str, Any], queries: int, keys: int) -> bool:
    """Whether a forward of ``queries`` tokens that makes ``keys`` keys is one for Stem, by host-known lengths."""
    if queries <= 1:
        return False
    min_tokens = settings.get("min_tokens", DEFAULT_MIN_TOKENS)
    return keys >= min_tokens and queries >= min(min_tokens, TINY_QUERIES)


def refuse_own_selection(config: Any) -> None:
    """Raise for models that bring their own sparse attention."""
    layers = _OWN_SELECTION_LAYERS.intersection(getattr(config, "layer_types", None) or ())
    if getattr(config, "model_type", None) in _OWN_SELECTION or layers:
        hint = ", or stem_flex.integrations.hf.refine_dsa" if config.model_type == DSA_MODEL else ""
        raise NotImplementedError(
            f"stem_flex does not serve {config.model_type!r}: the model selects its own keys "
            f"({', '.join(sorted(layers)) or 'an indexer'}) and expects the attention function to apply that "
            f"choice; use model.set_attn_implementation('sdpa' or 'eager'){hint}"
        )
