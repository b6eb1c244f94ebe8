"""Stem on DeepSeek-V3.2's own sparse attention in transformers: what :func:`.hf.refine_dsa` switches a model to.

transformers' indexer returns the tokens it chose, and an attention function of another name than "sdpa" and "eager"
gets them as ``indices``. In a prefill the wrapped indexer hands on its queries, keys and weights instead, unscored;
the attention function, which also sees the values, chooses and attends.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stem_flex.config import StemConfig
from stem_flex.integrations import hf_versions
from stem_flex.integrations.hf_attention import MODE
from stem_flex.integrations.hf_fallback import fallback_attention
from stem_flex.integrations.hf_masks import StemMask, mask_of
from stem_flex.integrations.hf_trace import record
from stem_flex.selectors.dsa import Tokens, dsa_tokens, token_attention

DSA_NAME = "stem_flex:dsa"
_PLAIN = StemConfig(mu=1.0, value_weight=0.0)


@dataclass(frozen=True, eq=False)
class Indexer:
    """What the indexer of one layer scores with: q (B, Hi, Lq, Di), k (B, Lk, Di), weights (B, Lq, Hi)."""

    q: Tensor
    k: Tensor
    weights: Tensor


class DsaMask(StemMask):
    """The mask of a prefill, passed through the places where the model takes it for a tensor."""

    def __getitem__(self, index: Any) -> DsaMask:
        return self  # the model takes the one head of the mask for its indexer

    def __getattr__(self, name: str) -> Any:
        if name == "dtype":
            raise TypeError(
                f"this model's indexer does not know stem_flex's masks; attn_implementation={DSA_NAME!r} needs "
                "stem_flex.integrations.hf.refine_dsa(model)"
            )
        return super().__getattr__(name)


def dsa_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = hf_versions.causal,
    attention_mask: Any = None,
    config: Any = None,
    **kwargs: Any,
) -> Any:
    """A :class:`DsaMask` for a prefill, else the mask tensor that the model's own selection needs."""
    return mask_of(
        DsaMask, batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, config, **kwargs
    )


def wrap_indexers(model: torch.nn.Module) -> None:
    """Let the indexers of ``model`` hand on what they score with, in a prefill."""
    for module in model.modules():
        indexer: Any = getattr(module, "indexer", None)
        if isinstance(indexer, torch.nn.Module) and "forward" not in indexer.__dict__:
            indexer.__dict__["forward"] = functools.partial(
                _indexer_forward, indexer
            )  # unlike a bound method, it is pickled


def unwrap_indexers(model: torch.nn.Module) -> None:
    """Undo :func:`wrap_indexers`."""
    for module in model.modules():
        given = module.__dict__.get("forward")
        if isinstance(given, functools.partial) and given.func is _indexer_forward:
            del module.__dict__["forward"]


