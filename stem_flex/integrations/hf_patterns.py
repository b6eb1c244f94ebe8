"""What a transformers mask function is made of, and the layouts it becomes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stem_flex.integrations import hf_versions
from stem_flex.layout import Layout
from stem_flex.plumbing.binding import BoundLayout, Spans
from stem_flex.plumbing.geometry import Geometry


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

    def sizes(self) -> tuple[int, int]:
        return self.start.shape[0], 1

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
    chunk_positions: Tensor | None = None  # (B, tokens), what chunks count by where it is not the slot

    def chunks(self, keys: int, kv_offset: int, device: torch.device) -> Tensor:
        """The chunk of each key, (B, keys), as contiguous runs."""
        assert self.chunk is not None
        assert self.chunk_start is not None
        slots = torch.arange(keys, device=device) + kv_offset
        if self.chunk_positions is not None:
            slots = self.chunk_positions.to(device)
        of_key = torch.div(slots - self.chunk_start.to(device)[:, None], self.chunk, rounding_mode="floor")
        if self.chunk_positions is None or self.packed is None:
            return of_key
        # Packed sequences each begin with chunk 0, so that the number alone does not tell two chunks apart.
        changes = (of_key.diff(dim=1) != 0) | (self.packed.to(device).diff(dim=1) != 0)
        return torch.nn.functional.pad(changes.cumsum(1), (1, 0))


def recognise(mask_function: Callable) -> Pattern | None:
    """The pattern of a mask function that transformers put together; None: it holds something else.

    Reads closures rather than ``local_size``, which a window has as well as a chunk, and which does not tell
    of overlays such as bidirectional image tokens.
    """
    found: dict[str, Any] = {}
    positions, is_causal = None, False
    pending: list[tuple[Callable, Tensor | None]] = [(mask_function, None)]  # with what it counts by; None: slots
    while pending:
        function, counted = pending.pop()
        name, inside = hf_versions.piece(function)
        if name == "causal":
            is_causal = True
        elif name == "and":
            pending.extend((part, counted) for part in inside[0])
        elif name == "or":
            opening = [part for part in inside[0] if not _opens_nothing(part)]
            if len(opening) != 1:
                return None
            pending.append((opening[0], counted))
        elif name == "remapped" and positions is None:
            remapped, positions = inside
            pending.append((remapped, positions))
        elif name == "window" and "window" not in found:
            found["window"] = inside[0]
        elif name == "chunk" and "chunk" not in found:
            found |= {"chunk": inside[0], "chunk_start": inside[1], "chunk_positions": counted}
        elif name == "packed" and "packed" not in found and counted is None:
            found["packed"] = inside[0]
        else:
            return None
    if not is_causal or (positions is not None and not _run_on(positions, found.get("packed"))):
        return None
    return Pattern(**found)


def _run_on(positions: Tensor, packed: Tensor | None) -> bool:
    """Whether positions grow by one within each packed sequence, where order and distance are then the slots'.

    Waits for the device, once per forward over a packed prompt, as transformers did to find the sequences.
    """
    if packed is None or packed.dim() != 2 or packed.shape != positions.shape:
        return False
    step = packed.diff(dim=1)
    return bool(((step > 0) | ((step == 0) & (positions.diff(dim=1) == 1))).all())


def _opens_nothing(function: Callable) -> bool:
    """Whether this is the overlay of a multimodal model's image tokens, for a prompt that has none."""
    name, inside = hf_versions.piece(function)
    return name == "blockwise" and bool((inside[0] < 0).all())


def kind_of(pattern: Pattern | None, keys: int) -> str:
    if pattern is None:
        return "general"
    window, chunk = pattern.window, pattern.chunk
    # Positions may begin anywhere, so a sequence shorter than a chunk may still cross into the next.
    crosses = chunk is not None and (chunk < keys or pattern.chunk_positions is not None)
    if crosses or (window is not None and window < keys):
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
