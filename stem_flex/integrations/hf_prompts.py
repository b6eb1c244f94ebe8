"""How long the whole prompt is that forwards see parts of, and which forwards those are."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stem_flex.integrations.hf_settings import TINY_QUERIES


@dataclass
class Prompt:
    """The prompt that forwards see parts of.

    Attributes:
        tokens: its length, padding included.
        config: text config of the model that reads it; None: of any.
        once: it is read once, from its first token to its last. Forwards after that are of another prompt, such as
            the negative one of ``generate``.
        read: it has been.
        static: its cache is one that keeps its length on the device: no host knows when such a prompt is read.
    """

    tokens: int
    config: Any = None
    once: bool = False
    read: bool = False
    static: bool = False

    def of(self, config: Any, offset: int | Tensor) -> int | None:
        """Its length, where a forward of the model with this config, ``offset`` tokens in, can be of it."""
        other_model = self.config is not None and self.config is not config
        other_cache = self.static and not isinstance(offset, Tensor)
        return None if self.read or other_model or other_cache else self.tokens

    def advance(self, config: Any, offset: int | Tensor, queries: int, seen: int | None, min_tokens: int) -> None:
        """A forward has read ``queries`` tokens more, which are the last of ``seen``, where the padding mask tells."""
        if not self.once or self.of(config, offset) is None:
            return
        self.static = isinstance(offset, Tensor)
        end = seen if isinstance(offset, Tensor) else offset + queries
        # What is left of it may be too little for a prefill, and then passes unseen, inside a compiled graph, say.
        self.read = end is not None and self.tokens - end < max(2, min(min_tokens, TINY_QUERIES))


current_prompt: contextvars.ContextVar[Prompt | None] = contextvars.ContextVar("stem_flex_prompt", default=None)


@contextmanager
def prompt_length(tokens: int) -> Iterator[None]:
    """Say how long the whole prompt is, padding included, around forwards that each see a part of it.

    Chunks then get the budgets that one forward over the whole prompt would have had::

        with prompt_length(ids.shape[1]):
            for chunk in ids.split(8192, dim=1):
                model(chunk, past_key_values=cache)  # "cache" since transformers 5.24
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"tokens must be a positive int, got {tokens!r}")
    with reading(Prompt(tokens)):
        yield


@contextmanager
def reading(prompt: Prompt) -> Iterator[None]:
    """Forwards in the block are of this prompt."""
    token = current_prompt.set(prompt)
    try:
        yield
    finally:
        current_prompt.reset(token)


def tokens_of(model: Any, args: tuple, kwargs: dict[str, Any]) -> int:
    """Length of the prompt that ``generate`` was given, with what a cache holds of it; 0: it is not to be seen."""
    if getattr(model.config, "is_encoder_decoder", False):  # only the decoder's prompt has budgets
        candidates: list[Any] = [kwargs.get("decoder_inputs_embeds"), kwargs.get("decoder_input_ids")]
        mask: Any = kwargs.get("decoder_attention_mask")
    else:
        candidates = [kwargs.get("inputs_embeds"), kwargs.get("input_ids"), args[0] if args else kwargs.get("inputs")]
        mask = kwargs.get("attention_mask")
    for given in candidates:
        if isinstance(given, Tensor) and given.dim() >= 2 and given.shape[1] > 0:
            # The ids may be those of a new turn alone, but a padding mask is of all turns.
            return max(given.shape[1], mask.shape[1] if isinstance(mask, Tensor) and mask.dim() == 2 else 0)
    return 0
