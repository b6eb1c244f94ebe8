"""Which path each attention layer took: what tests and users can count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from stem_flex.diagnostics import block_density


@dataclass(frozen=True)
class Call:
    """One attention call.

    Attributes:
        layer: ``layer_idx`` of the module, None where it has none.
        path: "stem" (selected blocks), "exact" (every block the mask allows, by compiled flex_attention), "dense"
            (plain causal by the fastest dense kernel), "sdpa" or "eager" (as the model did before).
        queries, keys: lengths of the call.
        density: of a "stem" call its :func:`stem_flex.block_density`, where the trace asks for it.
    """

    layer: int | None
    path: str
    queries: int
    keys: int
    density: float | None = None


@dataclass
class Trace:
    """Attention calls made under :func:`trace`, in order.

    Attributes:
        density: whether calls are recorded with their density.
    """

    calls: list[Call] = field(default_factory=list)
    density: bool = False

    def count(self) -> Counter[str]:
        """Calls of each path."""
        return Counter(call.path for call in self.calls)

    def layers(self, path: str) -> list[int | None]:
        """Layers that took ``path``, each once, in order of their first call."""
        return list(dict.fromkeys(call.layer for call in self.calls if call.path == path))


_traces: list[Trace] = []


@contextmanager
def trace(*, density: bool = False) -> Iterator[Trace]:
    """Record which path each layer takes: ``with trace() as seen: model(ids)``, then ``seen.count()``.

    With ``density`` also how densely, for which every call waits for the device.
    Calls inside a compiled graph (decode under ``torch.compile``) are not recorded.
    """
    seen = Trace(density=density)
    _traces.append(seen)
    try:
        yield seen
    finally:
        _traces.remove(seen)


def record(module: torch.nn.Module, path: str, query: Tensor, key: Tensor, block_mask: BlockMask | None = None) -> None:
    """Tell the open traces which path a layer took, and which blocks it selected."""
    layer = getattr(module, "layer_idx", None)
    for seen in _traces:
        density = block_density(block_mask) if seen.density and block_mask is not None else None
        seen.calls.append(Call(layer, path, query.shape[2], key.shape[2], density))
