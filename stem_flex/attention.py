"""Sparse prefill: compiled flex_attention under a Stem BlockMask, never eager, never dense by surprise."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from stem_flex.budget import Budget, causal_density
from stem_flex.config import CORRECTIONS, StemConfig
from stem_flex.diagnostics.selftest import check_block_lists
from stem_flex.layout import Layout
from stem_flex.mask import stem_block_mask
from stem_flex.plumbing import means
from stem_flex.plumbing.ambient import cast_as_sdpa, refuse_transforms, without_autocast
from stem_flex.plumbing.backend import Decision, choose, kernel_options
from stem_flex.plumbing.binding import BoundLayout
from stem_flex.plumbing.captured import captured_values, code_of
from stem_flex.plumbing.checks import check_config, check_mask_of, check_options, check_qkv, check_scale
from stem_flex.plumbing.compiled import based, compiled, from_constant, to_constant
from stem_flex.plumbing.dense import dense_causal
from stem_flex.plumbing.sharded import by_heads
from stem_flex.selectors import Selector


@by_heads
def stem_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig | None = None,
    *,
    layout: Layout | BoundLayout | None = None,
    q_offset: int | Tensor = 0,
    prompt_len: int | Tensor | None = None,
    kv_len: int | Tensor | None = None,
    scale: float | None = None,
    score_mod: Callable | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    selector: str | Selector | None = None,
    budget: int | Tensor | Budget | None = None,
    options: dict | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the key blocks that Stem keeps: ``softmax(q k^T scale) v``, block-sparse and compiled.

    Args:
        q, k, v, config, layout, q_offset, prompt_len, kv_len, selector, budget: see
            :func:`stem_flex.stem_block_mask`; DTensors spread by heads give one placed as they are. Values past
            ``kv_len`` or in padding must be finite: flex_attention multiplies them by zero.
        scale: of the logits, None is 1 / sqrt(D). The choice of blocks does not depend on it.
        score_mod: flex_attention's, applied to kept pairs. Each float that it or a mask_mod reads, with "flash" each
            number, is compiled in: pass what changes in tensors.
        backend: "triton" and "flash" (flash-attn-4) on CUDA, "cpu" on the CPU: an explicit one runs the sparse
            path or raises. "auto" takes the fastest that serves the call, and on CUDA runs plain causal prompts
            densely where that is at least as fast; :func:`stem_flex.explain` tells which and why.
        return_lse: also the natural-log sum of exponentials of the kept logits, float32 (B, Hq, Lq). Not on CPU.
        options: flex_attention kernel options that override the measured ones of ``stem_flex.plumbing.backend``.

    Returns:
        (B, Hq, Lq, Dv) in q's dtype; with ``return_lse`` a pair. A query that may attend to nothing (padding)
        gives zeros, and -inf. Under autocast q, k and v are cast to its dtype first, as SDPA does.

    Raises:
        TypeError, ValueError: naming the argument, what was expected, what came, and the fix.
        RuntimeError: flex_attention would run eagerly, which is dense: compilation is switched off, or one
            signature met more than the recompile limit of variants, or more than 64 sets of numbers.

    On CUDA gradients flow to q, k, v through the kept pairs with backend "triton"; none through the choice.
    """
    config = check_config(config)
    q, k, v = cast_as_sdpa(q, k, v)
    check_qkv(q, k, v)
    decision = explain(
        q,
        k,
        v,
        config,
        layout=layout,
        q_offset=q_offset,
        prompt_len=prompt_len,
        kv_len=kv_len,
        score_mod=score_mod,
        backend=backend,
        return_lse=return_lse,
        selector=selector,
        budget=budget,
    )
    if decision.dense and not options:
        check_scale(scale)
        return without_autocast(dense_causal)(q, k, v, scale=scale, kernel=decision.backend)
    block_mask = stem_block_mask(
        q,
        k,
        v,
        config,
        layout=layout,
        q_offset=q_offset,
        prompt_len=prompt_len,
        kv_len=kv_len,
        selector=selector,
        budget=budget,
        compute_q_blocks=_needs_grad(q, k, v, score_mod),
    )
    return sparse_prefill(
        q,
        k,
        v,
        block_mask,
        scale=scale,
        score_mod=score_mod,
        backend=backend,
        return_lse=return_lse,
        options=options,
        correction=config.correction,
    )


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig | None = None,
    *,
    layout: Layout | BoundLayout | None = None,
    q_offset: int | Tensor = 0,
    prompt_len: int | Tensor | None = None,
    kv_len: int | Tensor | None = None,
    score_mod: Callable | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    selector: str | Selector | None = None,
    budget: int | Tensor | Budget | None = None,
) -> Decision:
    """What :func:`stem_attention` would run for these arguments, and why. Runs nothing.

    Returns:
        ``Decision(backend, dense, reason)``: the backend's name ("triton", "flash", "cpu"; for a dense run the
        dense kernel's), whether plain dense causal attention takes the sparse path's place, and a sentence.

    Raises:
        ValueError, ImportError: an explicit backend can't serve the call: the reason and the fix.
    """
    q, k, v = cast_as_sdpa(q, k, v)
    check_qkv(q, k, v)
    config = check_config(config)
    plain = (
        (layout is None or (isinstance(layout, Layout) and layout.plain_causal))
        and _is_int(q_offset, 0)
        and q.shape[2] == k.shape[2]
        and (kv_len is None or _is_int(kv_len, k.shape[2]))
        and (prompt_len is None or _is_int(prompt_len, q.shape[2]))
        and score_mod is None
        and not return_lse
        and selector is None
        and budget is None
    )
    # what a threshold keeps is known from the scores alone: from the shortest length on it is worth a try
    blocks = -(-q.shape[2] // config.key_block)
    density = functools.partial(causal_density, blocks, config) if config.budget == "tpd" else (lambda: 0.0)
    return choose(
        q,
        v,
        backend=backend,
        block_size=(config.query_block, config.key_block),
        plain_density=density if plain else None,
        needs_grad=_needs_grad(q, k, v, score_mod),
        return_lse=return_lse,
    )


def sparse_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask,
    *,
    scale: float | None = None,
    score_mod: Callable | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    options: dict | None = None,
    correction: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compiled flex_attention under any BlockMask, one compiled function for each kind of call.

    Arguments as in :func:`stem_attention`; "auto" never replaces the mask by dense attention here. Two
    compilations serve all lengths of a kind of call: on TRITON multiples of 128 and others, elsewhere the first and
    all later ones. A mask_mod or score_mod that reads a float (on FLASH any number) has them for each value, on TRITON
    up to four.

    With ``correction="mean"`` dropped blocks are one token each (:mod:`stem_flex.plumbing.means`), forward only: on
    CUDA by a second call over the means, always TRITON's, merged by log-sum-exp; on the CPU, which has none, behind the
    keys of one call.

    Raises:
        ValueError: the BlockMask does not fit q and k, or the backend or the correction can't serve the call.
        RuntimeError: flex_attention would run eagerly.
    """
    q, k, v = cast_as_sdpa(q, k, v)
    run = _sparse_prefill if correction is None else _corrected_prefill
    if correction not in CORRECTIONS:
        raise ValueError(f"correction must be one of {CORRECTIONS}, got {correction!r}")
    return run(q, k, v, block_mask, scale, score_mod, backend, return_lse, options)


@without_autocast
def _corrected_prefill(q, k, v, block_mask, scale, score_mod, backend, return_lse, options) -> Any:
    check_qkv(q, k, v)
    check_mask_of(q, k, block_mask)
    means.refuse_correction(block_mask, score_mod, _needs_grad(q, k, v, score_mod))
    if not q.is_cuda:
        more = means.behind(q, k, v, block_mask)
        given = scale, more.score_mod, backend, return_lse, options
        return _sparse_prefill(q, more.k, more.v, more.mask, *given, each_size=True)
    out, lse = _sparse_prefill(q, k, v, block_mask, scale, None, backend, True, options)
    more = means.alone(q, k, v, block_mask)
    other, other_lse = _sparse_prefill(q, more.k, more.v, more.mask, scale, None, "triton", True, None)
    out, lse = means.merged(out, lse, other, other_lse + math.log(block_mask.BLOCK_SIZE[1]))
    return (out, lse) if return_lse else out


@without_autocast
def _sparse_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask,
    scale: float | None,
    score_mod: Callable | None,
    backend: str,
    return_lse: bool,
    options: dict | None,
    each_size: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``each_size``: compile anew for each, since the C++ template mistakes sizes of means' tables for the keys'."""
    check_qkv(q, k, v)
    refuse_transforms(q, k, v)
    check_mask_of(q, k, block_mask)
    check_options(scale, score_mod, options)
    needs_grad = _needs_grad(q, k, v, score_mod)
    block_size = (block_mask.BLOCK_SIZE[0], block_mask.BLOCK_SIZE[1])
    name = choose(
        q,
        v,
        backend=backend,
        block_size=block_size,
        plain_density=None,
        needs_grad=needs_grad,
        return_lse=return_lse,
    ).backend
    merged = kernel_options(name, q, k, v, block_size)
    if options:
        merged = {key: value for key, value in merged.items() if key.removeprefix("fwd_") not in options} | options
    if needs_grad and block_mask.q_indices is None:
        raise ValueError(
            "block_mask has no query tables, which gradients need; build it with compute_q_blocks=True, "
            "or call under torch.no_grad()"
        )
    # not is_compiling(), which other threads see too while one compiles: they would run eagerly
    if torch.compiler.is_dynamo_compiling():
        return _flex(q, k, v, block_mask, block_size, scale, score_mod, return_lse, merged)
    if not needs_grad:  # gradients need the views themselves
        q, k, v = based(q, k, v)
    if name == "flash":
        check_block_lists(_flash, q, k, v)
    kind = (name, q.dtype, q.shape[0] == 1, q.shape[1], *k.shape[1::2], v.shape[3], return_lse, needs_grad)
    # Numbers that vary are Inductor's inputs, which no kernel takes as floats, and FLASH not at all: constants, then.
    constants = (int, float) if name == "flash" else (float,)
    size = tuple(map(to_constant, block_size))
    merged = {key: to_constant(value) for key, value in merged.items()}
    mods = [code_of(mod, constants) for mod in (block_mask.mask_mod, score_mod)]
    kind = (*kind, size, *(mod.code for mod in mods), scale, *sorted(merged.items()))
    numbers = tuple(mod.numbers for mod in mods) if any(mod.fixed for mod in mods) else None
    # IS_DIVISIBLE tells TRITON's kernel what a fixed length would; dynamic=True would leave floats open
    dynamic = True if name == "triton" and numbers is None else False if each_size else None
    return compiled(_flex, kind, dynamic, numbers)(q, k, v, block_mask, size, scale, score_mod, return_lse, merged)


def _flash(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> Tensor:
    options = kernel_options("flash", q, k, v, (128, 128))
    size = (to_constant(128), to_constant(128))
    return compiled(_flex, ("self-test", *q.shape, *k.shape, v.shape[3], q.dtype))(
        q, k, v, block_mask, size, None, None, False, options
    )


def _flex(q, k, v, block_mask, block_size, scale, score_mod, return_lse, options) -> Any:
    if not torch.compiler.is_dynamo_compiling():
        raise RuntimeError(
            "flex_attention would run eagerly, which ignores the block lists and attends to everything; "
            "torch.compile is switched off: unset TORCHDYNAMO_DISABLE / TORCH_COMPILE_DISABLE, or leave "
            "torch.compiler.disable"
        )
    given: Any = {name: from_constant(value) for name, value in options.items()}
    block_size = (from_constant(block_size[0]), from_constant(block_size[1]))
    tables: dict[str, Any] = {name: getattr(block_mask, name) for name in _TABLES}
    out: Any = flex_attention(
        q,
        k,
        v,
        score_mod=score_mod,
        block_mask=BlockMask(BLOCK_SIZE=block_size, **tables),
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        kernel_options=given,
        return_aux=AuxRequest(lse=True) if return_lse else None,
    )
    if not return_lse:
        return out
    lse = out[1].lse
    # PyTorch before it told FLASH's natural logarithms from TRITON's binary ones rescaled both
    return out[0], lse / math.log(2) if options.get("BACKEND") == "FLASH" and not _LSE_BY_BACKEND else lse


_TABLES = (
    "seq_lengths",
    "mask_mod",
    *(f"{full}{of}_{what}" for full in ("", "full_") for of in ("kv", "q") for what in ("num_blocks", "indices")),
)
_LSE_BY_BACKEND = any("stats_are_log2" in getattr(c, "co_varnames", ()) for c in flex_attention.__code__.co_consts)


def _needs_grad(q: Tensor, k: Tensor, v: Tensor, score_mod: Callable | None) -> bool:
    """Whether anything that the output depends on by a gradient needs one, parameters of score_mod included."""
    if not torch.is_grad_enabled():
        return False
    if q.requires_grad or k.requires_grad or v.requires_grad:
        return True
    if score_mod is None or torch.compiler.is_compiling():  # PyTorch's own checks then
        return False
    return any(isinstance(x, Tensor) and x.requires_grad for x in captured_values(score_mod))


def _is_int(value: object, expected: int) -> bool:
    return not isinstance(value, Tensor) and value == expected
