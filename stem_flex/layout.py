"""Structure of the attention mask: which pairs of blocks a prompt allows, known before any score.

A layout says everything about structure and nothing about sizes: those come from q and k when it is bound.
Layouts intersect with ``&``. Built once per prompt, a layout is bound once and reused by every layer.

True means keep. Position ``p = q_offset + i`` is where local query ``i`` stands among the keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from stem_flex._captured import captured_values
from stem_flex._check import check_int_tensor, check_positive, check_rows
from stem_flex.binding import BoundLayout, MaskModFn, Spans, bind, from_position
from stem_flex.documents import spans_of_ids, spans_of_lengths
from stem_flex.geometry import Geometry
from stem_flex.tables import block_mask_mod

Side = Literal["left", "right"]

_LONGEST = 2**31 - 1  # positions are int32


class Layout:
    """Base of all layouts; use the functions of this module to make one."""

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

    def forbids_future(self) -> bool:
        """Whether no key after the query's own position is allowed."""
        return False


@dataclass(frozen=True)
class Causal(Layout):
    """See :func:`causal`."""

    plain_causal = True

    def forbids_future(self) -> bool:
        return True

    def spans(self, geometry: Geometry) -> Spans:
        return Spans(torch.zeros_like(geometry.positions), geometry.positions + 1)


@dataclass(frozen=True)
class Full(Layout):
    """See :func:`full`."""

    def spans(self, geometry: Geometry) -> Spans:
        zeros = torch.zeros_like(geometry.positions)
        return Spans(zeros, zeros + geometry.k_len)


@dataclass(frozen=True)
class SlidingWindow(Layout):
    """See :func:`sliding_window`."""

    window: int

    def spans(self, geometry: Geometry) -> Spans:
        reach = min(self.window, _LONGEST) - 1
        return Spans(geometry.positions - reach, geometry.positions + 1)

    def forbids_future(self) -> bool:
        return True


@dataclass(frozen=True, eq=False)
class Prefix(Layout):
    """See :func:`prefix`."""

    length: int | Tensor

    def spans(self, geometry: Geometry) -> Spans:
        length = self.length
        if isinstance(length, Tensor):
            check_rows("prefix length", length, geometry)
            length = length.clamp(max=_LONGEST).to(torch.int32)[:, None]
            end = torch.maximum(geometry.positions + 1, length)
        else:
            end = (geometry.positions + 1).clamp(min=min(length, _LONGEST))
        return Spans(torch.zeros_like(end), end)

    def reads(self) -> tuple[Tensor | float, ...]:
        return (self.length,) if isinstance(self.length, Tensor) else ()


@dataclass(frozen=True, eq=False)
class Padding(Layout):
    """See :func:`padding`."""

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

    def forbids_future(self) -> bool:
        return self.causal


@dataclass(frozen=True, eq=False)
class Documents(Layout):
    """See :func:`documents`. ``starts`` and ``ends`` bound the document of each token, (1 or B, tokens)."""

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

    def forbids_future(self) -> bool:
        return self.causal


@dataclass(frozen=True, eq=False)
class MaskMod(Layout):
    """See :func:`from_mask_mod`."""

    f: MaskModFn
    B: int
    H: int
    Lq: int
    Lk: int

    def reads(self) -> tuple[Tensor | float, ...]:
        return captured_values(self.f)

    def token_mask(self, geometry: Geometry) -> MaskModFn:
        if (self.Lq, self.Lk) != (geometry.q_len, geometry.k_len):
            raise ValueError(
                f"from_mask_mod was given Lq={self.Lq}, Lk={self.Lk}, got q and k of {geometry.q_len} and "
                f"{geometry.k_len} tokens; build it for these lengths"
            )
        if self.B not in (1, geometry.batch) or self.H not in (1, geometry.heads):
            raise ValueError(
                f"from_mask_mod was given B={self.B}, H={self.H}, expected 1 or q's B={geometry.batch}, "
                f"H={geometry.heads}"
            )
        return self.f


@dataclass(frozen=True, eq=False)
class FromBlockMask(Layout):
    """See :func:`from_block_mask`."""

    block_mask: BlockMask
    mod: MaskModFn = field(repr=False)

    @property
    def B(self) -> int:  # noqa: N802 - as flex_attention has it
        return self.block_mask.kv_num_blocks.shape[0]

    @property
    def H(self) -> int:  # noqa: N802
        return self.block_mask.kv_num_blocks.shape[1]

    def reads(self) -> tuple[Tensor | float, ...]:
        return captured_values(self.mod)

    def token_mask(self, geometry: Geometry) -> MaskModFn:
        Lq, Lk = self.block_mask.seq_lengths
        return MaskMod(self.mod, self.B, self.H, Lq, Lk).token_mask(geometry)


