"""From a layout and the sizes of q and k to facts about each row of blocks, without any N x N.

Every built-in layout gives each query one interval of keys, so a row of query blocks is described by a few
integers: which key blocks hold an allowed pair, which are allowed throughout. Other masks get a class table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from stem_flex.plumbing.ambient import without_autocast
from stem_flex.plumbing.classes import EMPTY, classify
from stem_flex.plumbing.geometry import LONGEST, Geometry, Spans
from stem_flex.plumbing.mods import MaskModFn, all_of, causal_mask, inside, interval_mod
from stem_flex.plumbing.recipes import Picklable
from stem_flex.plumbing.structure import Structure
from stem_flex.plumbing.watched import state_of, tell_changes

_MEMO_ENTRIES = 64


def _column(index: int) -> Any:
    return property(lambda bound: bound.rows[..., index])


@dataclass(frozen=True, eq=False)
class BoundLayout(Picklable):
    """Block-level facts of a layout at given sizes.

    Attributes:
        rows: int32 (1 or B, Qb, 8), what the kernels read: the eight properties below, in their order.
        lo, hi: int32 (1 or B, Qb), key blocks [lo, hi) of the row hold an allowed pair.
        full_lo, full_hi: those [full_lo, full_hi) are allowed throughout.
        own_lo, own_hi: those [own_lo, own_hi) hold the positions of the row's own queries.
        position, prompt_blocks: the row's position in its prompt and the prompt's length, in key blocks.
        classes: None, then a pair's class is full in the full range, partial in the rest of the allowed range;
            or int8 (1 or B, 1 or H, Qb, Kb) of EMPTY, PARTIAL, FULL, which then is the truth.
        key_start, key_end: int32 (B,), the valid keys; None: all.
        query_start, query_end: int32 (B,), the valid local queries; None: all.
        mask_mod: the token mask, local query indices, safe for indices rounded up to whole blocks.
        seq_lengths, block_size: (query, key) tokens.
        longest_prompt: no row's prompt_blocks is larger; None: only the device knows.
        layout, geometry: what was bound.
        spans: the keys of each query, None where a class table or plain causality says it; see intervals().
    """

    rows: Tensor
    classes: Tensor | None
    key_start: Tensor | None
    key_end: Tensor | None
    query_start: Tensor | None
    query_end: Tensor | None
    mask_mod: MaskModFn
    seq_lengths: tuple[int, int]
    block_size: tuple[int, int]
    longest_prompt: int | None
    layout: Any  # a stem_flex.layout.Layout: this package does not know its kinds
    geometry: Geometry
    spans: Spans | None = field(default=None, repr=False)
    memo: dict[Any, Any] | None = field(default=None, repr=False)

    lo, hi, full_lo, full_hi, own_lo, own_hi, position, prompt_blocks = map(_column, range(8))

    @property
    def q_blocks(self) -> int:
        return self.rows.shape[1]

    @property
    def k_blocks(self) -> int:
        return -(-self.seq_lengths[1] // self.block_size[1])

    @property
    def partial_columns(self) -> int | None:
        """Columns that hold the partial blocks of any row that has full ones; None: no bound but the row's.

        A row's first and last key each vary by at most a query block over its tokens, or the row has no full
        block at all (documents meet in it, or padding, or the ragged end). A multiple of 4 keeps both tables
        16-byte aligned.
        """
        if self.classes is not None:
            return None
        q_block, k_block = self.block_size
        return -(-2 * (-(-q_block // k_block) + 1) // 4) * 4

    @property
    def restrictions(self) -> tuple[Tensor | None, ...]:
        """classes, key_start, key_end, query_start, query_end, as the kernels take them."""
        return self.classes, self.key_start, self.key_end, self.query_start, self.query_end

    @property
    def causal_offset(self) -> int | None:
        """q_offset if the host knows it and no row reaches past its own positions, else None."""
        causal = any(part.forbids_future() for part in self.layout.parts())
        return self.geometry.q_offset if causal and not isinstance(self.geometry.q_offset, Tensor) else None

    def remembered(self, key: Any, make: Callable[[], Any]) -> Any:
        """``make()``, kept under ``key`` for as long as the binding is; of a graph being captured nothing is kept."""
        if self.memo is None:
            return make()
        if key in self.memo:
            return self.memo[key]
        with torch.inference_mode(False), torch.no_grad():  # what is remembered also serves training
            value = make()
        if not (self.rows.is_cuda and torch.cuda.is_current_stream_capturing()):
            self.memo[key] = value
        return value

    def intervals(self) -> Spans | None:
        """The keys of each query as they were bound, None where a class table says it."""
        if self.classes is not None or self.spans is not None:
            return self.spans
        return _token_spans(self.layout.parts(), self.geometry, None)  # plain causal: nothing that could change

    def prompts(self) -> tuple[Tensor, Tensor]:
        """Keys [start, end) of the prompt that each row's first real query belongs to, int32 (1 or B, Qb) each."""
        geometry, parts = self.geometry, self.layout.parts()
        real = _real_queries(geometry, _intersection([part.valid(geometry) for part in parts]))
        both = torch.broadcast_tensors(real, *_prompt(parts, geometry))
        real, start, end = (rearrange(x, "b (i q) -> b i q", q=geometry.q_block) for x in both)
        return _first_real(start, real), _first_real(end, real)

    def allowed(self) -> Tensor:
        """Which pairs of blocks are allowed, bool (1 or B, 1 or H, Qb, Kb): for small sizes and tests."""
        return self.dense_classes() != EMPTY

    def dense_classes(self, first: int = 0, last: int | None = None) -> Tensor:
        """Classes of the rows [first, last), int8 (1 or B, 1 or H, rows, Kb)."""
        if self.classes is not None:
            return self.classes[:, :, first:last]
        key = torch.arange(self.k_blocks, dtype=torch.int32, device=self.rows.device)
        lo, hi, full_lo, full_hi = (
            x[:, None, first:last, None] for x in (self.lo, self.hi, self.full_lo, self.full_hi)
        )
        allowed = (key >= lo) & (key < hi)
        inside = (key >= full_lo) & (key < full_hi)
        return allowed.to(torch.int8) + (allowed & inside)


