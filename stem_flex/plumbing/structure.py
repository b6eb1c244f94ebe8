"""What the binding asks of a layout: the base that `stem_flex.layout` builds its kinds on."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stem_flex.plumbing.geometry import Geometry, Spans
from stem_flex.plumbing.mods import MaskModFn


class Structure:
    """What a layout tells the binding; the defaults are those of "no constraint"."""

    def parts(self) -> tuple[Any, ...]:
        """The primitive layouts this one intersects."""
        return (self,)

    def spans(self, geometry: Geometry) -> Spans | None:
        """Allowed keys [start, end) of every query position; None: no interval."""
        return None

    def valid(self, geometry: Geometry) -> tuple[Tensor, Tensor] | None:
        """Real tokens [start, end) of every batch row, (batch or 1,) each; None: all."""
        return None

    def prompt(self, geometry: Geometry) -> tuple[Tensor, Tensor] | None:
        """The prompt [start, end) that each query position belongs to; None: one prompt, from key 0."""
        return None

    def token_mask(self, geometry: Geometry) -> MaskModFn | None:
        """mask_mod of a layout that is no interval."""
        return None

    def document_spans(self) -> tuple[Tensor, Tensor] | None:
        """[start, end) of the document of every token, where the layout has documents."""
        return None

    def reads(self) -> tuple[Any, ...] | None:
        """What the layout reads: a binding is stale once any of it changes. None: it reads what can't be watched."""
        return ()

    plain_causal = False

    def sizes(self) -> tuple[int, int]:
        """Batch rows and heads that the layout tells apart."""
        return 1, 1

    def forbids_future(self) -> bool:
        """Whether no key after the query's own position is allowed."""
        return False
