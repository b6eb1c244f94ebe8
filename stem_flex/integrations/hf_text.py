"""Text as a model is given it: tokens of documents, cut into windows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def documents_of(text: Any, tokenizer: Any) -> list[Tensor]:
    """Each document's tokens, int64 (tokens,)."""
    parts = [text] if isinstance(text, str) or (isinstance(text, Tensor) and text.dim() == 1) else list(text)
    if parts and all(isinstance(part, int) for part in parts):
        parts = [parts]
    found = []
    for part in parts:
        if isinstance(part, str):
            if tokenizer is None:
                raise ValueError("tokenizer must be given for text that is strings; or give tokens")
            part = tokenizer(part, add_special_tokens=False, verbose=False).input_ids
        tokens = torch.as_tensor(part, device="cpu")
        if tokens.dim() != 1 or tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise TypeError(
                f"text must be strings or int tensors (tokens,), got {tokens.dtype} of shape {tuple(tokens.shape)}"
            )
        found.append(tokens.long().cpu())
    return found


def front_of(tokenizer: Any) -> list[int]:
    """What a tokenizer puts in front of any text."""
    given = [] if tokenizer is None else list(tokenizer("").input_ids)
    return given[:1] if given and given[0] == getattr(tokenizer, "bos_token_id", None) else []


def windows_of(documents: list[Tensor], length: int, count: int, front: list[int]) -> list[Tensor]:
    """``count`` prompts, int64 (1, length), that share no token, spread over all of the text."""
    size = length - len(front)
    if size < 4:
        raise ValueError(f"lengths must leave 4 tokens or more besides the {len(front)} of before, got {length}")
    parts = [part for tokens in documents for part in tokens.split(size) if len(part) == size]
    if len(parts) < count:
        raise ValueError(
            f"text must hold {count} windows of {size} tokens that do not overlap, it holds {len(parts)}; give more "
            "text, fewer windows or shorter lengths"
        )
    chosen = [parts[i * len(parts) // count] for i in range(count)]
    return [torch.cat([torch.tensor(front, dtype=torch.long, device="cpu"), part])[None] for part in chosen]