def bind(
    layout: Structure,
    batch: int,
    heads: int,
    q_len: int,
    k_len: int,
    q_offset: int | Tensor,
    kv_len: int | Tensor | None,
    prompt_len: int | Tensor | None,
    block_size: tuple[int, int],
    device: torch.device,
) -> BoundLayout:
    """Bind a layout; memoised on the layout where all lengths are host-known and nothing changed.

    A hit is on the hot path of every layer: it looks a tuple up, and only asks whether what a layout reads changed.
    """
    if isinstance(q_len, Tensor):  # torch.jit.trace hands on sizes as tensors of the host
        batch, heads, q_len, k_len = (int(size) for size in (batch, heads, q_len, k_len))
    key = (batch, heads, q_len, k_len, q_offset, kv_len, prompt_len, *block_size, device)
    lengths_known = type(q_offset) is int and all(x is None or type(x) is int for x in (kv_len, prompt_len))
    if not lengths_known or torch.compiler.is_compiling():
        return _bind(layout, Geometry.of(*key), memo=False)
    reads = layout.reads()
    if reads is None:
        return _bind(layout, Geometry.of(*key), memo=False)
    tensors = [x for x in reads if isinstance(x, Tensor)] if reads else None
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if tensors and (capturing or not tell_changes(tensors)):  # a graph reads the tensors when it is replayed
        return _bind(layout, Geometry.of(*key), memo=False)
    memo: dict[tuple, tuple[BoundLayout, tuple, tuple]] = layout.__dict__.setdefault("_memo", {})
    state = state_of(reads)
    known = memo.get(key)
    bound = known[0] if known is not None and known[1] == state else None
    if bound is None:
        with torch.inference_mode(False), torch.no_grad():  # what is remembered also serves training
            bound = _bind(layout, Geometry.of(*key), memo=True)
        if capturing:
            return bound  # its memory is the graph's
        if len(memo) >= _MEMO_ENTRIES:
            memo.pop(next(iter(memo)))
        memo[key] = bound, state, reads  # held, so that no other tensor takes an id over
    elif capturing:
        _kept_for_graphs[id(bound)] = bound
    return bound


