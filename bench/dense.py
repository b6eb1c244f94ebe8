"""The dense causal kernels a sparse prefill competes with, each as a call without arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Call = Callable[[], torch.Tensor]


def sdpa(backend: SDPBackend, tensors: Tensors) -> Call:
    """PyTorch's SDPA held to one backend.

    Key and value heads are repeated beforehand, outside the timing, where the backend has no GQA of its own.
    """
    q, k, v = tensors
    grouped = q.shape[1] != k.shape[1]
    probe = [x[:, :, :128] for x in tensors]
    with sdpa_kernel(backend):
        try:
            scaled_dot_product_attention(*probe, is_causal=True, enable_gqa=grouped)
        except RuntimeError:
            if not grouped:
                raise
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
            grouped = False

    def call() -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

    return call


def _causal(b, h, query, key):
    return query >= key


def causal_block_mask(length: int, device: torch.device, block: int = 128) -> BlockMask:
    """The causal BlockMask of one batch row and head, written down rather than evaluated pair by pair."""
    blocks = -(-length // block)
    index = torch.arange(blocks, dtype=torch.int32, device=device)
    partial = torch.zeros(1, 1, blocks, blocks, dtype=torch.int32, device=device)
    partial[0, 0, :, 0] = index
    return BlockMask.from_kv_blocks(
        torch.ones(1, 1, blocks, dtype=torch.int32, device=device),
        partial,
        index.expand(1, 1, blocks).contiguous(),
        index.expand(1, 1, blocks, blocks).contiguous(),
        BLOCK_SIZE=block,
        mask_mod=_causal,
        seq_lengths=(length, length),
        compute_q_blocks=False,
    )


@cache
def _compiled_flex() -> Callable[..., torch.Tensor]:
    return torch.compile(flex_attention, fullgraph=True)


def flex(tensors: Tensors) -> Call:
    """Compiled flex_attention, TRITON backend on CUDA, with the causal BlockMask built beforehand."""
    q, k, v = tensors
    mask = causal_block_mask(q.shape[2], q.device)
    options = {"BACKEND": "TRITON"} if q.device.type == "cuda" else None

    def call() -> torch.Tensor:
        return _compiled_flex()(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1], kernel_options=options)

    return call


def flash4(tensors: Tensors) -> Call:
    """flash-attn-4's own entry, over (B, N, H, D) views."""
    from flash_attn.cute import flash_attn_func

    q, k, v = (x.transpose(1, 2) for x in tensors)

    def call() -> torch.Tensor:
        out = flash_attn_func(q, k, v, causal=True)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return call


def calls(tensors: Tensors) -> dict[str, Callable[[], Call]]:
    """Name to a maker of the call, for the device of ``tensors``."""
    if tensors[0].device.type != "cuda":
        return {"sdpa": lambda: sdpa(SDPBackend.FLASH_ATTENTION, tensors), "flex": lambda: flex(tensors)}
    return {
        "fa2": lambda: sdpa(SDPBackend.FLASH_ATTENTION, tensors),
        "cudnn": lambda: sdpa(SDPBackend.CUDNN_ATTENTION, tensors),
        "flex": lambda: flex(tensors),
        "fa4": lambda: flash4(tensors),
    }
