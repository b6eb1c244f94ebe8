"""From a layout and the sizes of q and k to facts about each row of blocks, without any N x N.

Every built-in layout gives each query one interval of keys, so a row of query blocks is described by a few
integers: which key blocks hold an allowed pair, which are allowed throughout. Other masks get a class table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from stem_flex._captured import state_of
from stem_flex.budget import row_budget
from stem_flex.classes import EMPTY, classify
from stem_flex.config import StemConfig
from stem_flex.geometry import Geometry
from stem_flex.mods import MaskModFn, all_of, causal_mask, inside, interval_mod

if TYPE_CHECKING:
    from stem_flex.layout import Layout

# Columns of BoundLayout.rows; every range is half open.
LO, HI, FULL_LO, FULL_HI, OWN_LO, OWN_HI, POSITION, PROMPT_BLOCKS = range(8)

_BIG = 2**31 - 1
_MEMO_ENTRIES = 64


class Spans(NamedTuple):
    """Keys [start, end) that each query position may attend to, int32, broadcastable to (B, positions)."""

    start: Tensor
    end: Tensor


@dataclass(frozen=True, eq=False)
class BoundLayout:
    """Block-level facts of a layout at given sizes.

    Attributes:
        rows: int32 (1 or B, Qb, 8), for each row of query blocks the half-open ranges of key blocks that are
            allowed (LO, HI), full (FULL_LO, FULL_HI) and hold the positions of the row's own queries (OWN_LO,
            OWN_HI), then the row's position in its prompt and the prompt's length, in key blocks.
        classes: None, then a pair's class is full in the full range, partial in the rest of the allowed range;
            or int8 (1 or B, 1 or H, Qb, Kb) of EMPTY, PARTIAL, FULL, which then is the truth.
        key_start, key_end: int32 (B,), the valid keys; None: all.
        query_start, query_end: int32 (B,), the valid local queries; None: all.
        mask_mod: the token mask, local query indices, safe for indices rounded up to whole blocks.
        seq_lengths, block_size: (query, key) tokens.
        longest_prompt: no row's PROMPT_BLOCKS is larger; None: only the device knows.
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
    layout: Layout
    geometry: Geometry
    spans: Spans | None = field(default=None, repr=False)
    _budgets: dict[StemConfig, Tensor] | None = field(default=None, repr=False)

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

    def budget(self, config: StemConfig) -> Tensor:
        """TPD budget of every row, int32 (1 or B, 1, Qb)."""
        if self._budgets is not None and config in self._budgets:
            return self._budgets[config]
        budget = row_budget(self.rows[..., POSITION], self.rows[..., PROMPT_BLOCKS], config)[:, None]
        if self._budgets is not None and not (budget.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._budgets[config] = budget
        return budget

    def intervals(self) -> Spans | None:
        """The keys of each query as they were bound, None where a class table says it."""
        if self.classes is not None or self.spans is not None:
            return self.spans
        return _token_spans(self.layout.parts(), self.geometry, None)  # plain causal: nothing that could change

    def allowed(self) -> Tensor:
        """Which pairs of blocks are allowed, bool (1 or B, 1 or H, Qb, Kb): for small sizes and tests."""
        return self.dense_classes() != EMPTY

    def dense_classes(self, first: int = 0, last: int | None = None) -> Tensor:
        """Classes of the rows [first, last), int8 (1 or B, 1 or H, rows, Kb)."""
        if self.classes is not None:
            return self.classes[:, :, first:last]
        rows = self.rows[:, None, first:last, :, None]
        key = torch.arange(self.k_blocks, dtype=torch.int32, device=rows.device)
        allowed = (key >= rows[..., LO, :]) & (key < rows[..., HI, :])
        inside = (key >= rows[..., FULL_LO, :]) & (key < rows[..., FULL_HI, :])
        return allowed.to(torch.int8) + (allowed & inside)


def bind(
    layout: Layout,
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
    key = (batch, heads, q_len, k_len, q_offset, kv_len, prompt_len, *block_size, device)
    lengths_known = type(q_offset) is int and all(x is None or type(x) is int for x in (kv_len, prompt_len))
    if not lengths_known or torch.compiler.is_compiling():
        return _bind(layout, Geometry.of(*key), memo=False)
    reads = layout.reads()
    tensors = [x for x in reads if isinstance(x, Tensor)]
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if tensors and (capturing or any(tensor.is_inference() for tensor in tensors)):
        # a graph reads the tensors when it is replayed; inference tensors don't tell when they change
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


def _bind(layout: Layout, geometry: Geometry, memo: bool) -> BoundLayout:
    parts = layout.parts()
    valid = _intersection([part.valid(geometry) for part in parts])
    spans = _token_spans(parts, geometry, valid)
    mods = [inside(mod, geometry) for mod in (part.token_mask(geometry) for part in parts) if mod is not None]
    mask_mod: MaskModFn = interval_mod(parts, geometry, spans)
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
        _budgets={} if memo else None,
    )


def _intersection(ranges: list[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor] | None:
    start = end = None
    for given in ranges:
        if given is not None:
            start = given[0] if start is None else torch.maximum(start, given[0])
            end = given[1] if end is None else torch.minimum(end, given[1])
    return None if start is None or end is None else (start, end)


def _token_spans(parts: tuple[Layout, ...], geometry: Geometry, valid) -> Spans:
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


def _rows(parts: tuple[Layout, ...], geometry: Geometry, spans: Spans, valid) -> Tensor:
    def by_block(x: Tensor) -> Tensor:
        return rearrange(x, "b (i q) -> b i q", q=geometry.q_block)

    start, end = by_block(spans.start), by_block(spans.end)
    some = end > start
    k_block = geometry.k_block
    lo = torch.where(some, start, _BIG).amin(-1) // k_block
    hi = torch.where(some, end - 1, -1).amax(-1) // k_block + 1
    lo = torch.minimum(lo, hi)
    full_lo = (start.amax(-1) + (k_block - 1)) // k_block
    full_hi = torch.where(some, end, 0).amin(-1) // k_block
    full = full_hi > full_lo
    positions = by_block(geometry.positions)
    real = by_block(_real_queries(geometry, valid))
    own_lo = (torch.where(real, positions, _BIG).amin(-1) // k_block).clamp(max=geometry.k_blocks)
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
    least = torch.where(real, x, _BIG).amin(-1)
    return torch.where(real.any(-1), least, 0)


def _prompt(parts: tuple[Layout, ...], geometry: Geometry) -> tuple[Tensor, Tensor]:
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


def _longest_prompt(parts: tuple[Layout, ...], geometry: Geometry) -> int | None:
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


def from_position(geometry: Geometry, of_token: Tensor) -> Tensor:
    """``of_token`` (rows, tokens) int32 read at every query position; 0 past its end. (rows or B, positions)."""
    positions = geometry.positions
    rows = max(positions.shape[0], of_token.shape[0])
    tokens = of_token.shape[1]
    if tokens == 0:
        return torch.zeros_like(positions).expand(rows, -1)
    index = positions.clamp(min=0, max=tokens - 1).long().expand(rows, -1)
    return torch.where(positions < tokens, of_token.expand(rows, -1).gather(1, index), 0)


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
    lo = torch.minimum(torch.where(some, key, _BIG).amin(-1), hi)
    rows = rows.expand(max(rows.shape[0], lo.shape[0]), -1, -1).clone()
    rows[..., LO], rows[..., HI] = lo, hi
    rows[..., FULL_LO] = rows[..., FULL_HI] = 0
    return rows