_kept_for_graphs: dict[int, BoundLayout] = {}  # a graph replays their addresses for as long as it lives


@without_autocast
def _bind(layout: Structure, geometry: Geometry, memo: bool) -> BoundLayout:
    parts = layout.parts()
    valid = _intersection([part.valid(geometry) for part in parts])
    spans = _token_spans(parts, geometry, valid)
    mods = [inside(mod, geometry) for mod in (part.token_mask(geometry) for part in parts) if mod is not None]
    mask_mod: MaskModFn = interval_mod(all(part.plain_causal for part in parts), geometry, spans)
    rows = _rows(parts, geometry, spans, valid)
    classes = None
    if mods:
        plain = geometry.kv_len is None and all(part.token_mask(geometry) for part in parts)
        mask_mod = all_of(mods if plain else [mask_mod, *mods])
        classes = _class_table(parts, geometry, mask_mod, spans)
        rows = _rows_of_classes(rows, classes)
    return BoundLayout(
        rows=rows,
        classes=classes,
        **_valid_ranges(geometry, valid),
        mask_mod=mask_mod,
        seq_lengths=(geometry.q_len, geometry.k_len),
        block_size=(geometry.q_block, geometry.k_block),
        longest_prompt=_longest_prompt(parts, geometry),
        layout=layout,
        geometry=geometry,
        spans=None if mods or mask_mod is causal_mask else spans,
        memo={} if memo else None,
    )


