"""The fastest dense causal attention at hand: what sparse prefill has to beat."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from stem_flex.plumbing.backend import flash_attn_func


def dense_causal(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, kernel: str) -> Tensor:
    """Dense causal attention, (B, Hq, L, Dv), by ``kernel``: "flash-attn-4", "cudnn", or "cpu" (PyTorch's own)."""
    if kernel == "flash-attn-4":
        with torch.cuda.device(q.device):  # it takes the current device's stream
            out = flash_attn_func()(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scale, causal=True)
        out = out[0] if isinstance(out, tuple) else out
        return out.transpose(1, 2)
    if kernel == "cpu":
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
