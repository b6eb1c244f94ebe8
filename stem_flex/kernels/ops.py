"""The kernels as ``torch.library`` operators: ``stem_flex::tables``, ``stem_flex::scores``, ``stem_flex::select``.

Each has a fake implementation and an implementation for CUDA (and for CPU tensors, which run only under Triton's
interpreter). No host sync, no shape that depends on data, no gradient; safe under ``torch.compile(fullgraph=True)``
and in CUDA graphs (after one eager call, which compiles the kernels).

`stem_tables` launches pool, magnitude (metric ``"zscore"`` with a weight only), then scores and select once a chunk:
4 launches up to 128K tokens of 32 heads. Memory at the peak, besides the tables (e = bytes an element):

    flats    e * s*D * B*(Hq*Qb + Hkv*Kb)         s/BQ of q's bytes, s/BK of k's
    stats    4 * B*Hkv*Kb * (n + 4)
    scores   at most `stem_flex.kernels.scores.MOST_WORKSPACE_BYTES`, or 16 rows of every head

Compilations: one per dtype, head count, head dim, block size, stride, metric and layout kind; lengths add at most two
score tiles and one select kernel per power of two of key blocks, 256 .. 16384.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from stem_flex.kernels import scores as _scores
from stem_flex.kernels.launch import Plan, plan_of
from stem_flex.kernels.magnitude import magnitude
from stem_flex.kernels.pool import INTERPRETED, METRICS, Sizes, pool, sizes_of
from stem_flex.kernels.select import MAX_CANDIDATES, empty_tables, select_rows

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LIBRARY = torch.library.Library("stem_flex", "FRAGMENT")
_NO_GUARD = nullcontext()


def _guard(q: Tensor):
    """Context that makes q's device current; launches go to the current device."""
    if q.is_cuda:
        return _NO_GUARD if q.get_device() == torch.cuda.current_device() else torch.cuda.device(q.device)
    if not INTERPRETED:
        raise RuntimeError(
            f"the Triton kernels expect CUDA tensors, got {q.device}; use impl='torch', "
            "or set TRITON_INTERPRET=1 before importing to run them in Triton's interpreter"
        )
    return _NO_GUARD


def _check(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, block_q: int, block_k: int, stride: int, metric: str) -> None:
    """Refuse what the kernels would read wrongly. Callers have checked shapes against each other."""
    _check_inputs("q, k and v", q=q, k=k, v=v)
    if any(n & (n - 1) for n in (block_q, block_k, stride)) or block_q % stride or block_k % stride:
        raise ValueError(f"stride must divide both block sizes, all powers of two, "
                         f"got stride {stride}, blocks ({block_q}, {block_k})")  # fmt: skip
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {METRICS}, got {metric!r}")
    _check_rows(rows)


def _check_inputs(names: str, *, q: Tensor, **others: Tensor) -> None:
    for name, x in (("q", q), *others.items()):
        if x.stride(-1) != 1:
            raise ValueError(f"{name} must have unit stride in its last dimension, got strides {x.stride()}; "
                             f"call {name}.contiguous()")  # fmt: skip
        if x.dtype != q.dtype or x.dtype not in _DTYPES:
            raise TypeError(f"{names} must share a dtype of float16, bfloat16, float32, got {q.dtype} for q and "
                            f"{x.dtype} for {name}; cast them, or use impl='torch'")  # fmt: skip


def _check_rows(rows: Tensor) -> None:
    if rows.dtype != torch.int32 or rows.shape[-1] != 8 or not rows.is_contiguous():
        raise ValueError(f"rows must be a contiguous int32 (B or 1, Qb, 8), got {rows.dtype} {tuple(rows.shape)}")


def _strides(x: Tensor | None) -> tuple[int, int, int]:
    """(batch, head, row) strides of a tensor that broadcasts over them; 0 for sizes of 1 and for None."""
    if x is None:
        return 0, 0, 0
    batch, head, row = (step if size > 1 else 0 for size, step in zip(x.shape[:3], x.stride()[:3], strict=True))
    return batch, head, row


def _sizes(q: Tensor, k: Tensor, v: Tensor, block_q: int, block_k: int, stride: int) -> Sizes:
    return sizes_of(tuple(q.shape), tuple(k.shape), v.shape[-1], block_q, block_k, stride)


