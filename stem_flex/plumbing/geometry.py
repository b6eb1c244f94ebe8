"""Sizes, offsets and lengths that a layout is bound to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stem_flex.plumbing.checks import check_values

LONGEST = 2**31 - 1  # positions are int32


class Spans(NamedTuple):
    """Keys [start, end) that each query position may attend to, int32, broadcastable to (B, positions)."""

    start: Tensor
    end: Tensor


@dataclass(frozen=True)
class Geometry:
    """Sizes and offsets that a layout is bound to, checked."""

    batch: int
    heads: int
    q_len: int
    k_len: int
    q_offset: int | Tensor
    kv_len: int | Tensor | None
    prompt_len: int | Tensor | None
    q_block: int
    k_block: int
    device: torch.device

    @classmethod
    def of(cls, batch, heads, q_len, k_len, q_offset, kv_len, prompt_len, q_block, k_block, device) -> Geometry:
        """Checked: raises TypeError or ValueError naming the argument."""
        q_offset = _checked_length("q_offset", q_offset, batch, device)
        if isinstance(q_offset, int) and q_offset + q_len >= 2**31:
            raise ValueError(f"q_offset + q's length must be below 2**31, got {q_offset} + {q_len}")
        if kv_len is not None:
            kv_len = _checked_length("kv_len", kv_len, batch, device)
            if isinstance(kv_len, int) and kv_len > k_len:
                raise ValueError(f"kv_len must be at most the {k_len} keys of k, got {kv_len}")
            if isinstance(kv_len, Tensor):
                check_values("kv_len", kv_len, 0, k_len)
        if prompt_len is not None:
            prompt_len = _checked_length("prompt_len", prompt_len, batch, device)
        # a copy: who composes with the mask later must find what it was bound to, not what a live counter became
        q_offset = _copied(q_offset)
        kv_len = None if kv_len is None else _copied(kv_len)
        return cls(batch, heads, q_len, k_len, q_offset, kv_len, prompt_len, q_block, k_block, device)

    @property
    def q_blocks(self) -> int:
        return -(-self.q_len // self.q_block)

    @property
    def k_blocks(self) -> int:
        return -(-self.k_len // self.k_block)

    @property
    def positions(self) -> Tensor:
        """int32 (1 or B, q_blocks * q_block): where each query, rounded up to whole blocks, stands."""
        local = torch.arange(self.q_blocks * self.q_block, dtype=torch.int32, device=self.device)
        return local[None] + self.column(self.q_offset)

    def positions_of(self, per_row: Tensor) -> Tensor:
        """``positions`` with as many rows as ``per_row`` (rows,) has."""
        positions = self.positions
        return positions.expand(max(positions.shape[0], per_row.shape[0]), -1)

    def key_end(self, like: Tensor) -> Tensor:
        """End of the valid keys, int32 (1 or B,) of at least ``like``'s length."""
        end = self.k_len if self.kv_len is None else self.kv_len
        return torch.zeros_like(like) + self.column(end)[:, 0]

    def query_end(self) -> Tensor:
        """One past the last query's position, int32 (1 or B, 1)."""
        return self.column(self.q_offset) + self.q_len

    def column(self, value: int | Tensor) -> Tensor:
        """A length or offset as int32 (1 or B, 1)."""
        if isinstance(value, Tensor):
            return value.to(torch.int32).reshape(-1, 1)
        return torch.full((1, 1), value, dtype=torch.int32, device=self.device)


def _copied(value: int | Tensor) -> int | Tensor:
    return value.clone() if isinstance(value, Tensor) else value


def _checked_length(name: str, value: Any, batch: int, device: torch.device) -> int | Tensor:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, Tensor)):
        raise TypeError(f"{name} must be an int or an int tensor ({batch},), got {value!r}")
    if not isinstance(value, Tensor):
        if value < 0:
            raise ValueError(f"{name} must be 0 or more, got {value}")
        if isinstance(value, int) and value >= 2**31:
            raise ValueError(f"{name} must be below 2**31, got {value}")
        return value  # pyright: ignore[reportReturnType] - a SymInt stands for the int it traces
    if value.is_floating_point() or value.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, got {value.dtype}")
    if value.dim() > 1 or value.numel() not in (1, batch):
        raise ValueError(f"{name} must be an int or of shape ({batch},), got shape {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} must be on q's device {device}, got {value.device}; move it with .to()")
    check_values(name, value, 0)
    return value


def check_rows(name: str, tensor: Tensor, geometry: Geometry) -> None:
    """Raise unless ``tensor`` has one entry for each batch row, on the right device."""
    if tensor.dim() != 1 or tensor.shape[0] not in (1, geometry.batch):
        raise ValueError(
            f"{name} must have shape ({geometry.batch},), one for each batch row of q, got {tuple(tensor.shape)}"
        )
    if tensor.device != geometry.device:
        raise ValueError(f"{name} must be on q's device {geometry.device}, got {tensor.device}; move it with .to()")


def from_position(geometry: Geometry, of_token: Tensor) -> Tensor:
    """``of_token`` (rows, tokens) int32 read at every query position; 0 past its end. (rows or B, positions)."""
    positions = geometry.positions
    rows = max(positions.shape[0], of_token.shape[0])
    tokens = of_token.shape[1]
    if tokens == 0:
        return torch.zeros_like(positions).expand(rows, -1)
    index = positions.clamp(min=0, max=tokens - 1).long().expand(rows, -1)
    return torch.where(positions < tokens, of_token.expand(rows, -1).gather(1, index), 0)


def on_device(tensor: Tensor, geometry: Geometry) -> Tensor:
    """Numbers given as Python sequences follow q to its device, which waits for it when first bound there."""
    return tensor.to(geometry.device)
