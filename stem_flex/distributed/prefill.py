"""Context parallel prefill: the rows of one prompt on several cards, each row's blocks chosen as on one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class _Options:
    """What :func:`context_prefill` is asked for; the names are its own."""

    split: Split
    key_split: Split
    layout: Layout
    q_offset: int | Tensor
    prompt_len: int | Tensor | None
    kv_len: int | Tensor | None
    scale: float | None
    backend: str
    return_lse: bool
    selector: str | Selector | None
    budget: int | Tensor | Budget | None
    impl: str


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
    options = _Options(
        split, split if key_split is None else key_split, causal() if layout is None else layout, q_offset, prompt_len,
        kv_len, scale, backend, return_lse, selector, budget, impl,
    )  # fmt: skip

    def prepare() -> _Prepared:
        check_qkv(q, k, v)
        check_group(group, options.split, q.device)
        check_group(group, options.key_split, q.device)
        return _prepare(rank, q, k, v, check_config(config), options)

    known = meeting.agree(_NAME, timeout, prepare, lambda x: x.facts)

    def compute() -> tuple[Tensor, ...]:
        exchange((known.k, known.v), options.key_split, group)
        return _attend(known, options, split.ranges[rank])

    found = meeting.agree(_NAME, timeout, compute, lambda _: {})
    return (found[0], found[1]) if return_lse else found[0]


def _prepare(rank: int, q: Tensor, k: Tensor, v: Tensor, config: StemConfig, options: _Options) -> _Prepared:
    split, keys, layout = options.split, options.key_split, options.layout
    selector = resolve(options.selector, config)
    config = selector.configured(config)
    blocks = (config.query_block, config.key_block)
    check_scale(options.scale)
    _check_rows(rank, q, k, split, keys, config.query_block)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("q, k and v must not need gradients: none flow between ranks; use torch.no_grad()")
    choose(
        q,
        v,
        backend=options.backend,
        block_size=blocks,
        plain_density=None,
        needs_grad=False,
        return_lse=options.return_lse,
    )
    resolve_impl(options.impl, q)
    if not isinstance(layout, Layout):
        raise TypeError(f"layout must come from stem_flex.layout, got {type(layout).__name__}")
    bound = layout.bind(
        q.shape[0],
        q.shape[1],
        split.tokens,
        keys.tokens,
        q_offset=options.q_offset,
        prompt_len=options.prompt_len,
        kv_len=options.kv_len,
        block_size=blocks,
        device=q.device,
    )
    facts = {
        "batch, heads and head dims": (*q.shape[:2], k.shape[1], q.shape[3], v.shape[3]),
        "dtype": q.dtype,
        "split": fingerprint(split),
        "key_split": fingerprint(keys),
        "selector": selector.name,
        "config": config,
        "layout": " & ".join(type(part).__name__ for part in layout.parts()),
    }
    for name in ("q_offset", "prompt_len", "kv_len", "scale", "backend", "return_lse", "budget", "impl"):
        facts[name] = _in_words(getattr(options, name))
    return _Prepared(q.detach(), placed(k, keys, rank), placed(v, keys, rank), bound, config, selector, facts)


def _check_rows(rank: int, q: Tensor, k: Tensor, split: Split, keys: Split, block: int) -> None:
    for name, x, own in (("q", q, split), ("k", k, keys)):
        if x.shape[2] != own.rows(rank):
            raise ValueError(
                f"{name} must have the {own.rows(rank)} rows that rank {rank} holds of {own.tokens}, got {x.shape[2]}; "
                f"pass split.shard({name}, rank)"
            )
    begun = [start for own in split.ranges for start, _ in own if start % block]
    if begun:
        raise ValueError(
            f"split must begin its ranges at multiples of the query block, {block} tokens, got one at {begun[0]}; "
            "make it with this config"
        )


def _in_words(value: object) -> str:
    """Of a tensor, whose values are not waited for, the shape."""
    if isinstance(value, Blocks):
        value = value.blocks
    if isinstance(value, Tensor):
        return f"{value.dtype} of {tuple(value.shape)}"
    return type(value).__name__ if isinstance(value, Budget) else str(value)


def _attend(known: _Prepared, options: _Options, ranges: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
    """Output, and lse where it is asked for, of the rank's ranges of rows one after the other."""
    k, v = (x.movedim(0, 2) for x in (known.k, known.v))
    block = known.config.query_block
    parts: list[tuple[Tensor, ...]] = []
    done = 0
    for start, end in ranges:
        q = known.q[:, :, done : done + end - start]
        first, last = start // block, -(-end // block)
        mask = stem_block_mask(
            q,
            k,
            v,
            known.config,
            layout=rows_of(known.bound, first, last),
            selector=known.selector,
            budget=_rows_budget(options.budget, first, last),
            impl=options.impl,
        )
        out = sparse_prefill(
            q,
            k,
            v,
            mask,
            scale=options.scale,
            backend=options.backend,
            return_lse=options.return_lse,
            correction=known.config.correction,
        )
        parts.append(out if isinstance(out, tuple) else (out,))
        done += end - start
    return tuple(x[0] if len(x) == 1 else torch.cat(x, 2) for x in zip(*parts, strict=True))


def _rows_budget(budget: Any, first: int, last: int) -> int | Tensor | Budget | None:
    """What is given for every query block, for the blocks [first, last)."""
    given = getattr(budget, "blocks", budget)
    if isinstance(given, Tensor) and given.dim() and given.shape[-1] != 1:
        return given[..., first:last]
    return budget
