"""The kinds of layout: what each tells the binding. `stem_flex.layout` makes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from stem_flex._captured import captured_values
from stem_flex._check import check_rows, check_values
from stem_flex.binding import BoundLayout, Spans, bind, from_position
from stem_flex.geometry import Geometry
from stem_flex.mods import MaskModFn

Side = Literal["left", "right"]

_LONGEST = 2**31 - 1  # positions are int32


class Layout:
    """Base of all layouts; the functions of `stem_flex.layout` make one."""

    def __and__(self, other: Layout) -> Layout:
        if not isinstance(other, Layout):
            raise TypeError(f"& needs a layout on both sides, got {type(other).__name__}")
        return And(self, other)

    def bind(
        self,
        batch: int,
        heads: int,
        q_len: int,
        k_len: int,
        *,
        q_offset: int | Tensor = 0,
        kv_len: int | Tensor | None = None,
        prompt_len: int | Tensor | None = None,
        block_size: tuple[int, int] = (128, 128),
        device: torch.device | str = "cpu",
    ) -> BoundLayout:
        """Block-level facts of this layout for q (batch, heads, q_len, D) and k of k_len keys.

        Memoised when everything is host-known or unchanged, so that the layers of a model share it.
        """
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        return bind(self, batch, heads, q_len, k_len, q_offset, kv_len, prompt_len, block_size, device)

    # what a layout tells the binding; the defaults are those of "no constraint"
    def parts(self) -> tuple[Layout, ...]:
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

    def reads(self) -> tuple[Tensor | float, ...]:
        """Tensors and numbers that the layout reads: a binding is stale once one of them changes."""
        return ()

    plain_causal = False

    def sizes(self) -> tuple[int, int]:
        """Batch rows and heads that the layout tells apart."""
        return 1, 1

    def forbids_future(self) -> bool:
        """Whether no key after the query's own position is allowed."""
        return False


@dataclass(frozen=True)
class Causal(Layout):
    """See :func:`stem_flex.layout.causal`."""

    plain_causal = True

    def forbids_future(self) -> bool:
        return True

    def spans(self, geometry: Geometry) -> Spans:
        return Spans(torch.zeros_like(geometry.positions), geometry.positions + 1)


@dataclass(frozen=True)
class Full(Layout):
    """See :func:`stem_flex.layout.full`."""

    def spans(self, geometry: Geometry) -> Spans:
        zeros = torch.zeros_like(geometry.positions)
        return Spans(zeros, zeros + geometry.k_len)


@dataclass(frozen=True)
class SlidingWindow(Layout):
    """See :func:`stem_flex.layout.sliding_window`."""

    window: int

    def spans(self, geometry: Geometry) -> Spans:
        reach = min(self.window, _LONGEST) - 1
        return Spans(geometry.positions - reach, geometry.positions + 1)

    def forbids_future(self) -> bool:
        return True


@dataclass(frozen=True, eq=False)
class Prefix(Layout):
    """See :func:`stem_flex.layout.prefix`."""

    length: int | Tensor

    def spans(self, geometry: Geometry) -> Spans:
        length = self.length
        if isinstance(length, Tensor):
            check_rows("prefix length", length, geometry)
            check_values("prefix length", length, 0)
            length = length.clamp(max=_LONGEST).to(torch.int32)[:, None]
            end = torch.maximum(geometry.positions + 1, length)
        else:
            end = (geometry.positions + 1).clamp(min=min(length, _LONGEST))
        return Spans(torch.zeros_like(end), end)

    def reads(self) -> tuple[Tensor | float, ...]:
        return (self.length,) if isinstance(self.length, Tensor) else ()

    def sizes(self) -> tuple[int, int]:
        return (self.length.shape[0] if isinstance(self.length, Tensor) else 1), 1