@dataclass(frozen=True, eq=False)
class And(Layout):
    """Intersection of two layouts, ``left & right``."""

    left: Layout
    right: Layout

    def parts(self) -> tuple[Layout, ...]:
        return self.left.parts() + self.right.parts()

    def reads(self) -> tuple[Tensor | float, ...]:
        return self.left.reads() + self.right.reads()


_CAUSAL, _FULL = Causal(), Full()  # one object each, so that every call shares its bindings


def causal() -> Layout:
    """A query keeps the keys up to its own position: j <= p."""
    return _CAUSAL


def full() -> Layout:
    """Every query keeps every key: the non-causal base to intersect others with."""
    return _FULL


def sliding_window(window: int) -> Layout:
    """Causal, of which the last ``window`` keys, the query's own included: p - window < j <= p."""
    check_positive("window", window)
    return SlidingWindow(window)


def prefix(length: int | Tensor) -> Layout:
    """Prefix-LM: causal, and every query keeps the first ``length`` keys, an int or an int tensor (B,)."""
    if isinstance(length, Tensor):
        check_int_tensor("prefix length", length, 1)
    else:
        check_positive("prefix length", length)
    return Prefix(length)


def padding(lengths: Tensor | Sequence[int], side: Side = "left", *, causal: bool = True) -> Layout:
    """Batch rows of different lengths: only ``lengths[b]`` tokens of row b are real, causal among them.

    Args:
        lengths: int (B,) on q's device, or a list: real tokens of each row among the keys given. With
            ``side="left"`` the last ones (up to ``kv_len`` where that is given), with "right" the first.
        side: where the padding stands.
        causal: False keeps every real key.

    Padding stays out of pooling, statistics and selection; a padded query gives zero output, -inf lse.
    Checks its argument once, which waits for the device that holds it.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right', got {side!r}")
    tensor = torch.as_tensor(lengths)
    check_int_tensor("padding lengths", tensor, 1)
    values = tensor.tolist()
    if min(values, default=0) < 0:
        raise ValueError(f"padding lengths must be 0 or more, got {min(values)}")
    return Padding(tensor, side, causal, max(values, default=0), from_host=not isinstance(lengths, Tensor))


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
        ids: int (tokens,) or (B, tokens) instead, the document of each token in contiguous runs.
        causal: False keeps every key of the document.

    Checks its argument once, which waits for the device that holds it: build it once per prompt.
    """
    if (cu_seqlens is None) == (ids is None):
        raise ValueError("documents needs exactly one of cu_seqlens and ids")
    if cu_seqlens is not None:
        bounds = torch.as_tensor(cu_seqlens)
        starts, ends = spans_of_lengths(bounds)
        return Documents(starts, ends, causal, cu_seqlens=bounds, from_host=not isinstance(cu_seqlens, Tensor))
    tensor = torch.as_tensor(ids)
    starts, ends = spans_of_ids(tensor)
    return Documents(starts, ends, causal, ids=tensor, from_host=not isinstance(ids, Tensor))


def _on_device(tensor: Tensor, geometry: Geometry) -> Tensor:
    # numbers given as Python sequences follow q to its device, which waits for it when first bound there
    return tensor.to(geometry.device)


def from_mask_mod(f: Callable, B: int | None, H: int | None, Lq: int, Lk: int) -> Layout:
    """Any mask_mod ``f(b, h, q_idx, kv_idx)`` as a layout, with local query indices as flex_attention has.

    Its block classes are computed exactly, in chunks of bounded memory, when first bound: B H Lq Lk
    evaluations, once per prompt. B and H are 1 (or None) where f does not depend on them. f is never asked past
    Lq and Lk, so tensors it captures need no padding.
    """
    if not callable(f):
        raise TypeError(f"f must be a mask_mod (b, h, q_idx, kv_idx) -> bool, got {type(f).__name__}")
    for name, value in (("Lq", Lq), ("Lk", Lk)):
        check_positive(name, value)
    return MaskMod(f, B or 1, H or 1, Lq, Lk)


def from_block_mask(block_mask: BlockMask) -> Layout:
    """Any BlockMask as a layout: its block lists and its mask_mod, whatever its block size."""
    if not isinstance(block_mask, BlockMask):
        raise TypeError(f"block_mask must be a BlockMask, got {type(block_mask).__name__}")
    return FromBlockMask(block_mask, block_mask_mod(block_mask))
