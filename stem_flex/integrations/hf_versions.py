"""All of transformers that its releases do not promise to keep, in one place, for the integration and its tests.

Serves 5.5 to 5.24, the releases that were tested. What a release has under another name is found here; what it does
not have raises ImportError, naming both, where anything asks for it.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

OLDEST = (5, 5)

# How transformers itself attends and makes mask tensors, by the names that it promises.
sdpa_attention = AttentionInterface()["sdpa"]
sdpa_mask = AttentionMaskInterface()["sdpa"]
eager_mask = AttentionMaskInterface()["eager"]


def version() -> str:
    """The release of transformers that is installed."""
    return importlib.metadata.version("transformers")


def release() -> tuple[int, int]:
    """Major and minor number of :func:`version`."""
    found = re.match(r"(\d+)\.(\d+)", version())
    if found is None:
        raise ImportError(f"transformers must have a version such as 5.24.0, got {version()!r}")
    return int(found[1]), int(found[2])


def _missing(what: str) -> ImportError:
    return ImportError(
        f"transformers {version()} has no {what}, which stem_flex needs of it; "
        "install one that it was tested with: pip install 'transformers>=5.5,<=5.24'"
    )


# -- models -----------------------------------------------------------------------------------------------------------


def has_interface(model_class: Any) -> bool:
    """Whether the class lets its attention be chosen by name, as ``AttentionInterface`` has it."""
    can_set = getattr(model_class, "_can_set_attn_implementation", None)
    if can_set is None:
        raise _missing("PreTrainedModel._can_set_attn_implementation")
    return can_set()


def supports_sdpa(model_class: Any) -> bool:
    """Whether the class says that torch's scaled_dot_product_attention is right for it."""
    if not hasattr(model_class, "_supports_sdpa"):
        raise _missing("PreTrainedModel._supports_sdpa")
    return model_class._supports_sdpa


def eager_attention(module: Any) -> Callable:
    """The eager attention function that an attention module's own file has.

    Raises:
        NotImplementedError: it has none, or under another name.
    """
    name = type(module).__module__
    eager = getattr(sys.modules[name], "eager_attention_forward", None)
    if eager is None:
        raise NotImplementedError(
            f"{type(module).__name__} needs its own eager attention here, which {name} does not have; "
            "use model.set_attn_implementation('eager')"
        )
    return eager


def implementation(config: Any) -> str | None:
    """The name of the attention that a config's model runs."""
    if not hasattr(config, "_attn_implementation"):
        raise _missing("PreTrainedConfig._attn_implementation")
    return config._attn_implementation


def with_cache(function: Any, cache: Any) -> dict[str, Any]:
    """The keyword by which a model, or a function that makes masks, takes a key-value cache: since 5.24 ``cache``."""
    known = inspect.signature(getattr(function, "forward", function)).parameters
    return {"cache" if "cache" in known else "past_key_values": cache}


def cache_of(output: Any) -> Any:
    """The key-value cache in what a model gives back."""
    return output["cache" if "cache" in output else "past_key_values"]


# -- masks ------------------------------------------------------------------------------------------------------------

causal: Callable = getattr(masking_utils, "causal_mask_function", None) or (lambda b, h, q, kv: kv <= q)

_ONES = torch.ones(1, 1, dtype=torch.int64, device="cpu")  # for a function to close over

# What mask functions are put together from: who makes the piece, of what say, and what it keeps in its closure.
_MAKERS: dict[str, tuple[str, Callable[[], tuple], tuple[str, ...]]] = {
    "and": ("and_masks", tuple, ("mask_functions",)),
    "or": ("or_masks", tuple, ("mask_functions",)),
    "window": ("sliding_window_overlay", lambda: (1,), ("sliding_window",)),
    "chunk": ("chunked_overlay", lambda: (1, _ONES[0]), ("chunk_size", "left_padding")),
    "packed": ("packed_sequence_mask_function", lambda: (_ONES,), ("packed_sequence_mask",)),
    # an overlay of image tokens
    "blockwise": ("blockwise_overlay", lambda: (_ONES,), ("block_sequence_ids",)),
    # since 5.23, the mask of a packed prompt counts by the positions within each sequence
    "remapped": (
        "remap_positions_for_packed_sequence",
        lambda: (causal, _ONES),
        ("mask_function", "position_ids"),
    ),
}
SINCE = {"blockwise": (5, 17), "remapped": (5, 23)}


def has_piece(name: str) -> bool:
    """Whether this release makes masks with such a piece, in a way that :func:`piece` reads."""
    return name in _codes.values()


def make(name: str, *arguments: Any) -> Callable:
    """A piece of a mask function, as the release makes it.

    Raises:
        ImportError: this release has none.
    """
    maker = getattr(masking_utils, _MAKERS[name][0], None)
    if maker is None:
        raise _missing(f"masking_utils.{_MAKERS[name][0]}")
    return maker(*arguments)


def piece(function: Callable) -> tuple[str, tuple[Any, ...]]:
    """Which piece a mask function is, "causal" or of the makers above, and what it holds, in their order.

    ``("", ())`` for any other function, also for pieces that a later release makes otherwise: such masks are exact.
    """
    if function is causal:
        return "causal", ()
    name = _codes.get(getattr(function, "__code__", None))
    if name is None:
        return "", ()
    cells = getattr(function, "__closure__", None) or ()
    inside = dict(zip(function.__code__.co_freevars, cells, strict=True))
    return name, tuple(inside[variable].cell_contents for variable in _MAKERS[name][2])


def _read_makers() -> dict[Any, str]:
    found: dict[Any, str] = {}
    for name, (maker, example, variables) in _MAKERS.items():
        if hasattr(masking_utils, maker):
            code = getattr(make(name, *example()), "__code__", None)
            if set(variables) <= set(getattr(code, "co_freevars", ())):
                found[code] = name
    return found


_codes = _read_makers()


def check_release() -> None:
    """Raise for a release that is too old, or so new that it makes masks otherwise.

    Raises:
        ImportError: naming the release, and what to install.
    """
    if release() < OLDEST:
        raise ImportError(f"stem_flex needs transformers 5.5 or newer, got {version()}; pip install -U transformers")
    if not hasattr(masking_utils, "causal_mask_function"):
        raise _missing("masking_utils.causal_mask_function")
