"""Which kernel runs a call, and with which measured options."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from stem_flex.plumbing.implementation import constant, installed

BACKENDS = ("auto", "triton", "flash", "cpu")

# flex_attention's Triton kernel by largest head dim served, at blocks of 128. On an H100 (torch 2.11, 32/8 heads of
# 128, operator budget, 128K tokens) 128 x 64 tiles in three stages took 68.8 ms, 65.7 with USE_TMA at the same error
# (which Inductor drops where tensors are not aligned for it), 71 with it in two stages; 128 x 128 tiles in two stages
# 64.4 with it, but 81 ms where it is dropped. PRESCALE_QK and ROWS_GUARANTEED_SAFE cost 8 % at 32K.
_TRITON_OPTIONS: tuple[tuple[int, dict], ...] = (
    (128, {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3, "fwd_USE_TMA": True}),
    (256, {}),
)

# Plain causal prompts of fewer tokens, or that keep a larger part of the causal blocks, are as fast dense.
# Measured on an H100, see bench/results/prefill.json.
_SPARSE_FROM = 8192
_DENSE_ABOVE = {"triton": 0.60, "flash": 0.80}


class Decision(NamedTuple):
    """What runs: a backend or dense kernel, whether it is dense, and why."""

    backend: str
    dense: bool
    reason: str


def choose(
    q: Tensor,
    v: Tensor,
    *,
    backend: str,
    block_size: tuple[int, int],
    plain_density: Callable[[], float] | None,
    needs_grad: bool,
    return_lse: bool,
) -> Decision:
    """The decision for a call; a plain causal prompt, which "auto" may run densely, says the density it keeps."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if not q.is_cuda:
        return _on_cpu(q, backend, needs_grad, return_lse)
    if backend == "cpu":
        raise ValueError(f"backend='cpu' needs CPU tensors, got {q.device}; use 'auto', 'triton' or 'flash'")
    if q.dtype == torch.float64:
        raise ValueError("q must be float16, bfloat16 or float32 on CUDA, got float64; stem_flex.reference has it")
    refusal = flash_refusal(q, v, block_size, needs_grad)
    if backend == "flash" and refusal:
        raise (ImportError if "install" in refusal else ValueError)(f"backend='flash' can't serve: {refusal}")
    sparse = "triton" if backend == "triton" or refusal else "flash"
    why = f"flash is not taken: {refusal}" if refusal and backend == "auto" else f"backend={backend!r}"
    traced = torch.compiler.is_compiling()  # a compiled model keeps one path for all lengths
    if backend == "auto" and plain_density is not None and not needs_grad and not traced and q.dtype != torch.float32:
        reason = _dense_reason(q, plain_density, sparse)
        if reason:
            return Decision("cudnn" if refusal else "flash-attn-4", True, reason)
    return Decision(sparse, False, f"sparse prefill by flex_attention's {sparse.upper()} kernel; {why}")


def _on_cpu(q: Tensor, backend: str, needs_grad: bool, return_lse: bool) -> Decision:
    if q.device.type != "cpu":
        raise ValueError(f"q must be on a CUDA device or the CPU, got {q.device}")
    if backend not in ("auto", "cpu"):
        raise ValueError(f"backend={backend!r} needs CUDA tensors, got {q.device}; use 'auto' or 'cpu'")
    if return_lse:
        raise ValueError("return_lse must be False on the CPU, got True: its flex_attention kernel gives no lse")
    if needs_grad:
        raise ValueError(
            "q, k, v and what score_mod reads must not need gradients on the CPU: its flex_attention kernel has no "
            "backward; use torch.no_grad() or CUDA tensors"
        )
    if q.dtype == torch.float64:
        raise ValueError("q must be float16, bfloat16 or float32, got float64; stem_flex.reference has float64")
    return Decision("cpu", False, "sparse prefill by flex_attention's C++ kernel: q is on the CPU")


def _dense_reason(q: Tensor, plain_density: Callable[[], float], sparse: str) -> str | None:
    tokens = q.shape[2]
    if tokens < _SPARSE_FROM:
        return f"{tokens} tokens: below {_SPARSE_FROM} choosing blocks costs more than it saves"
    density = plain_density()
    if density > _DENSE_ABOVE[sparse]:
        return f"the budget keeps {density:.0%} of the causal blocks; above {_DENSE_ABOVE[sparse]:.0%} dense is faster"
    return None


def flash_refusal(q: Tensor, v: Tensor, block_size: tuple[int, int], needs_grad: bool) -> str | None:
    """Why flex_attention's FLASH kernel can't serve, or None."""
    if not installed("flash_attn.cute"):
        return "flash-attn-4 is not installed; pip install 'stem-flex[flash]'"
    capability = _capability(q.get_device())
    if capability[0] < 9:
        return f"the card's compute capability {capability} is older than 9.0; use 'triton'"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {q.dtype}, expected float16 or bfloat16; use 'triton'"
    if max(q.shape[3], v.shape[3]) > 192 or q.shape[3] % 8 or v.shape[3] % 8:
        return f"head dims {q.shape[3]} and {v.shape[3]}, expected multiples of 8 up to 192; use 'triton'"
    if block_size not in ((128, 128), (128, 64)):
        return f"blocks of {block_size}, expected (128, 128) or (128, 64); use 'triton'"
    if needs_grad:
        return "gradients were asked for; use 'triton', or torch.no_grad()"
    return None


@constant
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.lru_cache(maxsize=1)
def flash_attn_func() -> Callable:
    """flash-attn-4's dense attention."""
    from flash_attn.cute import flash_attn_func

    return flash_attn_func


def kernel_options(backend: str, q: Tensor, k: Tensor, v: Tensor, block_size: tuple[int, int]) -> dict:
    """Measured flex_attention kernel options of a backend for these shapes."""
    if backend == "cpu":
        return {}
    if backend == "flash":
        return {"BACKEND": "FLASH"}
    head_dim = max(q.shape[3], v.shape[3])
    options = next((options for largest, options in _TRITON_OPTIONS if head_dim <= largest), {})
    if block_size != (128, 128):  # PyTorch's own tiles may be larger than the blocks, which it refuses
        tile = (128, 64) if head_dim <= 128 and q.dtype != torch.float32 else (64, 32)
        options = {"BLOCK_M": min(tile[0], block_size[0]), "BLOCK_N": min(tile[1], block_size[1])}
    elif q.dtype == torch.float32:
        options = {}
    found = {"BACKEND": "TRITON", **options}
    if not torch.compiler.is_compiling() and q.shape[2] % 128 == 0 and k.shape[2] % 128 == 0:
        # a graph for any length can't know that no tile is ragged, and would check every load
        found["IS_DIVISIBLE"] = True
    return found
