"""The attention function of the transformers integration: which path a layer takes, and the paths."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from stem_flex.attention import explain, sparse_prefill
from stem_flex.integrations.hf_fallback import attends_causally, fallback_attention
from stem_flex.integrations.hf_masks import StemMask
from stem_flex.integrations.hf_settings import is_prefill, raw_settings, read_settings
from stem_flex.integrations.hf_trace import record
from stem_flex.mask import stem_block_mask
from stem_flex.plumbing.ambient import cast_as_sdpa, without_autocast
from stem_flex.plumbing.backend import flash_refusal
from stem_flex.plumbing.dense import dense_causal
from stem_flex.plumbing.tables import block_classes

MODE = "stem_flex_mode"  # attribute of an attention module: "stem" or "dense"


def stem_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: StemMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in every attention layer under ``attn_implementation="stem_flex"``.

    Args:
        module: the attention module; ``layer_idx`` and :data:`MODE` choose between Stem and dense.
        query: (B, Hq, Lq, D), after position encoding; key (B, Hkv, Lk, D), value (B, Hkv, Lk, Dv) after the
            cache's update, heads not repeated.
        attention_mask: what :func:`~stem_flex.integrations.hf_masks.stem_mask` made.
        dropout, scaling: as transformers has them.
        kwargs: ``softcap`` and ``s_aux`` (attention sinks) are honoured, what changes the result in another
            way is refused.

    Returns:
        (B, Lq, Hq, Dv), and None for the attention weights, which no path computes.

    Raises:
        ValueError, NotImplementedError: naming what is not served and what to use instead.
    """
    _refuse(kwargs)
    # This test stays outside what is hidden from the compiler, so that decode compiles whole.
    if isinstance(attention_mask, StemMask):
        prefill: Any = _prefill  # the decorator is typed as a factory
        return prefill(module, query, key, value, attention_mask, dropout, scaling, kwargs), None
    if not torch.compiler.is_compiling():
        _warn_dense_prefill(module, query, key, attention_mask, kwargs)
    return fallback_attention(module, query, key, value, attention_mask, dropout, scaling, kwargs)


