"""Checks of what every public function takes."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from stem_flex.config import StemConfig
from stem_flex.plumbing.sharded import is_dtensor

_MODS = {"mask_mod": "b, h, q_idx, kv_idx", "score_mod": "score, b, h, q_idx, kv_idx"}

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise TypeError or ValueError unless q, k, v are what flex_attention takes, with GQA."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.is_nested or x.layout is not torch.strided:
            _refuse_layout(name, x)
        if is_dtensor(x):
            raise TypeError(
                f"{name} must be a plain tensor here, got a DTensor; stem_attention takes them, or .to_local()"
            )
        if x.dim() != 4:
            raise ValueError(f"{name} must have shape (B, H, L, D), got {tuple(x.shape)}")
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
        if 0 in x.shape:
            raise ValueError(f"{name} must not be empty, got shape {tuple(x.shape)}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"{name} must have q's batch size {q.shape[0]}, got {x.shape[0]}")
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        _refuse_vmap(q, k, v)
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k must have q's head dim {q.shape[3]}, got {k.shape[3]}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must have k's shape {tuple(k.shape[:3])} but for Dv, got {tuple(v.shape[:3])}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"q must have a multiple of k's {k.shape[1]} heads, got {q.shape[1]}")


def _refuse_layout(name: str, x: Tensor) -> None:
    if x.is_nested:
        raise ValueError(
            f"{name} must be one dense tensor, got a nested one; give its sequences as one row, (1, H, tokens, D), "
            "with layout.documents(cu_seqlens=offsets), or padded, with layout.padding(lengths)"
        )
    raise ValueError(f"{name} must be a dense tensor, got {x.layout}; call .to_dense()")


def _refuse_vmap(*tensors: Tensor) -> None:
    if any(torch._C._functorch.is_batchedtensor(x) for x in tensors):
        raise ValueError(
            "q, k and v must not be batched by torch.vmap, which no flex_attention kernel takes; "
            "make the mapped dimension part of the batch, their first one"
        )


def check_block_mask(name: str, block_mask: object) -> None:
    """Raise TypeError unless it is a BlockMask, ValueError unless it is a whole one.

    Slicing a BlockMask by query blocks leaves it the lengths of the whole, slicing any way takes its mask_mod away.
    """
    if not isinstance(block_mask, BlockMask):
        raise TypeError(f"{name} must be a BlockMask, got {type(block_mask).__name__}")
    shape, tokens = tuple(block_mask.kv_num_blocks.shape), block_mask.seq_lengths[0]
    rows = -(-tokens // block_mask.BLOCK_SIZE[0])
    if len(shape) != 3 or shape[2] != rows:
        raise ValueError(
            f"{name} must have (B, H, {rows}) rows of blocks for its {tokens} queries, got {shape}: a slice keeps the "
            "lengths of the whole; build the mask of these queries, with their q_offset"
        )
    if getattr(block_mask.mask_mod, "__name__", None) == "_sliced_mask_mod_error":
        raise ValueError(
            f"{name} must have a mask_mod, got a slice of a BlockMask, which has none; set its mask_mod, for the "
            "batch rows and heads that it holds"
        )


def check_config(config: StemConfig | None) -> StemConfig:
    """``StemConfig()`` for None; raise TypeError for anything but a StemConfig."""
    if config is None:
        return StemConfig()
    if not isinstance(config, StemConfig):
        raise TypeError(f"config must be a StemConfig or None, got {type(config).__name__}; StemConfig(**options)")
    return config


def check_positive(name: str, value: object) -> None:
    """Raise unless ``value`` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_int_tensor(name: str, tensor: Tensor, dim: int) -> None:
    """Raise unless ``tensor`` holds integers in ``dim`` dimensions."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, got {tensor.dtype}")
    if tensor.dim() != dim:
        raise ValueError(f"{name} must have {dim} dimension(s), got shape {tuple(tensor.shape)}")


def as_int_tensor(name: str, values: object, *dims: int) -> Tensor:
    """``values`` as an int tensor of ``dims`` dimensions; raise TypeError or ValueError naming it."""
    try:
        tensor = values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be ints, a list or a tensor, got {values!r}") from error
    if tensor.numel() == 0:
        raise ValueError(f"{name} must not be empty, got {values!r}")
    check_int_tensor(name, tensor, tensor.dim() if tensor.dim() in dims else dims[0])
    return tensor


def check_values(name: str, tensor: Tensor, least: int, most: int = 2**31 - 1) -> None:
    """Raise unless all entries lie in [least, most]; of CPU tensors only, since others would have to be waited for."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling() or tensor.numel() == 0:
        return
    low, high = (int(x) for x in tensor.aminmax())
    if low < least or high > most:
        wrong = low if low < least else high
        raise ValueError(f"{name} must be between {least} and {most}, got {wrong}")


def check_bool(name: str, value: object) -> None:
    """Raise unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_mod(name: str, f: object, kind: str) -> None:
    """Raise unless ``f`` is a function of as many arguments as a ``kind`` takes: "mask_mod" or "score_mod"."""
    takes = _MODS[kind]
    if not callable(f):
        raise TypeError(f"{name} must be a {kind} ({takes}), got {type(f).__name__}")
    if torch.compiler.is_compiling():
        return
    try:
        signature = inspect.signature(f)
    except (TypeError, ValueError):  # a builtin may not tell
        return
    try:
        signature.bind(*takes.split(", "))
    except TypeError as error:
        raise TypeError(f"{name} must be a {kind} ({takes}), got a function of {signature}") from error


def check_scale(scale: object) -> None:
    """Raise unless ``scale`` is None or a number."""
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat))):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")


def check_mask_of(q: Tensor, k: Tensor, block_mask: BlockMask) -> None:
    """Raise unless ``block_mask`` is one of the sizes and the device of q and k."""
    check_block_mask("block_mask", block_mask)
    if tuple(block_mask.seq_lengths) != (q.shape[2], k.shape[2]):
        raise ValueError(
            f"block_mask must be of q's and k's lengths {(q.shape[2], k.shape[2])}, got {tuple(block_mask.seq_lengths)}"
        )
    for name, size, have in zip("BH", q.shape, block_mask.kv_num_blocks.shape, strict=False):
        if have not in (1, size):
            raise ValueError(f"block_mask must have {name}=1 or q's {size}, got {have}")
    if block_mask.kv_num_blocks.device != q.device:
        raise ValueError(f"block_mask must be on q's device {q.device}, got {block_mask.kv_num_blocks.device}")


def check_options(scale: object, score_mod: object, options: object) -> None:
    """Raise unless these are what flex_attention takes for a scale, a score_mod and kernel options."""
    check_scale(scale)
    if score_mod is not None:
        check_mod("score_mod", score_mod, "score_mod")
    if options is not None and not isinstance(options, dict):
        raise TypeError(
            f"options must be a dict of flex_attention kernel options or None, got {type(options).__name__}"
        )
