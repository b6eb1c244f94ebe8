"""Tiny random models of every causal model type of transformers, prompts for them, and an exact executor."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, StaticCache

from stem_flex import StemConfig, reference
from stem_flex.integrations import hf, hf_versions
from stem_flex.integrations.hf_versions import with_cache
from stem_flex.plumbing.tables import block_classes

_ALL_TYPES = (5, 17)  # the first transformers release known to have and run every model type of the tests
_NEWEST = (5, 24)  # the last one known to have them

# The same heads and dims everywhere, so that compiled attention is shared between families.
SIZES: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
    ffn_hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    n_embd=64,
    n_head=4,
    n_layer=2,
    n_positions=1024,
    max_position_embeddings=1024,
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    q_lora_rank=32,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=16,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
# What a family needs besides, or instead.
_LATENT = dict(num_key_value_heads=4)  # multi-head latent attention expands to all heads
_WINDOW = dict(sliding_window=32, layer_types=["sliding_attention", "full_attention"])
_LINEAR = dict(
    layer_types=["linear_attention", "full_attention"],
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
)
_MAMBA = dict(mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=16)
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys("axk1 deepseek_v2 deepseek_v3 glm4_moe_lite minicpm3 youtu".split(), _LATENT),
    **dict.fromkeys("cohere2 cohere2_moe exaone4 gemma2 gemma3_text gpt_oss ministral olmo3".split(), _WINDOW),
    **dict.fromkeys("qwen3_next qwen3_5_text qwen3_5_moe_text".split(), _LINEAR),
    "bamba": dict(attn_layer_indices=[1], **_MAMBA),
    "gemma4_text": dict(vocab_size_per_layer_input=64, hidden_size_per_layer_input=16, sliding_window=32),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"], **_MAMBA),
    "jamba": dict(attn_layer_offset=1, attn_layer_period=2, use_mamba_kernels=False, mamba_dt_rank=4),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "llama4_text": dict(attention_chunk_size=32, layer_types=["chunked_attention", "full_attention"]),
    "zaya": dict(num_experts_per_tok=1),
}


def skip_if_old(reason: str) -> None:
    """Skip the test under a transformers that is older than what the tests' models need in full."""
    if hf_versions.release() < _ALL_TYPES:
        pytest.skip(f"transformers {hf_versions.version()} {reason}")


def tiny_config(model_type: str, **options: Any) -> Any:
    """The smallest config of a model type that still has what makes the type; skips where the type is too new."""
    if model_type not in CONFIG_MAPPING:
        skip_if_old(f"has no model type {model_type!r} yet")
        if hf_versions.release() > _NEWEST:
            pytest.skip(f"transformers {hf_versions.version()} has no model type {model_type!r} any more")
    cls = CONFIG_MAPPING[model_type]
    known: set[str] = set()
    for base in cls.__mro__:
        known |= set(getattr(base, "__annotations__", {}))
    renamed = getattr(cls, "attribute_map", {})
    values = {key: value for key, value in SIZES.items() if key in known or key in renamed}
    values = {key: value for key, value in values.items() if renamed.get(key) not in values}
    values |= SPECIAL.get(model_type, {}) | options
    return cls(**values)


