"""Any mask_mod as a layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stem_flex.layout._base import Layout
from stem_flex.plumbing.checks import check_mod, check_positive
from stem_flex.plumbing.geometry import Geometry
from stem_flex.plumbing.mods import MaskModFn
from stem_flex.plumbing.watched import watched_values


@dataclass(frozen=True, eq=False)
class MaskMod(Layout):
    """See :func:`stem_flex.layout.from_mask_mod`."""

    f: MaskModFn
    B: int
    H: int
    Lq: int
    Lk: int
    origin: str = "from_mask_mod"

    def sizes(self) -> tuple[int, int]:
        return self.B, self.H

    def reads(self) -> tuple[Any, ...] | None:
        return watched_values(self.f)

    def token_mask(self, geometry: Geometry) -> MaskModFn:
        if (self.Lq, self.Lk) != (geometry.q_len, geometry.k_len):
            raise ValueError(
                f"{self.origin} was given Lq={self.Lq}, Lk={self.Lk}, got q and k of {geometry.q_len} and "
                f"{geometry.k_len} tokens; build it for these lengths"
            )
        if self.B not in (1, geometry.batch) or self.H not in (1, geometry.heads):
            raise ValueError(
                f"{self.origin} was given B={self.B}, H={self.H}, expected 1 or q's B={geometry.batch}, "
                f"H={geometry.heads}"
            )
        return self.f


def from_mask_mod(f: Callable, B: int | None, H: int | None, Lq: int, Lk: int) -> Layout:
    """Any mask_mod ``f(b, h, q_idx, kv_idx)`` as a layout, with local query indices as flex_attention has.

    Its block classes are computed exactly, in chunks of bounded memory, when bound: B H Lq Lk evaluations. Once, where
    everything that f reads can be watched: tensors, numbers, strings and None, in closures, globals, defaults, tuples,
    lists, dicts and partials (:mod:`stem_flex.plumbing.watched`). An f that reads anything else, such as an object's
    attribute or an enum, is evaluated at every call, that is in every layer, for it may have changed: hand it plain
    values, or bind the layout once a prompt and pass what :meth:`Layout.bind` returns as ``layout``. Writes that
    PyTorch does not count (through ``.data``, NumPy views of a tensor, replayed CUDA graphs) are not seen.
    B and H are 1 (or None) where f does not depend on them. f is never asked past
    Lq and Lk, so tensors it captures need no padding.
    """
    check_mod("f", f, "mask_mod")
    for name, value in (("B", B), ("H", H), ("Lq", Lq), ("Lk", Lk)):
        if value is not None or name in ("Lq", "Lk"):
            check_positive(name, value)
    return MaskMod(f, B or 1, H or 1, Lq, Lk)
