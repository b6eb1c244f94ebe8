"""The block sketch's scores as a ``torch.library`` operator, ``stem_flex::sketch_scores``.

As the operators of `stem_flex.kernels.ops`: no host sync, no shape that depends on data, no gradient; safe under
``torch.compile(fullgraph=True)`` and in CUDA graphs. Launches: key proxies, then query proxies, sums and masses once a
chunk, and with a coarse sketch the fine one (`stem_flex.kernels.sketch_chunks`).
"""

import torch
from torch import Tensor

from stem_flex.config import LEAST_THRESHOLD
from stem_flex.kernels import sketch_mass
from stem_flex.kernels.launch import plan_of
from stem_flex.kernels.ops import _LIBRARY, _check_inputs, _check_rows, _guard, _register
from stem_flex.kernels.sketch_chunks import Chunks, limits
from stem_flex.kernels.sketch_proxies import MOST_BLOCK


def check(
    q: Tensor, k: Tensor, rows: Tensor, block_q: int, block_k: int, sketch: list[int], coarse: list[int] | None,
    capacity: int, threshold: float,
) -> None:  # fmt: skip
    """Refuse what the kernels would read wrongly. Callers have checked shapes against each other."""
    _check_inputs("q and k", q=q, k=k)
    if max(block_q, block_k) > MOST_BLOCK:
        raise ValueError(f"blocks must be at most {MOST_BLOCK} tokens, got ({block_q}, {block_k}); "
                         "use smaller ones or impl='torch'")  # fmt: skip
    q_outliers, q_means, k_outliers, k_means = sketch
    for name, block, outliers, means in (
        ("query", block_q, q_outliers, q_means),
        ("key", block_k, k_outliers, k_means),
    ):
        if not 0 <= outliers <= block or means < 1 or means & (means - 1) or block % means:
            raise ValueError(f"sketch must have 0 to {block} {name} outliers and a power of two of {name} means that "
                             f"divides the block, got {outliers} and {means}")  # fmt: skip
    if coarse is not None and not (0 <= coarse[0] <= q_outliers and 0 <= coarse[1] <= k_outliers):
        raise ValueError(f"coarse must have at most the sketch's outliers, {q_outliers} of queries and {k_outliers} of "
                         f"keys, got {coarse}")  # fmt: skip
    if coarse is not None and capacity < 1:
        raise ValueError(f"capacity must be 1 or more with a coarse sketch, got {capacity}")
    if coarse is not None and threshold < LEAST_THRESHOLD:  # half of nothing, doubled, proposes no fewer
        raise ValueError(f"threshold must be at least {LEAST_THRESHOLD} with a coarse sketch, got {threshold}")
    _check_rows(rows)


def _scores(
    q: Tensor, k: Tensor, rows: Tensor, classes: Tensor | None, key_start: Tensor | None, key_end: Tensor | None,
    query_start: Tensor | None, query_end: Tensor | None, levels: Tensor | None = None, *, block_q: int, block_k: int,
    sketch: list[int], coarse: list[int] | None = None, capacity: int = 0, threshold: float = 0.0,
    causal_offset: int | None = None,
) -> Tensor:  # fmt: skip
    check(q, k, rows, block_q, block_k, sketch, coarse, capacity, threshold)
    restrictions = (classes, key_start, key_end, query_start, query_end)
    sizes = sketch_mass.sizes_of(q, k, block_q, block_k, tuple(sketch))
    plan = plan_of((
        "sketch", *(None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() % 16)
                    for x in (q, k, rows, levels, *restrictions)),
        q.device, sizes, None if coarse is None else tuple(coarse), capacity, threshold, causal_offset, limits(),
    ))  # fmt: skip
    with _guard(q):
        out = torch.empty(
            sizes.batch, sizes.q_heads, sizes.q_blocks, sizes.k_blocks, dtype=torch.float32, device=q.device
        )
        if out.numel() == 0:
            return out
        chunks = Chunks(
            q, k, rows, restrictions, sizes, coarse, capacity, threshold if levels is None else levels, causal_offset,
            plan,
        )  # fmt: skip
        for chunk in chunks.cut:
            chunks.score(chunk, out[:, :, chunk.row :], sizes.q_blocks * sizes.k_blocks, sizes.k_blocks, full=True)
    return out


_register(
    "sketch_scores",
    "(Tensor q, Tensor k, Tensor rows, Tensor? classes, Tensor? key_start, Tensor? key_end, Tensor? query_start, "
    "Tensor? query_end, Tensor? levels=None, *, int block_q, int block_k, int[] sketch, int[]? coarse=None, "
    "SymInt capacity=0, float threshold=0.0, SymInt? causal_offset=None) -> Tensor",
    _scores,
)


@torch.library.register_fake("stem_flex::sketch_scores", lib=_LIBRARY)
def _(q, k, rows, classes, key_start, key_end, query_start, query_end, levels=None, *, block_q, block_k, sketch,
      coarse=None, capacity=0, threshold=0.0, causal_offset=None):  # fmt: skip
    q_blocks, k_blocks = -(-q.shape[2] // block_q), -(-k.shape[2] // block_k)
    return torch.empty((q.shape[0], q.shape[1], q_blocks, k_blocks), dtype=torch.float32, device=q.device)


def sketch_scores(
    q: Tensor, k: Tensor, rows: Tensor, classes: Tensor | None = None, key_start: Tensor | None = None,
    key_end: Tensor | None = None, query_start: Tensor | None = None, query_end: Tensor | None = None,
    levels: Tensor | None = None, *, block_q: int, block_k: int, sketch: tuple[int, ...],
    coarse: tuple[int, int] | None = None, capacity: int = 0, threshold: float = 0.0, causal_offset: int | None = None,
) -> Tensor:  # fmt: skip
    """Score every block pair by its sketch: float32 (B, Hq, Qb, Kb), -inf where the layout does not allow it.

    Args:
        q: (B, Hq, Lq, D); k: (B, Hkv, Lk, D). float16, bfloat16 or float32, one dtype, last stride 1, the other
            strides free. Hq is a multiple of Hkv.
        rows: int32 (B or 1, Qb, 8), contiguous; its first two, lo and hi, are read.
        classes, key_start, key_end, query_start, query_end, causal_offset: as `stem_flex.kernels.ops.stem_tables`.
        block_q, block_k: block sizes in tokens, powers of two.
        sketch: query outliers, query means, key outliers, key means of a block.
        coarse: query outliers and key outliers of the sketch that proposes what ``sketch`` looks at
            (`stem_flex.kernels.sketch_fine`), at most ``capacity`` blocks of a row; None: everything.
        levels: float32 of three dimensions that broadcasts to (B, Hq, Qb), thresholds of the rows; None: ``threshold``.
            They are read with ``coarse`` only.

    Raises:
        ValueError, TypeError: strides, dtypes, sizes the kernels cannot take. RuntimeError: CPU tensors outside
        Triton's interpreter.
    """
    return torch.ops.stem_flex.sketch_scores.default(
        q, k, rows, classes, key_start, key_end, query_start, query_end, levels, block_q=block_q, block_k=block_k,
        sketch=list(sketch), coarse=None if coarse is None else list(coarse), capacity=capacity, threshold=threshold,
        causal_offset=causal_offset,
    )  # fmt: skip
