"""Which implementation runs: never a silent fallback."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable

from torch import Tensor


def resolve(impl: str, tensor: Tensor) -> str:
    """ "triton" or "torch" for ``impl`` and the device of ``tensor``.

    Raises:
        ValueError: an unknown name, or Triton on a CPU tensor outside Triton's interpreter.
        ImportError: Triton is needed and not installed.
    """
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"impl must be 'auto', 'triton' or 'torch', got {impl!r}")
    if impl == "torch" or (impl == "auto" and not tensor.is_cuda):
        return "torch"
    if not installed("triton"):
        raise ImportError("impl='triton' needs Triton; pip install triton, or pass impl='torch'")
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"impl='triton' needs CUDA tensors, got {tensor.device}; pass impl='torch' or 'auto', "
            "or set TRITON_INTERPRET=1 before the import to run the kernels in Triton's interpreter"
        )
    return "triton"


def constant(f: Callable) -> Callable:
    """What torch.compiler.assume_constant_result does, without importing TorchDynamo for it."""
    f._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return f


@constant
def installed(name: str) -> bool:
    """Whether the module ``name`` can be imported."""
    return _found(name)


@functools.cache
def _found(name: str) -> bool:
    parent = name.rpartition(".")[0]
    return (not parent or _found(parent)) and importlib.util.find_spec(name) is not None