def _pooled(
    q: Tensor, k: Tensor, v: Tensor, key_start: Tensor | None, key_end: Tensor | None, query_start: Tensor | None,
    query_end: Tensor | None, sizes: Sizes, metric: str, value_weight: float, plan: Plan,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch pool and magnitude. Returns (flats, stats) with the bias plane filled."""
    flats, stats = pool(q, k, v, key_start, key_end, query_start, query_end, sizes, metric, value_weight, plan)
    if value_weight != 0 and metric == "zscore":
        magnitude(stats, sizes, value_weight, plan)
    return flats, stats


def _tables(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, budget: Tensor, classes: Tensor | None, key_start: Tensor | None,
    key_end: Tensor | None, query_start: Tensor | None, query_end: Tensor | None, *, block_q: int, block_k: int,
    stride: int, metric: str, value_weight: float, sink: int, local: int, partial_columns: int, width: int,
    max_key_blocks: int, causal_offset: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check(q, k, v, rows, block_q, block_k, stride, metric)
    _check_span(max_key_blocks)
    tensors = (q, k, v, rows, budget, classes, key_start, key_end, query_start, query_end)
    heads = q.shape[0] * q.shape[1]
    workspace_bytes = _scores.workspace_bytes(heads, -(-k.shape[2] // block_k))
    plan = plan_of((
        *(None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() % 16) for x in tensors), q.device,
        block_q, block_k, stride, metric, value_weight, sink, local, partial_columns, width, max_key_blocks,
        causal_offset, workspace_bytes,
    ))  # fmt: skip
    sizes = _sizes(q, k, v, block_q, block_k, stride)
    chunks, size = _scores.chunks(
        heads, sizes.q_blocks, sizes.k_blocks, block_q, block_k, causal_offset, workspace_bytes
    )
    budget_strides, class_strides = _strides(budget), _strides(classes)
    with _guard(q):
        buffer, counts = empty_tables(
            sizes.batch, sizes.q_heads, sizes.q_blocks, sizes.k_blocks, partial_columns, width, q
        )
        if sizes.q_blocks == 0 or heads == 0:
            return buffer, counts
        if sizes.k_blocks == 0:
            return buffer, counts.zero_()
        flats, stats = _pooled(q, k, v, key_start, key_end, query_start, query_end, sizes, metric, value_weight, plan)
        workspace = torch.empty(size, dtype=torch.float32, device=q.device)
        for chunk in chunks:
            row_stride = _scores.aligned(chunk.width)
            head_stride = chunk.height * row_stride
            _scores.score_rows(
                flats, stats, rows, None, (0, 0, 0), workspace, chunk, head_stride, row_stride, sizes, plan,
                has_bias=value_weight != 0, full=False,
            )  # fmt: skip
            select_rows(
                workspace, (sizes.q_heads * head_stride, head_stride, row_stride), rows, budget, budget_strides,
                classes, class_strides, buffer, counts, plan, row=chunk.row, count=chunk.height, k_blocks=chunk.width,
                span=min(row_stride, max_key_blocks + 31), sink=sink, local=local, partial_columns=partial_columns,
                width=width,
            )  # fmt: skip
    return buffer, counts


def _check_span(max_key_blocks: int) -> None:
    if max_key_blocks > MAX_CANDIDATES:
        raise ValueError(f"a row may have at most {MAX_CANDIDATES} candidate key blocks, got {max_key_blocks}; "
                         "use larger blocks or impl='torch'")  # fmt: skip


def _score_matrix(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, classes: Tensor | None, key_start: Tensor | None,
    key_end: Tensor | None, query_start: Tensor | None, query_end: Tensor | None, *, block_q: int, block_k: int,
    stride: int, metric: str, value_weight: float,
) -> Tensor:  # fmt: skip
    _check(q, k, v, rows, block_q, block_k, stride, metric)
    sizes = _sizes(q, k, v, block_q, block_k, stride)
    with _guard(q):
        out = torch.empty(
            (sizes.batch, sizes.q_heads, sizes.q_blocks, sizes.k_blocks), dtype=torch.float32, device=q.device
        )
        if out.numel() == 0:
            return out
        flats, stats = _pooled(q, k, v, key_start, key_end, query_start, query_end, sizes, metric, value_weight, {})
        _scores.score_rows(
            flats, stats, rows, classes, _strides(classes), out, _scores.Chunk(0, sizes.q_blocks, sizes.k_blocks),
            sizes.q_blocks * sizes.k_blocks, sizes.k_blocks, sizes, {}, has_bias=value_weight != 0, full=True,
        )  # fmt: skip
    return out


def _select(
    scores: Tensor, rows: Tensor, budget: Tensor, classes: Tensor | None, *, sink: int, local: int,
    partial_columns: int, width: int, max_key_blocks: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if scores.dtype != torch.float32 or scores.stride(-1) != 1:
        raise ValueError("scores must be float32 with unit stride in the last dimension, "
                         f"got {scores.dtype}, strides {scores.stride()}")  # fmt: skip
    _check_rows(rows)
    batch, heads, q_blocks, k_blocks = scores.shape
    span = k_blocks if max_key_blocks is None else max_key_blocks
    _check_span(span)
    with _guard(scores):
        buffer, counts = empty_tables(batch, heads, q_blocks, k_blocks, partial_columns, width, scores)
        if k_blocks == 0:
            return buffer, counts.zero_()
        if counts.numel():
            select_rows(
                scores, _strides(scores), rows, budget, _strides(budget), classes, _strides(classes), buffer, counts,
                {}, row=0, count=q_blocks, k_blocks=k_blocks, span=min(k_blocks, span + 31), sink=sink, local=local,
                partial_columns=partial_columns, width=width,
            )  # fmt: skip
    return buffer, counts


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor rows, "
_VALID = "Tensor? classes, Tensor? key_start, Tensor? key_end, Tensor? query_start, Tensor? query_end, *, "
_METRIC = "int block_q, int block_k, int stride, str metric, float value_weight"
_SELECT = "int sink, int local, SymInt partial_columns, SymInt width, "


def _register(name: str, schema: str, implementation) -> None:
    """Define one operator and its CUDA and CPU (interpreter) implementations."""
    _LIBRARY.define(name + schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))
    for key in ("CUDA", "CPU"):
        _LIBRARY.impl(name, implementation, key)
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")  # no gradient, and none is recorded


_register(
    "tables",
    f"({_INPUTS}Tensor budget, {_VALID}{_METRIC}, {_SELECT}SymInt max_key_blocks, SymInt? causal_offset=None)"
    " -> (Tensor, Tensor)",
    _tables,
)
_register("scores", f"({_INPUTS}{_VALID}{_METRIC}) -> Tensor", _score_matrix)
_register(
    "select",
    f"(Tensor scores, Tensor rows, Tensor budget, Tensor? classes, *, {_SELECT}SymInt? max_key_blocks=None)"
    " -> (Tensor, Tensor)",
    _select,
)


@torch.library.register_fake("stem_flex::tables", lib=_LIBRARY)
def _(q, k, v, rows, budget, classes, key_start, key_end, query_start, query_end, *, block_q, block_k, stride,
      metric, value_weight, sink, local, partial_columns, width, max_key_blocks, causal_offset=None):  # fmt: skip
    q_blocks, k_blocks = -(-q.shape[2] // block_q), -(-k.shape[2] // block_k)
    return empty_tables(q.shape[0], q.shape[1], q_blocks, k_blocks, partial_columns, width, q)


@torch.library.register_fake("stem_flex::scores", lib=_LIBRARY)
def _(q, k, v, rows, classes, key_start, key_end, query_start, query_end, *, block_q, block_k, stride, metric,
      value_weight):  # fmt: skip
    q_blocks, k_blocks = -(-q.shape[2] // block_q), -(-k.shape[2] // block_k)
    return torch.empty((q.shape[0], q.shape[1], q_blocks, k_blocks), dtype=torch.float32, device=q.device)


@torch.library.register_fake("stem_flex::select", lib=_LIBRARY)
def _(scores, rows, budget, classes, *, sink, local, partial_columns, width, max_key_blocks=None):
    return empty_tables(*scores.shape, partial_columns, width, scores)


def _plain(*tensors: Tensor) -> bool:
    """Whether nobody watches operators: then the dispatcher, a fifth of the host's time of a short prompt, is skipped.

    Tracers, modes, functorch's transforms, meta tensors and tensor subclasses see the operator.
    """
    return (
        all(type(x) is Tensor and not x.is_meta for x in tensors)
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._is_torch_function_mode_enabled()
        and not torch._C._autograd._profiler_enabled()
    )


def stem_tables(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, budget: Tensor, classes: Tensor | None = None,
    key_start: Tensor | None = None, key_end: Tensor | None = None, query_start: Tensor | None = None,
    query_end: Tensor | None = None, *, block_q: int, block_k: int, stride: int, metric: str, value_weight: float,
    sink: int, local: int, partial_columns: int, width: int, max_key_blocks: int, causal_offset: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Choose the key blocks of every row, straight from q, k and v.

    Args:
        q: (B, Hq, Lq, D); k: (B, Hkv, Lk, D); v: (B, Hkv, Lk, Dv). float16, bfloat16 or float32, one dtype, last
            stride 1, the other strides free. Hq is a multiple of Hkv.
        rows: int32 (B or 1, Qb, 8), contiguous: lo, hi, full_lo, full_hi, own_lo, own_hi, -, - (`stem_flex.layout`).
        budget: int32, 3-D, broadcastable to (B, Hq, Qb): blocks of the row's top-k.
        classes: None, or int8 (B or 1, Hq or 1, Qb, Kb) of 0 empty, 1 partial, 2 full, last stride 1.
        key_start, key_end, query_start, query_end: None, or int32 (B,): valid tokens, start <= token < end.
        block_q, block_k, stride: block sizes in tokens and the pooling stride, which divides both.
        metric, value_weight: ``"zscore"`` or ``"log"``; 0 leaves v unread.
        sink, local: forced first blocks of the range, forced blocks up to the row's own.
        partial_columns, width: the partial list's columns and all columns of a row (`stem_flex.kernels.select`).
            Blocks past them would be dropped from the row, so the caller bounds them.
        max_key_blocks: a host-known bound on hi - lo of every row.
        causal_offset: an int promises ``hi <= ceil((causal_offset + BQ*(I+1)) / BK)`` for every row I, which narrows
            the work of long sequences; None promises nothing.

    Returns:
        buffer int32 (B*Hq*Qb*width + Kb + partial_columns,) and counts int32 (2, B, Hq, Qb): partial, full.
        Columns past a row's counts are uninitialised.

    Raises:
        ValueError, TypeError: strides, dtypes, sizes the kernels cannot take. RuntimeError: CPU tensors outside
        Triton's interpreter.
    """
    return (_tables if _plain(q, k, v) else torch.ops.stem_flex.tables.default)(
        q, k, v, rows, budget, classes, key_start, key_end, query_start, query_end, block_q=block_q, block_k=block_k,
        stride=stride, metric=metric, value_weight=value_weight, sink=sink, local=local,
        partial_columns=partial_columns, width=width, max_key_blocks=max_key_blocks, causal_offset=causal_offset,
    )  # fmt: skip


def stem_scores(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, classes: Tensor | None = None, key_start: Tensor | None = None,
    key_end: Tensor | None = None, query_start: Tensor | None = None, query_end: Tensor | None = None, *,
    block_q: int, block_k: int, stride: int, metric: str, value_weight: float,
) -> Tensor:  # fmt: skip
    """Score every block pair: float32 (B, Hq, Qb, Kb), -inf where the layout does not allow it.

    Arguments and errors as `stem_tables`. The matrix is materialised: 4*B*Hq*Qb*Kb bytes.
    """
    return torch.ops.stem_flex.scores.default(
        q, k, v, rows, classes, key_start, key_end, query_start, query_end, block_q=block_q, block_k=block_k,
        stride=stride, metric=metric, value_weight=value_weight,
    )  # fmt: skip


def stem_select(
    scores: Tensor, rows: Tensor, budget: Tensor, classes: Tensor | None = None, *, sink: int, local: int,
    partial_columns: int, width: int, max_key_blocks: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Choose the key blocks of every row from float32 scores (B, H, Qb, Kb), last stride 1.

    Arguments, result and errors as `stem_tables`; ``max_key_blocks=None`` means Kb. Entries outside the allowed pairs
    are not read into the choice.
    """
    return torch.ops.stem_flex.select.default(
        scores, rows, budget, classes, sink=sink, local=local, partial_columns=partial_columns, width=width,
        max_key_blocks=max_key_blocks,
    )  # fmt: skip
