"""What a transformers mask function is made of, and the layouts it becomes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from stem_flex.binding import BoundLayout
from stem_flex.geometry import Geometry
from stem_flex.layout import Layout, Spans


@dataclass(frozen=True, eq=False)
class KeyRange(Layout):
    """Causal over the real tokens [start, end) of each row; the rest of the keys is padding."""

    start: Tensor
    end: Tensor

    def spans(self, geometry: Geometry) -> Spans:
        positions = geometry.positions_of(self.start)
        start = self.start[:, None].expand_as(positions)
        return Spans(start, torch.minimum(self.end[:, None], positions + 1))

    def valid(self, geometry: Geometry) -> tuple[Tensor, Tensor]:
        return self.start, self.end

    def prompt(self, geometry: Geometry) -> tuple[Tensor, Tensor]:
        positions = geometry.positions_of(self.start)
        return self.start[:, None].expand_as(positions), self.end[:, None].expand_as(positions)


class SharedLayout(Layout):
    """A layout bound once per forward and sizes, also with offsets that only the device knows."""

    def __init__(self, inner: Layout):
        self.inner = inner
        self._bindings: dict[tuple, BoundLayout] = {}

    def parts(self) -> tuple[Layout, ...]:
        return self.inner.parts()

    def bind(self, *sizes: int, **lengths: Any) -> BoundLayout:
        # The mask keeps its offset tensors for as long as it keeps this layout, so their ids stay theirs.
        key = (*sizes, *(id(x) if isinstance(x, Tensor) else x for x in lengths.values()))
        if key not in self._bindings:
            self._bindings[key] = self.inner.bind(*sizes, **lengths)
        return self._bindings[key]


@dataclass(frozen=True, eq=False)
class Pattern:
    """A recognised mask function: causal, and what narrows it."""

    window: int | None = None
    chunk: int | None = None
    chunk_start: Tensor | None = None  # (B,), where each row's first chunk begins
    packed: Tensor | None = None  # (1 or B, tokens), the sequence of each token


def _code(function: Callable) -> Any:
    return getattr(function, "__code__", None)


_AND = _code(masking_utils.and_masks())
_WINDOW = _code(masking_utils.sliding_window_overlay(1))
_CHUNK = _code(masking_utils.chunked_overlay(1, torch.zeros(1)))
_PACKED = _code(masking_utils.packed_sequence_mask_function(torch.zeros(1, 1)))


def recognise(mask_function: Callable) -> Pattern | None:
    """The pattern of a mask function built by ``transformers.masking_utils``; None: it holds something else.

    Reads closures rather than ``local_size``, which a window has as well as a chunk, and which does not tell
    of overlays such as bidirectional image tokens.
    """
    found: dict[str, Any] = {}
    pending, is_causal = [mask_function], False
    while pending:
        function = pending.pop()
        code = _code(function)
        if function is masking_utils.causal_mask_function:
            is_causal = True
        elif code is _AND:
            pending.extend(_closure(function)["mask_functions"])
        elif code is _WINDOW and "window" not in found:
            found["window"] = _closure(function)["sliding_window"]
        elif code is _CHUNK and "chunk" not in found:
            inside = _closure(function)
            found |= {"chunk": inside["chunk_size"], "chunk_start": inside["left_padding"]}
        elif code is _PACKED and "packed" not in found:
            found["packed"] = _closure(function)["packed_sequence_mask"]
        else:
            return None
    return Pattern(**found) if is_causal else None


def _closure(function: Callable) -> dict[str, Any]:
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)}


def kind_of(pattern: Pattern | None, keys: int) -> str:
    if pattern is None:
        return "general"
    narrow = (pattern.window is not None and pattern.window < keys) or (
        pattern.chunk is not None and pattern.chunk < keys
    )
    if narrow:
        return "local"
    return "causal" if pattern.packed is None else "packed"


def key_range(padding: Tensor | None) -> tuple[Tensor | None, Tensor | None, bool]:
    """Real keys [start, end) of each row, int32 (B,), None if all are; and whether they are one range.

    Waits for the device, once per forward, as transformers' own masks do.
    """
    if padding is None:
        return None, None, True
    count = padding.sum(1, dtype=torch.int32)
    slots = torch.arange(padding.shape[1], dtype=torch.int32, device=padding.device)
    start = torch.where(padding, slots, padding.shape[1]).amin(1)
    end = torch.where(padding, slots + 1, 0).amax(1)
    start = torch.minimum(start, end)
    everything, whole = torch.stack([(count == padding.shape[1]).all(), (end - start == count).all()]).tolist()
    return (None, None, True) if everything else (start, end, bool(whole))