def _refuse(kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions"):
        raise ValueError(
            "output_attentions=True needs attention weights, which stem_flex never computes; "
            "use model.set_attn_implementation('eager')"
        )
    for name in ("indices", "block_indices"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"the model selects its own keys (attention argument {name!r}), which stem_flex would overrule; "
                "use model.set_attn_implementation('sdpa' or 'eager')"
            )


@torch.compiler.disable
def _prefill(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: StemMask,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> Tensor:
    if dropout:
        raise ValueError(
            f"dropout must be 0 in a stem_flex prefill, got {dropout}; call model.eval(), or set "
            "config.attention_dropout = 0"
        )
    for name in ("position_bias", "head_mask", "layer_head_mask"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"stem_flex does not serve attention with {name}; use model.set_attn_implementation('sdpa' or 'eager')"
            )
    if not attends_causally(module, kwargs, default=True):
        raise NotImplementedError(
            f"{type(module).__name__} has is_causal=False, but the mask that its model made is not bidirectional, and "
            "attention implementations disagree on which of them counts; for bidirectional attention set "
            "model.config.is_causal = False, else leave is_causal of attention modules as it was"
        )
    mask.check(query, key)
    out = _chosen_path(module, *cast_as_sdpa(query, key, value), mask.to(query.device), scaling, kwargs)
    inputs = [x for x in (query, key, value, kwargs.get("s_aux")) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        out = _NoBackward.apply(out, *inputs)
    return out.transpose(1, 2).contiguous()


@without_autocast
def _chosen_path(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: StemMask,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """(B, Hq, Lq, Dv) by the dense kernel, the exact mask, or Stem's."""
    q, k, v = query.detach(), key.detach()[:, :, : mask.used_keys], value.detach()[:, :, : mask.used_keys]
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    sinks = None if sinks is None else sinks.detach()
    stem = mask.kind in ("causal", "packed") and _mode(module, mask) == "stem"
    kernel = _dense_kernel(q, k, v, mask, stem) if softcap is None and sinks is None else None
    if kernel is not None:
        record(module, "dense", q, k)
        return dense_causal(q, k, v, scale=scaling, kernel=kernel)
    block_mask = _selected(q, k, v, mask) if stem else _exact(mask)
    correction = mask.settings.config.correction if stem else None
    record(module, "stem" if stem else "exact", q, k, block_mask if stem else None)
    return _attend(q, k, v, block_mask, scaling, softcap, sinks, correction)


def _dense_kernel(q: Tensor, k: Tensor, v: Tensor, mask: StemMask, stem: bool) -> str | None:
    """The fastest dense kernel, where a plain causal prompt is to be dense, or is as fast dense on CUDA."""
    whole = mask.kind == "causal" and mask.start is None and mask.offset == 0 and k.shape[2] == q.shape[2]
    whole = whole and v.shape[3] == q.shape[3]
    if q.device.type == "cpu":
        return "cpu" if whole and not stem else None
    half = q.dtype in (torch.float16, torch.bfloat16)
    if not (q.is_cuda and half and whole and q.shape[3] <= 256):
        return None
    if not stem:
        return "flash-attn-4" if flash_refusal(q, v, (128, 128), False) is None else "cudnn"
    if mask.settings.min_tokens == 0 or mask.prompt_len is not None:
        return None
    settings = mask.settings
    decision = explain(q, k, v, settings.config, selector=settings.selector, budget=settings.budget)
    return decision.backend if decision.dense else None


def _mode(module: torch.nn.Module, mask: StemMask) -> str:
    mode = getattr(module, MODE, None)
    if mode is None:
        mode = "dense" if getattr(module, "layer_idx", None) in mask.settings.dense_layers else "stem"
    if mode not in ("stem", "dense"):
        raise ValueError(f"{MODE} of {type(module).__name__} must be 'stem' or 'dense', got {mode!r}")
    return mode


def _selected(query: Tensor, key: Tensor, value: Tensor, mask: StemMask) -> BlockMask:
    return stem_block_mask(
        query,
        key,
        value,
        mask.settings.config,
        layout=mask.layout,
        q_offset=mask.query_offset,
        prompt_len=mask.prompt_len,
        kv_len=mask.kv_len,
        selector=mask.settings.selector,
        budget=mask.settings.budget,
    )


def _exact(mask: StemMask) -> BlockMask:
    config = mask.settings.config
    return mask.structure((config.query_block, config.key_block))


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    correction: str | None,
) -> Any:
    score_mod = None if softcap is None else _softcap(float(softcap))
    attend = functools.partial(
        sparse_prefill, query, key, value, block_mask, scale=scaling, score_mod=score_mod, correction=correction
    )
    if sinks is None:
        return attend()
    if query.device.type == "cpu":  # compiled CPU flex_attention cannot return the lse
        if correction is not None:
            raise ValueError(f"correction={correction!r} does not serve attention sinks on the CPU; use None, or CUDA")
        return _sink_attention_rows(query, key, value, block_mask, scaling, softcap, sinks)
    out, lse = attend(return_lse=True)
    # A sink is one more key of logit s and value 0: the softmax over the rest shrinks by e^lse / (e^lse + e^s).
    return (out * torch.sigmoid(lse - sinks.float().view(1, -1, 1)).unsqueeze(-1)).to(out.dtype)


@functools.lru_cache(maxsize=16)
def _softcap(cap: float):
    def softcap_score(score, b, h, q, kv):
        return cap * torch.tanh(score / cap)

    return softcap_score


@without_autocast
def _sink_attention_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor,
) -> Tensor:
    """Attention with sinks under a BlockMask, lists and mask_mod, in plain PyTorch, some rows at a time."""
    batch, heads, queries, dim = query.shape
    keys = key.shape[2]
    q_block, k_block = block_mask.BLOCK_SIZE
    classes = block_classes(block_mask)
    group = heads // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1).float() for x in (key, value))
    b = torch.arange(batch, device=query.device).view(-1, 1, 1, 1)
    h = torch.arange(heads, device=query.device).view(1, -1, 1, 1)
    kv = torch.arange(keys, device=query.device)
    out = torch.empty(batch, heads, queries, value.shape[-1], dtype=query.dtype, device=query.device)
    sink = sinks.float().view(1, -1, 1, 1).expand(batch, heads, q_block, 1)
    for row in range(classes.shape[2]):
        q = torch.arange(row * q_block, min((row + 1) * q_block, queries), device=query.device)
        listed = classes[:, :, row].repeat_interleave(k_block, dim=-1)[..., None, :keys]
        kept = (listed == 2) | ((listed == 1) & block_mask.mask_mod(b, h, q.view(-1, 1), kv))
        scores = query[:, :, q].float() @ key.mT * (dim**-0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~kept, float("-inf"))
        weights = torch.cat([scores, sink[:, :, : q.numel()]], dim=-1).softmax(-1)[..., :-1]
        out[:, :, q] = (weights @ value).to(out.dtype)
    return out


class _NoBackward(torch.autograd.Function):
    """Identity whose gradient is an error: a prefill for inference must not train a model silently."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *inputs: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            "stem_flex serves inference: its prefill has no backward pass; "
            "train with model.set_attn_implementation('sdpa')"
        )


_warned: set[str] = set()


def _warn_dense_prefill(module, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    """A ready-made mask tensor cannot be read as block lists: say once that this prefill is dense."""
    if not attends_causally(module, kwargs, default=False) or query.shape[2] == 1:
        return
    config = getattr(module, "config", None)
    read_settings(config)  # a model that brings its own mask has had no mask function to check them
    if not is_prefill(raw_settings(config), query.shape[2], key.shape[2]):
        return
    name = type(module).__name__
    if name not in _warned:
        _warned.add(name)
        got, fix = "no mask", "pass a 2-D attention_mask, for this model makes a mask only of one"
        if mask is not None:
            got, fix = f"a ready-made {mask.dim()}-D mask", "pass a 2-D attention_mask, or none"
        warnings.warn(
            f"{name} got {got} for a prefill of {query.shape[2]} tokens, which stem_flex runs dense; {fix}",
            stacklevel=3,
        )