def _indexer_forward(
    indexer: Any,
    hidden_states: Tensor,
    q_resid: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not isinstance(attention_mask, DsaMask):
        own = type(indexer).forward
        return own(indexer, hidden_states, q_resid, position_embeddings, attention_mask, *args, **kwargs)
    with torch.no_grad():
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # as transformers from 5.24 on calls it, and before
        return _queries_and_keys(indexer, hidden_states, q_resid, position_embeddings, cache)


def _queries_and_keys(
    indexer: Any, hidden: Tensor, q_resid: Tensor, positions: tuple[Tensor, Tensor], cache
) -> Indexer:
    batch, length, _ = hidden.shape
    q = indexer.wq_b(q_resid).view(batch, length, indexer.n_heads, indexer.head_dim)
    k = indexer.k_norm(indexer.wk(hidden))[:, :, None]
    rope = indexer.qk_rope_head_dim  # the first dims of each head
    rotate = sys.modules[type(indexer).__module__].apply_rotary_pos_emb
    rotated = rotate(q[..., :rope], k[..., :rope], *positions, unsqueeze_dim=2)
    q, k = (torch.cat([turned, x[..., rope:]], dim=-1) for turned, x in zip(rotated, (q, k), strict=True))
    k = k[:, :, 0]
    if cache is not None:
        k = cache.update_indexer(k, indexer.layer_idx)
    weights = indexer.weights_proj(hidden.to(indexer.weights_proj.weight.dtype)).float()
    return Indexer(q.transpose(1, 2), k, weights * (indexer.softmax_scale * indexer.n_heads**-0.5))


def dsa_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    indices: Indexer | Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention to the tokens chosen: by Stem in a prefill, else as the model chose them.

    Shapes are those of :func:`~stem_flex.integrations.hf_attention.stem_attention_forward`.

    Raises:
        ValueError, NotImplementedError: naming what is not served.
    """
    if kwargs.get("output_attentions"):
        raise ValueError(
            "output_attentions=True needs attention weights, which stem_flex never computes; "
            "use model.set_attn_implementation('eager')"
        )
    if isinstance(attention_mask, DsaMask):
        if not isinstance(indices, Indexer):
            raise TypeError(f"attn_implementation={DSA_NAME!r} needs stem_flex.integrations.hf.refine_dsa(model)")
        prefill: Any = _prefill  # the decorator is typed as a factory
        return prefill(module, query, key, value, attention_mask, dropout, scaling, indices), None
    if not isinstance(indices, Tensor) or not isinstance(attention_mask, Tensor):
        raise NotImplementedError(
            f"attn_implementation={DSA_NAME!r} needs the indexer's tokens and a mask, got {type(indices).__name__} and "
            f"{type(attention_mask).__name__}"
        )
    mask = _narrowed(attention_mask, indices)
    return fallback_attention(module, query, key, value, mask, dropout, scaling, kwargs)


def _narrowed(mask: Tensor, indices: Tensor) -> Tensor:
    """The mask of the tokens chosen, where the mask allows them."""
    size = (indices.shape[0], *mask.shape[2:])
    chosen = torch.zeros(size, dtype=torch.bool, device=mask.device).scatter_(-1, indices.long(), True)[:, None]
    return mask & chosen if mask.dtype == torch.bool else mask.masked_fill(~chosen, torch.finfo(mask.dtype).min)


@torch.compiler.disable
@torch.no_grad()
def _prefill(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: StemMask,
    dropout: float,
    scaling: float | None,
    indexer: Indexer,
) -> Tensor:
    if dropout or query.requires_grad:
        raise NotImplementedError(
            "stem_flex serves inference; call model.eval() and torch.no_grad(), "
            "or train with model.set_attn_implementation('sdpa')"
        )
    mask.check(query, key)
    here: Any = mask.to(query.device)
    key, value = key[:, :, : here.used_keys], value[:, :, : here.used_keys]
    tokens = _chosen(module, value, here, indexer)
    record(module, "tokens", query, key)
    out = token_attention(query, key, value, tokens.indices, scale=scaling)
    return out.transpose(1, 2).contiguous()


def _chosen(module: Any, value: Tensor, mask: StemMask, indexer: Indexer) -> Tokens:
    if mask.kind not in ("causal", "packed"):
        raise NotImplementedError(
            "refine_dsa serves causal prompts, padded or packed, got a mask of another kind; "
            "use model.set_attn_implementation('sdpa')"
        )
    mode = getattr(module, MODE, "stem")
    if mode not in ("stem", "dense"):
        raise ValueError(f"{MODE} of {type(module).__name__} must be 'stem' or 'dense', got {mode!r}")
    return dsa_tokens(
        indexer.q,
        indexer.k[:, : mask.used_keys],
        indexer.weights,
        value,
        mask.settings.config if mode == "stem" else _PLAIN,
        keep=module.indexer.index_topk,
        layout=mask.layout.inner,  # a shared layout keeps every binding, and strips have many
        q_offset=mask.query_offset,
        prompt_len=mask.prompt_len,
        kv_len=mask.kv_len,
    )
