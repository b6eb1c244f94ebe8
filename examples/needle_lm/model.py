"""The training forward of a Qwen3-architecture LM; parameters have the names of transformers' Qwen3ForCausalLM.

A layer is a pure function of tensors, so that one compilation per sequence length serves all layers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHARD_BYTES = 15_500_000


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model; the defaults are the shipped one (14.95 M parameters)."""

    vocab_size: int = 4096
    hidden_size: int = 384
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 1024
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 65536


SIZES = {
    "small": ModelConfig(),
    "medium": ModelConfig(  # 43.8 M parameters
        hidden_size=512,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=4,
        intermediate_size=1408,
    ),
    "tiny": ModelConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=16, intermediate_size=64),
}


class _Attention(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(c.head_dim)
        self.k_norm = nn.RMSNorm(c.head_dim)


class _Mlp(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)


class _Layer(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(c)
        self.mlp = _Mlp(c)
        self.input_layernorm = nn.RMSNorm(c.hidden_size)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size)

    def weights(self) -> tuple[Tensor, ...]:
        """Parameters in the order of `layer_forward`."""
        a, m = self.self_attn, self.mlp
        modules = (self.input_layernorm, a.q_proj, a.k_proj, a.v_proj, a.o_proj, a.q_norm, a.k_norm)
        modules += (self.post_attention_layernorm, m.gate_proj, m.up_proj, m.down_proj)
        return tuple(module.weight for module in modules)


class _Decoder(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(_Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = nn.RMSNorm(c.hidden_size)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm in float32, result in x's dtype."""
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def rope_tables(length: int, config: ModelConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """float32 cos and sin (length, head_dim), halves repeated as transformers does."""
    exponent = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * config.rope_theta**-exponent
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y = x.float()
    low, high = y.chunk(2, dim=-1)
    return (y * cos + torch.cat((-high, low), dim=-1) * sin).to(x.dtype)


def layer_forward(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    weights: tuple[Tensor, ...],
    head_dim: int,
    eps: float,
    repeat_kv: bool,
) -> Tensor:
    """One decoder layer, x (B, L, hidden); weights are cast to x's dtype, softmax is causal."""
    norm1, wq, wk, wv, wo, q_norm, k_norm, norm2, w_gate, w_up, w_down = weights
    batch, length, _ = x.shape
    dtype = x.dtype
    h = rms_norm(x, norm1, eps)
    q = F.linear(h, wq.to(dtype)).view(batch, length, -1, head_dim)
    k = F.linear(h, wk.to(dtype)).view(batch, length, -1, head_dim)
    v = F.linear(h, wv.to(dtype)).view(batch, length, -1, head_dim).transpose(1, 2)
    q = _rotate(rms_norm(q, q_norm, eps).transpose(1, 2), cos, sin)
    k = _rotate(rms_norm(k, k_norm, eps).transpose(1, 2), cos, sin)
    if repeat_kv:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    x = x + F.linear(y.transpose(1, 2).reshape(batch, length, -1), wo.to(dtype))
    h = rms_norm(x, norm2, eps)
    h = F.silu(F.linear(h, w_gate.to(dtype))) * F.linear(h, w_up.to(dtype))
    return x + F.linear(h, w_down.to(dtype))


def head_loss(x: Tensor, norm: Tensor, embedding: Tensor, targets: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Cross entropy (tokens,) in float32 and whether the largest logit is the target, for x (tokens, hidden)."""
    logits = F.linear(rms_norm(x, norm, eps), embedding.to(x.dtype)).float()
    picked = logits.gather(-1, targets[:, None]).squeeze(-1)
    correct = picked >= logits.amax(-1)
    return torch.logsumexp(logits, dim=-1) - picked, correct


class NeedleLM(nn.Module):
    """Decoder-only LM with tied embeddings; `state_dict()` loads into Qwen3ForCausalLM (lm_head is tied)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = _Decoder(config)
        self.layer: Callable[..., Tensor] = layer_forward
        self.head: Callable[..., tuple[Tensor, Tensor]] = head_loss
        self.repeat_kv = False
        self._tables: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def reset_parameters(self, seed: int) -> None:
        """Normal(0, 0.02), output projections scaled by depth, norm gains 1, q and k gains 1.2."""
        generator = torch.Generator().manual_seed(seed)
        depth = (2 * self.config.num_hidden_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                # Normalised q and k bound the logits by 8 * gain^2; 32K keys need more than gain 1 gives.
                nn.init.constant_(parameter, 1.2 if "q_norm" in name or "k_norm" in name else 1.0)
            else:
                std = 0.02 * (depth if "o_proj" in name or "down_proj" in name else 1.0)
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)

    def hidden(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Hidden states (B, L, hidden) before the last norm, for ids (B, L) int64."""
        c = self.config
        key = (ids.shape[1], ids.device)
        if key not in self._tables:
            self._tables[key] = rope_tables(*key[:1], c, ids.device)
        cos, sin = self._tables[key]
        x = F.embedding(ids, self.model.embed_tokens.weight).to(dtype)
        for layer in self.model.layers:
            x = self.layer(x, cos, sin, layer.weights(), c.head_dim, c.rms_norm_eps, self.repeat_kv)
        return x

    def losses(self, ids: Tensor, targets: Tensor, dtype: torch.dtype, chunk: int = 32768) -> tuple[Tensor, Tensor]:
        """Cross entropy and correctness, both (B*L,), the vocabulary axis in chunks of `chunk` tokens."""
        x = self.hidden(ids, dtype).flatten(0, 1)
        wanted = targets.flatten()
        parts = [
            self.head(part, self.model.norm.weight, self.model.embed_tokens.weight, target, self.config.rms_norm_eps)
            for part, target in zip(x.split(chunk), wanted.split(chunk), strict=True)
        ]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def logits(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Logits (B, L, vocabulary)."""
        x = rms_norm(self.hidden(ids, dtype), self.model.norm.weight, self.config.rms_norm_eps)
        return F.linear(x, self.model.embed_tokens.weight.to(dtype))


def hf_config(config: ModelConfig, bos: int = 0) -> dict:
    """config.json of the equal Qwen3ForCausalLM."""
    sizes = asdict(config)
    theta = sizes.pop("rope_theta")
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "use_cache": True,
        "use_sliding_window": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "rope_theta": theta,
        "bos_token_id": bos,
        "eos_token_id": bos,
        "pad_token_id": bos,
        **sizes,
    }


def save_pretrained(model: NeedleLM, folder: Path, tokenizer_json: str) -> None:
    """Write a Hugging Face model directory: bf16 safetensors shards of at most 15.5 MB, configs, tokenizer."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {name: p.detach().to("cpu", torch.bfloat16).contiguous() for name, p in model.state_dict().items()}
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, tensor in state.items():
        if size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    index: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, name)
    files = {
        "model.safetensors.index.json": {"metadata": {"total_size": total}, "weight_map": index},
        "config.json": hf_config(model.config),
        "generation_config.json": {
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
            "do_sample": False,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|endoftext|>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": model.config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")


def load_weights(model: NeedleLM, folder: Path) -> None:
    """Load the shards that `save_pretrained` wrote."""
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("model-*.safetensors")):
        state |= load_file(shard)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
