"""Compile the Triton kernels for an H100 where there is no GPU, and print what each takes as JSON lines.

    python tests/compile_for_hopper.py

Launches are replaced by Triton's warm-up under a driver that only names its target, on tensors without storage, so
that the real launchers choose tiles and specialisations for real sizes.
"""

import contextlib
import json
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

HEADS, KV_HEADS, DIM, BLOCK = 32, 8, 128, 128


class Hopper:
    """A Triton driver that compiles for compute capability 9.0 and can do nothing else."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


driver.set_active(Hopper())
from stem_flex.kernels import (  # noqa: E402
    block_sums,
    magnitude,
    mass,
    ops,
    pool,
    scores,
    select,
    sketch_fine,
    sketch_mass,
    sketch_ops,
    sketch_proxies,
    sketch_sums,
    sketch_tables,
)

compiled: dict[str, dict[str, Any]] = {}


def compile_only(kernel, programs: int, args: tuple, meta: dict[str, Any], plan: object, slot: object) -> None:
    """In the place of `stem_flex.kernels.launch.launch`."""
    made = kernel.warmup(*args, grid=(programs, 1, 1), **meta)
    compiled.setdefault(
        made.hash,
        {
            "kernel": kernel.__name__,
            "shared": made.metadata.shared,
            "cubin": len(made.asm["cubin"]),
            "tensor_cores": "wgmma.mma_async" in made.asm["ptx"],
            **{name: value for name, value in meta.items() if name.startswith("BLOCK") or name in ("EDGE", "FULL")},
        },
    )


class Warmed:
    """A kernel that is launched as Triton's are, and compiled only."""

    def __init__(self, kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *args, **meta: compile_only(self.kernel, grid[0], args, meta, None, None)


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor without storage."""
    return torch.empty(shape, dtype=dtype, device="meta")


def tables(tokens: int, dtype: torch.dtype, metric: str, dim: int = DIM, classes: bool = False) -> None:
    """Compile what one mask takes."""
    blocks = tokens // BLOCK
    ints = {"dtype": torch.int32}
    valid = empty(1, **ints) if classes else None
    ops._tables(
        empty(1, HEADS, tokens, dim, dtype=dtype),
        empty(1, KV_HEADS, tokens, dim, dtype=dtype),
        empty(1, KV_HEADS, tokens, DIM, dtype=dtype),
        empty(1, blocks, 8, **ints),
        empty(1, 1, blocks, **ints),
        empty(1, 1, blocks, blocks, dtype=torch.int8) if classes else None,
        valid, valid, valid, valid, block_q=BLOCK, block_k=BLOCK, stride=8, metric=metric, value_weight=0.2, sink=4,
        local=4, partial_columns=1, width=blocks, max_key_blocks=blocks, causal_offset=None if classes else 0,
    )  # fmt: skip


def sketched(tokens: int, dtype: torch.dtype, dim: int = DIM, classes: bool = False, coarse=None) -> None:
    """Compile what one mask by the block sketch takes."""
    blocks = tokens // BLOCK
    ints = {"dtype": torch.int32}
    valid = empty(1, **ints) if classes else None
    inputs = (
        empty(1, HEADS, tokens, dim, dtype=dtype),
        empty(1, KV_HEADS, tokens, dim, dtype=dtype),
        empty(1, blocks, 8, **ints),
    )
    restrictions = (empty(1, 1, blocks, blocks, dtype=torch.int8) if classes else None, *(valid,) * 4)
    options = {"block_q": BLOCK, "block_k": BLOCK, "sketch": [16, 8, 4, 8], "causal_offset": None if classes else 0}
    options |= {"coarse": coarse, "capacity": 256, "threshold": 0.05}
    sketch_ops._scores(*inputs, *restrictions, **options)
    sketch_tables._tables(
        *inputs, None, *restrictions, floor=1, cap=64, sink=1, local=2, partial_columns=4, width=68,
        **options,
    )  # fmt: skip


if __name__ == "__main__":
    for module in (magnitude, pool, scores, select, sketch_fine, sketch_mass, sketch_proxies, sketch_sums):
        module.launch = compile_only
    for module in (ops, sketch_ops, sketch_tables):
        module._guard = lambda q: contextlib.nullcontext()
    tables(8192, torch.bfloat16, "zscore")
    tables(8192, torch.float16, "log", dim=192, classes=True)
    tables(2048, torch.float32, "zscore", dim=80)
    tables(262144, torch.bfloat16, "zscore")
    sketched(16384, torch.bfloat16)
    sketched(4096, torch.float16, dim=192, classes=True)
    sketched(4096, torch.float32, dim=80)
    sketched(131072, torch.bfloat16, coarse=[4, 1])
    sketched(4096, torch.float16, dim=192, classes=True, coarse=[8, 2])
    sketched(4096, torch.float32, dim=80, coarse=[0, 0])
    mass._block_mass_kernel = Warmed(mass._block_mass_kernel)
    sizes = {"dtype": torch.bfloat16}
    mass.block_mass_kernel(empty(1, 4, 4096, 64, **sizes), empty(1, 2, 4096, 64, **sizes), (BLOCK, BLOCK), 0, 0.125)
    block_sums._block_sums_kernel = Warmed(block_sums._block_sums_kernel)
    ints = {"dtype": torch.int32}
    block_sums.block_sums_kernel(
        empty(1, HEADS, 131072, DIM, **sizes), empty(1, KV_HEADS, 1024, DIM, **sizes),
        (empty(1, 131072, **ints), empty(1, 131072, **ints)), (empty(1, 1024, **ints), empty(1, 1024, **ints)),
        empty(1, 1024, **ints), empty(1, 1024, **ints), BLOCK,
    )  # fmt: skip
    for line in compiled.values():
        print(json.dumps(line))