def tiny_model(model_type: str, **options: Any) -> Any:
    """A random causal model of the type, in evaluation mode, its weights large enough to matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **options)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2 and "embed" not in name:
                # The usual 0.02 makes attention so even that a wrong mask would hardly show.
                weight.normal_(0, 1.5 / weight.shape[-1] ** 0.5, generator=generator)
    return model


def own_attention(model: Any) -> Any:
    """The attention that is the model: sdpa drops a softcap without a word, eager applies it."""
    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")
    return model


def dense_sparse_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask,
    *,
    scale: float | None = None,
    score_mod: Any = None,
    backend: str = "auto",
    return_lse: bool = False,
    correction: str | None = None,
) -> Tensor:
    """``stem_flex.attention.sparse_prefill`` without a compiler: block lists and mask_mod, token by token."""
    assert not return_lse
    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    assert tuple(block_mask.seq_lengths) == (queries, keys)
    assert block_mask.kv_num_blocks.shape[0] in (1, batch)
    assert block_mask.kv_num_blocks.shape[1] in (1, heads)
    q_block, k_block = block_mask.BLOCK_SIZE
    classes = block_classes(block_mask).repeat_interleave(q_block, 2).repeat_interleave(k_block, 3)
    classes = classes[:, :, :queries, :keys]
    b, h = torch.arange(batch).view(-1, 1, 1, 1), torch.arange(heads).view(1, -1, 1, 1)
    i, j = torch.arange(queries).view(-1, 1), torch.arange(keys)
    kept = (classes == 2) | ((classes == 1) & block_mask.mask_mod(b, h, i, j))
    group = heads // k.shape[1]
    if correction is not None:
        listed = block_classes(block_mask) > 0
        allowed = block_mask.mask_mod(b, h, i, j).expand(batch, heads, -1, -1)
        return reference.mean_corrected_attention(q, k, v, allowed, listed, (q_block, k_block), scale=scale)[0].to(
            q.dtype
        )
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q.double() @ k.double().mT * (dim**-0.5 if scale is None else scale)
    if score_mod is not None:
        scores = score_mod(scores, b, h, i, j)
    weights = scores.masked_fill(~kept, float("-inf")).softmax(-1).nan_to_num(0.0)
    return (weights @ v.double()).to(q.dtype)


# -- prompts, and cases: each gives what a model says, for its own attention and for stem_flex ----------------------

TOKENS = 100
KEEP_ALL = StemConfig(schedule="fixed", k_start=1.0, block_size=32)
SPARSE = StemConfig(schedule="fixed", k_start=1, block_size=16, stride=4, sink_blocks=1, local_blocks=1)
BY_BLOCK = StemConfig(
    metric="log", block_size=16, stride=4, schedule="fixed", k_start=0.5, sink_blocks=0, local_blocks=0
)


def prompt(batch=2, tokens=TOKENS, seed=0):
    return torch.randint(2, 60, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def padded(side):
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, slice(0, 37) if side == "left" else slice(63, None)] = 0
    return mask


def padded_forward(side, model):
    mask = padded(side).to(model.device)
    return model(prompt().to(model.device), attention_mask=mask, use_cache=False).logits[mask.bool()]


def packed(model):
    positions = torch.cat([torch.arange(41), torch.arange(33), torch.arange(26)])[None].expand(2, -1)
    return model(prompt().to(model.device), position_ids=positions.to(model.device), use_cache=False).logits


def chunks(kind, model):
    text = model.config.get_text_config()
    cache = DynamicCache(config=text) if kind == "dynamic" else StaticCache(config=text, max_cache_len=160)
    ids, mask, logits = prompt().to(model.device), padded("left").to(model.device), []
    for start, end in ((0, 60), (60, 95), (95, 96), (96, TOKENS)):
        seen = model(ids[:, start:end], attention_mask=mask[:, :end], use_cache=True, **with_cache(model, cache))
        logits.append(seen.logits)
    return torch.cat(logits, 1)[mask.bool()]


def generated(model, **options):
    ids, mask = prompt().to(model.device), padded("left").to(model.device)
    return model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0, **options)


CASES = {
    "left padding": functools.partial(padded_forward, "left"),
    "right padding": functools.partial(padded_forward, "right"),
    "packed": packed,
    "dynamic cache": functools.partial(chunks, "dynamic"),
    "static cache": functools.partial(chunks, "static"),
    "generate": generated,
    "chunked generate": functools.partial(generated, prefill_chunk_size=48),
}


def kept(mask):
    partial, full = reference.dense_blocks(mask)
    return partial | full


def paths(model, *args, **kwargs):
    with torch.no_grad(), hf.trace() as seen:
        model(*args, **kwargs)
    return seen
