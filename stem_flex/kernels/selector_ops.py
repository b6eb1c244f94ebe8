"""What the published selectors ask of the kernels, as ``torch.library`` operators.

``stem_flex::cell_mass``, ``cell_peaks`` and ``query_logs`` over `stem_flex.kernels.cells`, ``tail_sums`` over
`stem_flex.kernels.tail`, ``largest_bound`` over `stem_flex.kernels.above`. As the operators of `stem_flex.kernels.ops`:
no host sync, no shape that depends on data, no gradient; a selector's scores are one graph under
``torch.compile(fullgraph=True)``. Errors are the kernels'.
"""

import torch
from torch import Tensor

from stem_flex.kernels import above, cells, tail
from stem_flex.kernels.cells import Cut, Operands
from stem_flex.kernels.ops import _LIBRARY, _register

_OPERANDS = (
    "(Tensor q, Tensor k, Tensor lo, Tensor hi, Tensor? key_start, Tensor? key_end, Tensor? query_start, "
    "Tensor? query_end, *, SymInt[] cut, float scale"
)


def _cell_mass(q, k, lo, hi, *valid, cut, scale, causal_offset, step, sums, peaks):
    operands = Operands(q, k, (lo, hi), valid, Cut(*cut), scale)
    return cells.cell_mass(operands, causal_offset, step, sums=sums, peaks=peaks)


def _cell_peaks(q, k, lo, hi, *valid, cut, scale):
    return cells.cell_peaks(Operands(q, k, (lo, hi), valid, Cut(*cut), scale))


def _query_logs(q, k, lo, hi, *valid, cut, scale):
    return cells.query_logs(Operands(q, k, (lo, hi), valid, Cut(*cut), scale))


_register("cell_mass", f"{_OPERANDS}, SymInt? causal_offset, SymInt step, bool sums, bool peaks) -> (Tensor, Tensor)",
          _cell_mass)  # fmt: skip
_register("cell_peaks", f"{_OPERANDS}) -> Tensor", _cell_peaks)
_register("query_logs", f"{_OPERANDS}) -> Tensor", _query_logs)
_register("tail_sums", "(Tensor q, Tensor k, Tensor start, Tensor end) -> (Tensor, Tensor)", tail.tail_sums)
_register("largest_bound", "(Tensor x, float part) -> Tensor", above.largest_bound)


def _empty(q: Tensor, rows, columns) -> Tensor:
    return torch.empty((q.shape[0], q.shape[1], rows, columns), dtype=torch.float32, device=q.device)


@torch.library.register_fake("stem_flex::cell_mass", lib=_LIBRARY)
def _(q, k, lo, hi, *valid, cut, scale, causal_offset, step, sums, peaks):
    tokens, rows, columns = cut
    shape = lo.shape[1] // rows, -(-k.shape[2] // (tokens * columns))
    return _empty(q, *shape), _empty(q, *shape)


@torch.library.register_fake("stem_flex::cell_peaks", lib=_LIBRARY)
def _(q, k, lo, hi, *valid, cut, scale):
    tokens, _, columns = cut
    return _empty(q, lo.shape[1], -(-k.shape[2] // (tokens * columns)))


@torch.library.register_fake("stem_flex::query_logs", lib=_LIBRARY)
def _(q, k, lo, hi, *valid, cut, scale):
    tokens, rows, columns = cut
    return _empty(q, lo.shape[1] // rows, -(-k.shape[2] // (tokens * columns)))


@torch.library.register_fake("stem_flex::tail_sums", lib=_LIBRARY)
def _(q, k, start, end):
    shape = q.shape[0], q.shape[1]
    columns = torch.empty((*shape, k.shape[2]), dtype=torch.float32, device=q.device)
    return columns, torch.empty((*shape, q.shape[2] + k.shape[2]), dtype=torch.float32, device=q.device)


@torch.library.register_fake("stem_flex::largest_bound", lib=_LIBRARY)
def _(x, part):
    return torch.empty(x.shape[:2], dtype=torch.int32, device=x.device)


def _given(operands: Operands) -> tuple[Tensor | None, ...]:
    return operands.q, operands.k, *operands.spans, *operands.valid


def cell_mass(
    operands: Operands, causal_offset: int | None = None, step: int = 1, *, sums: bool = True, peaks: bool = False
) -> tuple[Tensor, Tensor]:
    """:func:`stem_flex.kernels.cells.cell_mass`."""
    return torch.ops.stem_flex.cell_mass.default(
        *_given(operands), cut=list(operands.cut), scale=operands.scale, causal_offset=causal_offset, step=step,
        sums=sums, peaks=peaks,
    )  # fmt: skip


def cell_peaks(operands: Operands) -> Tensor:
    """:func:`stem_flex.kernels.cells.cell_peaks`."""
    return torch.ops.stem_flex.cell_peaks.default(*_given(operands), cut=list(operands.cut), scale=operands.scale)


def query_logs(operands: Operands) -> Tensor:
    """:func:`stem_flex.kernels.cells.query_logs`."""
    return torch.ops.stem_flex.query_logs.default(*_given(operands), cut=list(operands.cut), scale=operands.scale)


def tail_sums(q: Tensor, k: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`stem_flex.kernels.tail.tail_sums`."""
    return torch.ops.stem_flex.tail_sums.default(q, k, start, end)


def largest_bound(x: Tensor, part: float) -> Tensor:
    """:func:`stem_flex.kernels.above.largest_bound`."""
    return torch.ops.stem_flex.largest_bound.default(x, part)