def _intersection(ranges: list[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor] | None:
    start = end = None
    for given in ranges:
        if given is not None:
            start = given[0] if start is None else torch.maximum(start, given[0])
            end = given[1] if end is None else torch.minimum(end, given[1])
    return None if start is None or end is None else (start, end)


def _token_spans(parts: tuple[Structure, ...], geometry: Geometry, valid) -> Spans:
    """Allowed keys of every query; queries past q_len and padded ones have an empty interval, [0, 0)."""
    positions = geometry.positions
    found = _intersection([part.spans(geometry) for part in parts])
    start, end = found or (torch.zeros_like(positions), torch.full_like(positions, geometry.k_len))
    end = torch.minimum(end, geometry.key_end(like=end[:1, 0])[:, None]).clamp(max=geometry.k_len)
    start = start.clamp(min=0)
    if valid is not None:
        start = torch.maximum(start, valid[0][:, None])
        end = torch.minimum(end, valid[1][:, None])
    real = _real_queries(geometry, valid) & (start < end)
    return Spans(torch.where(real, start, 0), torch.where(real, end, 0))


def _real_queries(geometry: Geometry, valid) -> Tensor:
    local = torch.arange(geometry.q_blocks * geometry.q_block, device=geometry.device)
    real = (local < geometry.q_len)[None]
    if valid is not None:
        positions = geometry.positions
        real = real & (positions >= valid[0][:, None]) & (positions < valid[1][:, None])
    return real


def _rows(parts: tuple[Structure, ...], geometry: Geometry, spans: Spans, valid) -> Tensor:
    def by_block(x: Tensor) -> Tensor:
        return rearrange(x, "b (i q) -> b i q", q=geometry.q_block)

    start, end = by_block(spans.start), by_block(spans.end)
    some = end > start
    k_block = geometry.k_block
    lo = torch.where(some, start, LONGEST).amin(-1) // k_block
    hi = torch.where(some, end - 1, -1).amax(-1) // k_block + 1
    lo = torch.minimum(lo, hi)
    full_lo = (start.amax(-1) + (k_block - 1)) // k_block
    full_hi = torch.where(some, end, 0).amin(-1) // k_block
    full = full_hi > full_lo
    positions = by_block(geometry.positions)
    real = by_block(_real_queries(geometry, valid))
    own_lo = (torch.where(real, positions, LONGEST).amin(-1) // k_block).clamp(max=geometry.k_blocks)
    own_hi = (torch.where(real, positions, -1).amax(-1) // k_block + 1).clamp(max=geometry.k_blocks)
    own_lo = torch.minimum(own_lo, own_hi)
    first, last = (_first_real(by_block(x), real) for x in _prompt(parts, geometry))
    first_block = first // k_block
    prompt_blocks = torch.where(last > first, (last - 1) // k_block - first_block + 1, 0)
    position = torch.minimum(own_hi - 1 - first_block, prompt_blocks - 1).clamp(min=0)
    columns = (lo, hi, full_lo * full, full_hi * full, own_lo, own_hi, position, prompt_blocks)
    return torch.stack(torch.broadcast_tensors(*columns), -1).int().contiguous()


def _first_real(x: Tensor, real: Tensor) -> Tensor:
    """The value of each row's first real query; prompts follow each other, so it is the smallest; else 0."""
    least = torch.where(real, x, LONGEST).amin(-1)
    return torch.where(real.any(-1), least, 0)


def _prompt(parts: tuple[Structure, ...], geometry: Geometry) -> tuple[Tensor, Tensor]:
    """The prompt [start, end) of every query position: by documents, by padding, or one from key 0."""
    documents = any(part.document_spans() is not None for part in parts)
    positions = geometry.positions
    found = _intersection([part.prompt(geometry) for part in parts])
    start = torch.zeros_like(positions) if found is None else found[0]
    if geometry.prompt_len is not None:
        if documents:
            raise ValueError("prompt_len must be None with documents: each document says its own length")
        return torch.broadcast_tensors(start, start + geometry.column(geometry.prompt_len))
    if documents:
        assert found is not None
        return torch.broadcast_tensors(*found)
    end = geometry.key_end(like=start[:1, 0])[:, None] if found is None else found[1]
    return torch.broadcast_tensors(start, torch.minimum(end, geometry.query_end()))


def _longest_prompt(parts: tuple[Structure, ...], geometry: Geometry) -> int | None:
    if isinstance(geometry.prompt_len, Tensor):
        return None
    tokens = [geometry.k_len if geometry.prompt_len is None else geometry.prompt_len]
    for part in parts:
        spans = part.document_spans()
        if spans is not None:
            tokens.append(spans[0].shape[1])
    return -(-max(tokens) // geometry.k_block) + 1  # a prompt need not start with a block


def _valid_ranges(geometry: Geometry, valid) -> dict[str, Tensor | None]:
    keys = valid
    if geometry.kv_len is not None:
        end = geometry.column(geometry.kv_len)[:, 0]
        keys = _intersection([valid, (torch.zeros_like(end), end)])
    found: dict[str, Tensor | None] = dict.fromkeys(("key_start", "key_end", "query_start", "query_end"))
    if keys is not None:
        found["key_start"], found["key_end"] = (_batched(x, geometry) for x in keys)
    if valid is not None:
        offset = geometry.column(geometry.q_offset)[:, 0]
        local = [(x - offset).clamp(min=0, max=geometry.q_len) for x in valid]
        found["query_start"], found["query_end"] = (_batched(x, geometry) for x in local)
    return found


def _batched(x: Tensor, geometry: Geometry) -> Tensor:
    return x.to(torch.int32).expand(geometry.batch).contiguous()


def _class_table(parts, geometry: Geometry, mask_mod: MaskModFn, spans: Spans) -> Tensor:
    shaped = [part for part in parts if part.token_mask(geometry) is not None]
    batch = max([part.sizes()[0] for part in shaped] + [spans.start.shape[0]])
    heads = max(part.sizes()[1] for part in shaped)
    block_size = (geometry.q_block, geometry.k_block)
    return classify(mask_mod, batch, heads, geometry.q_len, geometry.k_len, block_size, geometry.device)


def _rows_of_classes(rows: Tensor, classes: Tensor) -> Tensor:
    some = (classes != EMPTY).any(1)
    key = torch.arange(classes.shape[-1], dtype=torch.int32, device=classes.device)
    hi = torch.where(some, key + 1, 0).amax(-1)
    lo = torch.minimum(torch.where(some, key, LONGEST).amin(-1), hi)
    zero = torch.zeros_like(lo)
    columns = (lo, hi, zero, zero, *rows.unbind(-1)[4:])
    return torch.stack(torch.broadcast_tensors(*columns), -1).int().contiguous()
