"""Context parallel prefill: the rows of one prompt on several cards, each row's blocks chosen as on one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from stem_flex.attention import sparse_prefill
from stem_flex.budget import Blocks, Budget
from stem_flex.config import StemConfig
from stem_flex.distributed.agreement import TIMEOUT, Meeting
from stem_flex.distributed.exchange import check_group, exchange, fingerprint, group_of, placed
from stem_flex.distributed.split import Split
from stem_flex.layout import Layout, causal
from stem_flex.mask import stem_block_mask
from stem_flex.plumbing.backend import choose
from stem_flex.plumbing.binding import BoundLayout
from stem_flex.plumbing.checks import check_config, check_qkv, check_scale
from stem_flex.plumbing.implementation import resolve as resolve_impl
from stem_flex.plumbing.slices import rows_of
from stem_flex.selectors import Selector, resolve

_NAME = "context_prefill"


class _Prepared(NamedTuple):
    """What one rank needs before any data moves: nothing after it allocates until the keys are here."""

    q: Tensor
    k: Tensor  # (tokens, B, Hkv, D), this rank's rows in their places
    v: Tensor
    bound: BoundLayout
    config: StemConfig
    selector: Selector
    facts: dict[str, Any]


def context_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig | None = None,
    *,
    split: Split,
    key_split: Split | None = None,
    group: dist.ProcessGroup | None = None,
    layout: Layout | None = None,
    q_offset: int | Tensor = 0,
    prompt_len: int | Tensor | None = None,
    kv_len: int | Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    selector: str | Selector | None = None,
    budget: int | Tensor | Budget | None = None,
    impl: str = "auto",
    timeout: float = TIMEOUT,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`stem_flex.stem_attention` of one prompt whose rows lie on several ranks. Collective, inference only.

    Each rank passes its own rows of q, k and v and gets its own rows back. Keys and values travel to every rank (bf16
    with 8 heads of 128 at 512K tokens: 2 GiB), queries stay. Each rank scores its rows against all keys, with the
    value statistics of all of them, so that it keeps the blocks that one card would, and attends sparsely. Short
    prompts are not sent to a dense kernel, as ``stem_attention`` may do.

    Args:
        q: (B, Hq, rows, D), the rank's rows of the prompt, ``split.shard(whole, rank)``.
        k: (B, Hkv, rows, D), the rank's rows of the keys; v: (B, Hkv, rows, Dv).
        config: None means ``StemConfig()``.
        split: which rows each rank holds, :func:`balanced` or :func:`zigzag`, the same on every rank. Ranges begin
            at multiples of ``config.query_block``.
        key_split: of the keys where they are not the queries: in chunked prefill ``earlier.then(split)``.
        group: process group, None is the default one. NCCL for CUDA tensors, gloo for the CPU's.
        layout, q_offset, prompt_len, kv_len: of the whole prompt, as one card would be given them.
        scale, backend, return_lse, selector, impl: see :func:`stem_flex.stem_attention`; the same on every rank.
        budget: of the whole prompt too: a tensor's last dimension are all of its query blocks.
        timeout: seconds to wait for the other ranks.

    Returns:
        (B, Hq, rows, Dv), the rank's rows; with ``return_lse`` also float32 (B, Hq, rows).
        :func:`unshard` brings all of them to every rank.

    Raises:
        TypeError, ValueError: naming the argument, what was expected, what came, and the fix; or what differs between
            the ranks.
        RuntimeError: another rank failed, before or while it computed, with its message; or it did not come in time.

    Every rank raises in the same call, if one does. For that the hosts exchange a word before keys are sent and once
    attention is queued; no device is waited for. An error that a kernel reports later is the process's own.
    """
    group = group_of(group)
    rank = dist.get_rank(group)
    meeting = Meeting.of(group)

    def prepare() -> _Prepared:
        keys = split if key_split is None else key_split
        check_group(group, split, q.device)
        check_group(group, keys, q.device)
        return _prepare(
            rank, q, k, v, config, split, keys, layout, q_offset, prompt_len, kv_len, scale, backend, return_lse,
            selector, budget, impl,
        )  # fmt: skip

    known = meeting.agree(_NAME, timeout, prepare, lambda x: x.facts)

    def compute() -> tuple[Tensor, ...]:
        exchange((known.k, known.v), split if key_split is None else key_split, group)
        attend = _attend(known, scale, backend, return_lse, budget, impl)
        parts = [attend(first, last) for first, last in split.ranges[rank]]
        return tuple(x[0] if len(x) == 1 else torch.cat(x, 2) for x in zip(*parts, strict=True))

    found = meeting.agree(_NAME, timeout, compute, lambda _: {})
    return (found[0], found[1]) if return_lse else found[0]


