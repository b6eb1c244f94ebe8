"""Structure of the attention mask: which pairs of blocks a prompt allows, known before any score.

A layout says everything about structure and nothing about sizes: those come from q and k when it is bound.
Layouts intersect with ``&``. Built once per prompt, a layout is bound once and reused by every layer.
`stem_flex.primitives` holds what each kind tells the binding, `stem_flex.binding` what becomes of it.

True means keep. Position ``p = q_offset + i`` is where local query ``i`` stands among the keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from stem_flex._check import (
    as_int_tensor,
    check_bool,
    check_int_tensor,
    check_mod,
    check_positive,
    check_values,
)
from stem_flex.documents import spans_of_ids, spans_of_lengths
from stem_flex.primitives import (
    Causal,
    Documents,
    FromBlockMask,
    Full,
    Layout,
    MaskMod,
    Padding,
    Prefix,
    Side,
    SlidingWindow,
)
from stem_flex.tables import block_mask_mod

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
        check_values("prefix length", length, 0)
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
    check_bool("causal", causal)
    tensor = as_int_tensor("padding lengths", lengths, 1)
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
        ids: int (tokens,) or (B, tokens) instead, the document of each token in contiguous runs. Tokens past the
            last one belong to no document.
        causal: False keeps every key of the document.

    Reads and checks its argument once, which waits for the device that holds it: build it once per prompt.
    """
    if (cu_seqlens is None) == (ids is None):
        raise ValueError("documents needs exactly one of cu_seqlens and ids")
    check_bool("causal", causal)
    if cu_seqlens is not None:
        bounds = as_int_tensor("cu_seqlens", cu_seqlens, 1)
        starts, ends = spans_of_lengths(bounds)
        return Documents(starts, ends, causal, cu_seqlens=bounds, from_host=not isinstance(cu_seqlens, Tensor))
    tensor = as_int_tensor("ids", ids, 1, 2)
    starts, ends = spans_of_ids(tensor)
    return Documents(starts, ends, causal, ids=tensor, from_host=not isinstance(ids, Tensor))


def from_mask_mod(f: Callable, B: int | None, H: int | None, Lq: int, Lk: int) -> Layout:
    """Any mask_mod ``f(b, h, q_idx, kv_idx)`` as a layout, with local query indices as flex_attention has.

    Its block classes are computed exactly, in chunks of bounded memory, when first bound: B H Lq Lk
    evaluations, once per prompt. B and H are 1 (or None) where f does not depend on them. f is never asked past
    Lq and Lk, so tensors it captures need no padding.
    """
    check_mod("f", f, "mask_mod")
    for name, value in (("B", B), ("H", H), ("Lq", Lq), ("Lk", Lk)):
        if value is not None or name in ("Lq", "Lk"):
            check_positive(name, value)
    return MaskMod(f, B or 1, H or 1, Lq, Lk)


def from_block_mask(block_mask: BlockMask) -> Layout:
    """Any BlockMask as a layout: its block lists, as they are now, and its mask_mod, whatever its block size."""
    if not isinstance(block_mask, BlockMask):
        raise TypeError(f"block_mask must be a BlockMask, got {type(block_mask).__name__}")
    return FromBlockMask(block_mask, block_mask_mod(block_mask))
