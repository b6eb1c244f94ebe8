"""Documents: packed prompts that do not see each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stem_flex.layout._base import Layout
from stem_flex.plumbing.checks import as_int_tensor, check_bool
from stem_flex.plumbing.geometry import Geometry, Spans, from_position, on_device
from stem_flex.plumbing.spans import spans_of_ids, spans_of_lengths


@dataclass(frozen=True, eq=False)
class Documents(Layout):
    """See :func:`stem_flex.layout.documents`; ``starts`` and ``ends`` of each token's document, (1 or B, tokens)."""

    starts: Tensor = field(repr=False)
    ends: Tensor = field(repr=False)
    causal: bool = True
    cu_seqlens: Tensor | None = None
    ids: Tensor | None = None
    from_host: bool = field(default=False, repr=False)

    def spans(self, geometry: Geometry) -> Spans:
        start, end = self.prompt(geometry)
        return Spans(start, torch.minimum(end, geometry.positions + 1) if self.causal else end)

    def valid(self, geometry: Geometry) -> tuple[Tensor, Tensor]:
        count = torch.zeros(1, dtype=torch.int32, device=geometry.device)
        return count, count + self.starts.shape[1]

    def prompt(self, geometry: Geometry) -> tuple[Tensor, Tensor]:
        if self.starts.shape[0] not in (1, geometry.batch):
            raise ValueError(f"document ids must have 1 or {geometry.batch} rows, as q has, got {self.starts.shape[0]}")
        starts, ends = self.starts, self.ends
        if self.from_host:
            starts, ends = on_device(starts, geometry), on_device(ends, geometry)
        elif starts.device != geometry.device:
            raise ValueError(
                f"document tensors must be on q's device {geometry.device}, got {starts.device}; move them with .to()"
            )
        return from_position(geometry, starts), from_position(geometry, ends)

    def document_spans(self) -> tuple[Tensor, Tensor]:
        return self.starts, self.ends

    def reads(self) -> tuple[Tensor, ...]:
        return () if self.from_host else (self.starts, self.ends)

    def sizes(self) -> tuple[int, int]:
        return self.starts.shape[0], 1

    def forbids_future(self) -> bool:
        return self.causal


def documents(
    cu_seqlens: Tensor | Sequence[int] | None = None,
    ids: Tensor | None = None,
    *,
    causal: bool = True,
) -> Layout:
    """Packed prompts: a query keeps the keys of its own document, causal among them.

    Each document is a prompt of its own: it has its own budget, decay and forced blocks. A row of query
    blocks that holds several documents takes those of its first query's.

    Args:
        cu_seqlens: int (documents + 1,) on q's device, or a list: cumulative lengths from 0, shared by the
            batch rows. Tokens after the last one belong to no document and attend to nothing.
        ids: int (tokens,) or (B, tokens) instead, the document of each token in contiguous runs. Tokens past the
            last one belong to no document.
        causal: False keeps every key of the document.

    Reads and checks its argument once, which waits for the device that holds it: build it once per prompt.
    """
    if (cu_seqlens is None) == (ids is None):
        raise ValueError("documents needs exactly one of cu_seqlens and ids")
    check_bool("causal", causal)
    if cu_seqlens is not None:
        bounds = as_int_tensor("cu_seqlens", cu_seqlens, 1)
        starts, ends = spans_of_lengths(bounds)
        return Documents(starts, ends, causal, cu_seqlens=bounds, from_host=not isinstance(cu_seqlens, Tensor))
    tensor = as_int_tensor("ids", ids, 1, 2)
    starts, ends = spans_of_ids(tensor)
    return Documents(starts, ends, causal, ids=tensor, from_host=not isinstance(ids, Tensor))
