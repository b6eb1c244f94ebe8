"""Which implementation runs: never a silent fallback."""

from __future__ import annotations

import functools
import importlib.util
import os

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
    if not _has_triton():
        raise ImportError("impl='triton' needs Triton; pip install triton, or pass impl='torch'")
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"impl='triton' needs CUDA tensors, got {tensor.device}; pass impl='torch' or 'auto', "
            "or set TRITON_INTERPRET=1 before the import to run the kernels in Triton's interpreter"
        )
    return "triton"


@functools.lru_cache(maxsize=1)
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