def _prepare(
    rank, q, k, v, config, split, keys, layout, q_offset, prompt_len, kv_len, scale, backend, return_lse, selector,
    budget, impl,
) -> _Prepared:  # fmt: skip
    check_qkv(q, k, v)
    check_scale(scale)
    selector = resolve(selector)
    config = selector.configured(check_config(config))
    _check_rows(rank, q, k, split, keys, config)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("q, k and v must not need gradients: none flow between ranks; use torch.no_grad()")
    blocks = (config.query_block, config.key_block)
    choose(q, v, backend=backend, block_size=blocks, plain_density=None, needs_grad=False, return_lse=return_lse)
    resolve_impl(impl, q)
    layout = causal() if layout is None else layout
    if not isinstance(layout, Layout):
        raise TypeError(f"layout must come from stem_flex.layout, got {type(layout).__name__}")
    bound = layout.bind(
        q.shape[0],
        q.shape[1],
        split.tokens,
        keys.tokens,
        q_offset=q_offset,
        prompt_len=prompt_len,
        kv_len=kv_len,
        block_size=blocks,
        device=q.device,
    )
    facts = {
        "batch, heads and head dims": (*q.shape[:2], k.shape[1], q.shape[3], v.shape[3]),
        "dtype": q.dtype,
        "split": fingerprint(split),
        "key_split": fingerprint(keys),
        "config": config,
        "layout": " & ".join(type(part).__name__ for part in layout.parts()),
        "q_offset": _plain(q_offset),
        "prompt_len": _plain(prompt_len),
        "kv_len": _plain(kv_len),
        "scale": scale,
        "backend": backend,
        "return_lse": return_lse,
        "selector": selector.name,
        "budget": _plain(budget),
        "impl": impl,
    }
    return _Prepared(q.detach(), placed(k, keys, rank), placed(v, keys, rank), bound, config, selector, facts)


def _check_rows(rank: int, q: Tensor, k: Tensor, split: Split, keys: Split, config: StemConfig) -> None:
    for name, x, own in (("q", q, split), ("k", k, keys)):
        if x.shape[2] != own.rows(rank):
            raise ValueError(
                f"{name} must have the {own.rows(rank)} rows that rank {rank} holds of {own.tokens}, got {x.shape[2]}; "
                f"pass split.shard({name}, rank)"
            )
    begun = [start for own in split.ranges for start, _ in own if start % config.query_block]
    if begun:
        raise ValueError(
            f"split must begin its ranges at multiples of the query block, {config.query_block} tokens, got one at "
            f"{begun[0]}; make it with this config"
        )


def _plain(value: object) -> str:
    """A value in a word; of tensors, which are not waited for, the shape."""
    if isinstance(value, Blocks):
        value = value.blocks
    if isinstance(value, Tensor):
        return f"{value.dtype} of {tuple(value.shape)}"
    return type(value).__name__ if isinstance(value, Budget) else str(value)


def _attend(
    known: _Prepared,
    scale: float | None,
    backend: str,
    return_lse: bool,
    budget: int | Tensor | Budget | None,
    impl: str,
) -> Callable[[int, int], tuple[Tensor, ...]]:
    """Attention of one range of the rank's rows, ranges in order."""
    k, v = (x.movedim(0, 2) for x in (known.k, known.v))
    block = known.config.query_block
    done = 0

    def attend(start: int, end: int) -> tuple[Tensor, ...]:
        nonlocal done
        q = known.q[:, :, done : done + end - start]
        done += end - start
        first, last = start // block, -(-end // block)
        mask = stem_block_mask(
            q,
            k,
            v,
            known.config,
            layout=rows_of(known.bound, first, last),
            selector=known.selector,
            budget=_rows_budget(budget, first, last),
            impl=impl,
        )
        out = sparse_prefill(q, k, v, mask, scale=scale, backend=backend, return_lse=return_lse)
        return out if isinstance(out, tuple) else (out,)

    return attend


def _rows_budget(budget: int | Tensor | Budget | None, first: int, last: int) -> int | Tensor | Budget | None:
    """What is given for every query block, for the blocks [first, last)."""
    given = budget.blocks if isinstance(budget, Blocks) else budget
    if isinstance(given, Tensor) and given.dim() and given.shape[-1] != 1:
        return given[..., first:last]
    return budget
