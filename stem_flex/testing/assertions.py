"""Assertions about BlockMasks: well formed, exact under compiled flex_attention, best for its budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask

from stem_flex import reference
from stem_flex.plumbing.ambient import without_autocast

_SHOWN = 5  # indices named in a failure


def block_mask_to_dense(block_mask: BlockMask) -> Tensor:
    """Token mask of a BlockMask: its lists and, in partial blocks, its mask_mod.

    Unlike ``create_mask(block_mask.mask_mod, ...)`` this is what compiled flex_attention computes. Reads
    tables of any width.

    Returns:
        bool (B, H, Lq, Lk) on the CPU, True = attend.
    """
    return reference.dense_mask(block_mask)


def assert_valid_block_mask(
    block_mask: BlockMask, *, check_classes: bool = True, allow_empty_rows: bool = False
) -> None:
    """Check that a BlockMask is what flex_attention's kernels take for granted.

    - int32 tables (B, H, Qb, width) and counts (B, H, Qb), the same for both lists, and equal strides: the
      TRITON template reads the full table with the partial table's strides;
    - counts within the width; of each row's first ``count`` indices: in range, strictly ascending, in one of
      the two lists only;
    - with ``check_classes``, against the mask_mod, which is evaluated on every pair of tokens, one row of
      query blocks at a time, out to a whole number of blocks as the kernels do: full blocks allow every pair,
      partial blocks some but not all, where tokens past the lengths count as not allowed;
    - with ``check_classes`` and unless ``allow_empty_rows``: a row keeps a block if the mask_mod allows any.

    Raises:
        AssertionError: naming the first rows or blocks that fail.
    """
    _check_tables(block_mask)
    partial, full = reference.dense_blocks(block_mask)
    both = partial & full
    assert not both.any(), f"blocks in both the partial and the full list, at (b, h, row, block) {_first(both)}"
    if not check_classes:
        return
    for row, classes in _row_classes(block_mask):
        for name, kept, wanted in (("partial", partial, 1), ("full", full, 2)):
            wrong = kept[:, :, row] & (classes != wanted)
            assert not wrong.any(), (
                f"row {row}: blocks in the {name} list that the mask_mod makes another class, "
                f"at (b, h, block) {_first(wrong)}: classes {classes[wrong][:_SHOWN].tolist()} "
                "(0 empty, 1 partial, 2 full)"
            )
        empty = (classes > 0).any(-1) & ~(partial | full)[:, :, row].any(-1)
        assert allow_empty_rows or not empty.any(), (
            f"row {row} keeps no block although the mask_mod allows some, at (b, h) {_first(empty)}"
        )


def _check_tables(m: BlockMask) -> None:
    q_block, k_block = m.BLOCK_SIZE
    Qb, Kb = -(-m.seq_lengths[0] // q_block), -(-m.seq_lengths[1] // k_block)
    assert (m.full_kv_num_blocks is None) == (m.full_kv_indices is None), "one full table without the other"
    tables = [("partial", m.kv_num_blocks, m.kv_indices)]
    if m.full_kv_num_blocks is not None and m.full_kv_indices is not None:
        tables.append(("full", m.full_kv_num_blocks, m.full_kv_indices))
    for name, counts, indices in tables:
        assert counts.dtype == indices.dtype == torch.int32, f"{name}: {counts.dtype}, {indices.dtype}, not int32"
        assert counts.shape == m.kv_num_blocks.shape, f"{name} counts {tuple(counts.shape)}"
        assert indices.shape == m.kv_indices.shape, f"{name} table {tuple(indices.shape)}"
        assert indices.shape[:-1] == counts.shape, f"{name}: {tuple(indices.shape)} for {tuple(counts.shape)}"
        assert counts.shape[2] == Qb, f"{name}: {counts.shape[2]} rows for {m.seq_lengths[0]} queries of {q_block}"
        width = indices.shape[-1]
        wrong = (counts < 0) | (counts > width)
        assert not wrong.any(), f"{name} counts outside [0, width {width}] at (b, h, row) {_first(wrong)}"
        used = torch.arange(width, device=indices.device) < counts[..., None]
        wrong = used & ((indices < 0) | (indices >= Kb))
        assert not wrong.any(), f"{name} indices outside [0, {Kb}) at (b, h, row, slot) {_first(wrong)}"
        wrong = used[..., 1:] & (indices[..., 1:] <= indices[..., :-1])
        assert not wrong.any(), f"{name} indices not ascending after (b, h, row, slot) {_first(wrong)}"
    strides = {_strides(indices) for _, _, indices in tables}
    assert len(strides) == 1, f"the partial and full tables differ in strides: {sorted(strides)}"


def _strides(x: Tensor) -> tuple[int, ...]:
    return tuple(stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1)


def _row_classes(m: BlockMask) -> Iterator[tuple[int, Tensor]]:
    """(row, int8 classes (B, H, Kb)) of the mask_mod, one row of query blocks at a time, on the CPU."""
    B, H, Qb = m.kv_num_blocks.shape
    (q_block, k_block), (Lq, Lk) = m.BLOCK_SIZE, m.seq_lengths
    Kb = -(-Lk // k_block)
    for row in range(Qb):

        def shifted(b: Tensor, h: Tensor, q: Tensor, kv: Tensor, start: int = row * q_block) -> Tensor:
            return m.mask_mod(b, h, q + start, kv)

        try:
            mask = create_mask(shifted, B, H, q_block, Kb * k_block, device=m.kv_indices.device).cpu().clone()
        except IndexError as error:
            raise AssertionError(
                f"the mask_mod must take indices up to whole blocks ({Kb * k_block} keys), as flex_attention asks: "
                f"{error}"
            ) from error
        mask[:, :, max(Lq - row * q_block, 0) :] = False
        mask[..., Lk:] = False
        counts = mask.view(B, H, q_block, Kb, k_block).sum(dim=(2, 4))
        yield row, (counts > 0).to(torch.int8) + (counts == q_block * k_block).to(torch.int8)


@without_autocast
def assert_matches_dense(
    block_mask: BlockMask,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    score_mod: Callable | None = None,
    backend: str | None = None,
) -> None:
    """Check compiled flex_attention under a BlockMask against dense masked softmax in float64.

    The tolerance is twice the largest error that PyTorch's own ``scaled_dot_product_attention`` makes in the
    inputs' dtype under the same dense mask, plus one unit in the last place of the largest output. Queries
    that may attend to nothing must give exactly 0.

    Args:
        q: (B, Hq, Lq, D). k: (B, Hkv, Lk, D). v: (B, Hkv, Lk, Dv), any float dtype and device.
        backend: of :func:`stem_flex.attention.sparse_prefill`; None is its default.

    Raises:
        AssertionError: naming the first elements that differ.
    """
    from stem_flex.attention import sparse_prefill

    got = sparse_prefill(q, k, v, block_mask, scale=scale, score_mod=score_mod, backend=backend or "auto")
    assert isinstance(got, Tensor)
    mask = block_mask_to_dense(block_mask).to(q.device)
    exact, _ = reference.masked_attention(q, k, v, mask, scale=scale, score_mod=score_mod)
    assert got.shape == exact.shape, f"output {tuple(got.shape)}, expected {tuple(exact.shape)}"
    assert got.dtype == q.dtype, f"output {got.dtype}, expected {q.dtype}"
    bound = 2 * _error(_low_precision(q, k, v, mask, scale, score_mod), exact)
    bound += torch.finfo(q.dtype).eps * float(exact.abs().max())
    nothing = ~mask.any(-1).expand(exact.shape[:3])
    wrong = nothing & (got != 0).any(-1)
    assert not wrong.any(), f"queries without a key are not 0, at (b, h, query) {_first(wrong)}"
    wrong = ~((got.double() - exact).abs() <= bound)
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} outputs are off by more than {bound:.3g} "
        f"(2x PyTorch's error in {q.dtype}; largest {_error(got, exact):.3g}), "
        f"at (b, h, query, d) {_first(wrong)}: "
        f"got {got[wrong][:_SHOWN].tolist()}, expected {exact[wrong][:_SHOWN].tolist()}"
    )


def _low_precision(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None, score_mod: Callable | None
) -> Tensor:
    if score_mod is not None:
        return reference.masked_attention(q, k, v, mask, scale=scale, score_mod=score_mod, dtype=None)[0]
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    mask = mask.expand(q.shape[0], q.shape[1], -1, -1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return torch.where(mask.any(-1, keepdim=True), out, 0)


def _error(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).abs().max()) if exact.numel() else 0.0


def assert_selection_optimal(
    block_mask: BlockMask,
    scores: Tensor,
    budget: int | Tensor,
    *,
    forced: Tensor | None = None,
    allowed: Tensor | None = None,
    atol: float = 0.0,
) -> None:
    """Check that every row keeps exactly its ``budget`` best blocks and the forced ones.

    All allowed blocks are ranked, forced ones too: higher score first, ties to the lower index, NaN last.

    Args:
        block_mask: the selection.
        scores: (B, H, Qb, Kb).
        budget: blocks of a row, int or int tensor broadcastable to (B, H, Qb); less than 1 counts as 1.
        forced: bool, broadcastable to scores' shape: kept whatever their score, where allowed. None: none.
        allowed: bool, broadcastable to scores' shape. None: where the score is not -inf.
        atol: 0 asks for this very set. Above, blocks closer than this to the budget's last score may be
            exchanged, for scores that were computed another way.

    Raises:
        AssertionError: naming the first row that differs, its blocks and their scores.
    """
    scores = scores.detach().double().cpu()
    legal = (~scores.isneginf() if allowed is None else allowed.cpu()).broadcast_to(scores.shape)
    needed = legal & (torch.tensor(False, dtype=torch.bool, device="cpu") if forced is None else forced.cpu())
    given = budget if isinstance(budget, Tensor) else torch.tensor(budget, dtype=torch.int64, device="cpu")
    budgets = given.cpu().broadcast_to(scores.shape[:3])
    partial, full = reference.dense_blocks(block_mask)
    keep = (partial | full).broadcast_to(scores.shape)
    for b, h, i in torch.cartesian_prod(*(torch.arange(size, device="cpu") for size in scores.shape[:3])).tolist():
        row = scores[b, h, i].tolist()
        candidates = legal[b, h, i].nonzero().flatten().tolist()
        must = set(needed[b, h, i].nonzero().flatten().tolist())
        kept = set(keep[b, h, i].nonzero().flatten().tolist())
        ranked = reference.rank(row, candidates)
        best = set(ranked[: max(int(budgets[b, h, i]), 1)])
        where = f"row (b, h, I) = {(b, h, i)}, budget {int(budgets[b, h, i])}"
        assert must <= kept, f"{where}: forced blocks {sorted(must - kept)} are missing"
        assert kept <= set(candidates), f"{where}: blocks {sorted(kept - set(candidates))} are not allowed"
        missing, extra = sorted((best | must) - kept), sorted(kept - (best | must))
        if atol:
            limit = row[ranked[len(best) - 1]] if best else float("inf")
            near = abs(len(missing) - len(extra)) <= len(must)
            missing = [J for J in missing if not abs(row[J] - limit) <= atol]
            extra = [J for J in extra if not (near and abs(row[J] - limit) <= atol)]
        assert not missing, f"{where}: better blocks left out: {[(J, row[J]) for J in missing[:_SHOWN]]}"
        assert not extra, f"{where}: blocks kept beyond the budget: {[(J, row[J]) for J in extra[:_SHOWN]]}"


def _first(wrong: Tensor) -> list:
    return [tuple(index) for index in wrong.nonzero()[:_SHOWN].tolist()]