@dataclass(frozen=True, eq=False)
class Padding(Layout):
    """See :func:`stem_flex.layout.padding`."""

    lengths: Tensor
    side: Side
    causal: bool = True
    longest: int = field(default=0, repr=False)
    from_host: bool = field(default=False, repr=False)

    def spans(self, geometry: Geometry) -> Spans:
        start, end = self.valid(geometry)
        last = geometry.positions + 1 if self.causal else end[:, None]
        return Spans(start[:, None].expand_as(geometry.positions_of(start)), torch.minimum(end[:, None], last))

    def valid(self, geometry: Geometry) -> tuple[Tensor, Tensor]:
        given = _on_device(self.lengths, geometry) if self.from_host else self.lengths
        check_rows("padding lengths", given, geometry)
        if self.longest > geometry.k_len:
            raise ValueError(
                f"padding lengths must be at most the {geometry.k_len} keys, got {self.longest}; "
                "count the valid tokens among the keys given"
            )
        check_values("padding lengths", given, 0, geometry.k_len)
        lengths = given.to(torch.int32)
        if self.side == "right":
            return torch.zeros_like(lengths), lengths
        end = geometry.key_end(like=lengths)
        return (end - lengths).clamp(min=0), end

    def prompt(self, geometry: Geometry) -> tuple[Tensor, Tensor]:
        start, end = self.valid(geometry)
        positions = geometry.positions_of(start)
        return start[:, None].expand_as(positions), end[:, None].expand_as(positions)

    def reads(self) -> tuple[Tensor | float, ...]:
        return () if self.from_host else (self.lengths,)

    def sizes(self) -> tuple[int, int]:
        return self.lengths.shape[0], 1

    def forbids_future(self) -> bool:
        return self.causal


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
            starts, ends = _on_device(starts, geometry), _on_device(ends, geometry)
        elif starts.device != geometry.device:
            raise ValueError(
                f"document tensors must be on q's device {geometry.device}, got {starts.device}; move them with .to()"
            )
        return from_position(geometry, starts), from_position(geometry, ends)

    def document_spans(self) -> tuple[Tensor, Tensor]:
        return self.starts, self.ends

    def reads(self) -> tuple[Tensor | float, ...]:
        return () if self.from_host else (self.starts, self.ends)

    def sizes(self) -> tuple[int, int]:
        return self.starts.shape[0], 1

    def forbids_future(self) -> bool:
        return self.causal


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

    def reads(self) -> tuple[Tensor | float, ...]:
        return captured_values(self.f)

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


@dataclass(frozen=True, eq=False)
class FromBlockMask(Layout):
    """See :func:`stem_flex.layout.from_block_mask`."""

    block_mask: BlockMask
    mod: MaskModFn = field(repr=False)

    def sizes(self) -> tuple[int, int]:
        batch, heads = self.block_mask.kv_num_blocks.shape[:2]
        return batch, heads

    def reads(self) -> tuple[Tensor | float, ...]:
        return captured_values(self.mod)

    def token_mask(self, geometry: Geometry) -> MaskModFn:
        Lq, Lk = self.block_mask.seq_lengths
        return MaskMod(self.mod, *self.sizes(), Lq, Lk, "from_block_mask").token_mask(geometry)


@dataclass(frozen=True, eq=False)
class Interval(Layout):
    """The keys [start, end) of each local query, as a binding had them, whatever its tensors hold by now."""

    bound: Spans

    def spans(self, geometry: Geometry) -> Spans:
        return self.bound

    def sizes(self) -> tuple[int, int]:
        return self.bound.start.shape[0], 1


@dataclass(frozen=True, eq=False)
class And(Layout):
    """Intersection of two layouts, ``left & right``."""

    left: Layout
    right: Layout

    def parts(self) -> tuple[Layout, ...]:
        return self.left.parts() + self.right.parts()

    def reads(self) -> tuple[Tensor | float, ...]:
        return self.left.reads() + self.right.reads()


def _on_device(tensor: Tensor, geometry: Geometry) -> Tensor:
    # numbers given as Python sequences follow q to its device, which waits for it when first bound there
    return tensor.to(geometry.device)
