"""From q and k to index tables by the block sketch and a budget of mass, streamed: ``stem_flex::sketch_tables``.

As `stem_flex.kernels.ops.stem_tables`, with no score matrix: of each chunk of rows the scores are made
(`sketch_chunks`), counted above the threshold on the way, and selected from (`select`). No sort, no host sync.
"""

import torch
from torch import Tensor

from stem_flex.kernels import sketch_mass
from stem_flex.kernels.launch import plan_of
from stem_flex.kernels.ops import _LIBRARY as LIBRARY
from stem_flex.kernels.ops import _check_span, _guard, _plain, _register, _strides
from stem_flex.kernels.scores import aligned
from stem_flex.kernels.select import empty_tables, select_rows
from stem_flex.kernels.sketch_chunks import Chunks, limits
from stem_flex.kernels.sketch_ops import check


def _tables(
    q: Tensor, k: Tensor, rows: Tensor, levels: Tensor | None, classes: Tensor | None, key_start: Tensor | None,
    key_end: Tensor | None, query_start: Tensor | None, query_end: Tensor | None, *, threshold: float, floor: int,
    cap: int, block_q: int, block_k: int, sketch: list[int], coarse: list[int] | None = None, capacity: int = 0,
    sink: int, local: int, partial_columns: int, width: int, causal_offset: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check(q, k, rows, block_q, block_k, sketch, coarse, capacity, threshold)
    sizes = sketch_mass.sizes_of(q, k, block_q, block_k, tuple(sketch))
    _check_span(sizes.k_blocks)
    restrictions = (classes, key_start, key_end, query_start, query_end)
    plan = plan_of((
        "sketch tables", *(None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() % 16)
                           for x in (q, k, rows, levels, *restrictions)),
        q.device, sizes, None if coarse is None else tuple(coarse), capacity, threshold, sink, local, partial_columns,
        width, causal_offset, limits(),
    ))  # fmt: skip
    with _guard(q):
        buffer, counts = empty_tables(
            sizes.batch, sizes.q_heads, sizes.q_blocks, sizes.k_blocks, partial_columns, width, q
        )
        if counts.numel() == 0:
            return buffer, counts
        wanted = torch.empty(counts.shape[1:], dtype=torch.int32, device=q.device)
        chunks = Chunks(
            q, k, rows, restrictions, sizes, coarse, capacity, threshold if levels is None else levels, causal_offset,
            plan,
        )  # fmt: skip
        strides = [aligned(chunk.width) for chunk in chunks.cut]
        most = max(sizes.heads * chunk.height * stride for chunk, stride in zip(chunks.cut, strides, strict=True))
        workspace = torch.empty(most, dtype=torch.float32, device=q.device)
        for chunk, row_stride in zip(chunks.cut, strides, strict=True):
            head_stride = chunk.height * row_stride
            chunks.score(chunk, workspace, head_stride, row_stride, full=False, counts=wanted)
            wanted[:, :, chunk.row : chunk.row + chunk.height].clamp_(min=floor, max=cap)
            select_rows(
                workspace, (sizes.q_heads * head_stride, head_stride, row_stride), rows, wanted, _strides(wanted),
                classes, _strides(classes), buffer, counts, plan, row=chunk.row, count=chunk.height,
                k_blocks=chunk.width, span=min(row_stride, sizes.k_blocks + 31), sink=sink, local=local,
                partial_columns=partial_columns, width=width,
            )  # fmt: skip
    return buffer, counts


_register(
    "sketch_tables",
    "(Tensor q, Tensor k, Tensor rows, Tensor? levels, Tensor? classes, Tensor? key_start, Tensor? key_end, "
    "Tensor? query_start, Tensor? query_end, *, float threshold, int floor, SymInt cap, int block_q, int block_k, "
    "int[] sketch, int[]? coarse=None, SymInt capacity=0, int sink, int local, SymInt partial_columns, "
    "SymInt width, SymInt? causal_offset=None)"
    " -> (Tensor, Tensor)",
    _tables,
)


@torch.library.register_fake("stem_flex::sketch_tables", lib=LIBRARY)
def _(q, k, rows, levels, classes, key_start, key_end, query_start, query_end, *, threshold, floor, cap, block_q,
      block_k, sketch, coarse=None, capacity=0, sink, local, partial_columns, width, causal_offset=None):  # fmt: skip
    q_blocks, k_blocks = -(-q.shape[2] // block_q), -(-k.shape[2] // block_k)
    return empty_tables(q.shape[0], q.shape[1], q_blocks, k_blocks, partial_columns, width, q)


def sketch_tables(
    q: Tensor, k: Tensor, rows: Tensor, levels: Tensor | None, classes: Tensor | None, key_start: Tensor | None,
    key_end: Tensor | None, query_start: Tensor | None, query_end: Tensor | None, *, threshold: float, floor: int,
    cap: int, block_q: int, block_k: int, sketch: tuple[int, ...], coarse: tuple[int, int] | None = None,
    capacity: int = 0, sink: int, local: int, partial_columns: int, width: int, causal_offset: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Choose the key blocks of every row whose sketched mass exceeds a threshold.

    Args:
        q, k, rows, levels, classes, key_start, key_end, query_start, query_end, threshold, block_q, block_k, sketch,
        coarse, capacity, causal_offset: as `stem_flex.kernels.sketch_ops.sketch_scores`.
        floor, cap: least and most blocks of a row by the threshold.
        sink, local, partial_columns, width: as `stem_flex.kernels.ops.stem_tables`, whose results these are.
    """
    return (_tables if _plain(q, k) else torch.ops.stem_flex.sketch_tables.default)(
        q, k, rows, levels, classes, key_start, key_end, query_start, query_end, threshold=threshold, floor=floor,
        cap=cap, block_q=block_q, block_k=block_k, sketch=list(sketch),
        coarse=None if coarse is None else list(coarse), capacity=capacity, sink=sink, local=local,
        partial_columns=partial_columns, width=width, causal_offset=causal_offset,
    )  # fmt: skip
