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
    above,
    cells,
    magnitude,
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
    tail,
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


def operands(tokens: int, dtype: torch.dtype, cut: cells.Cut, keys: int, queries: int) -> cells.Operands:
    """Queries and keys to choose among, and a span for each row of cells."""
    rows = -(-queries // (cut.tokens * cut.rows)) * cut.rows
    spans = (empty(1, rows, dtype=torch.int32), empty(1, rows, dtype=torch.int32))
    q, k = empty(1, HEADS, queries, DIM, dtype=dtype), empty(1, KV_HEADS, keys, DIM, dtype=dtype)
    return cells.Operands(q, k, spans, (None,) * 4, cut, 0.1)


def antidiagonals(tokens: int, dtype: torch.dtype, stride: int) -> None:
    """Compile what XAttention and CoSA take."""
    given = operands(tokens, dtype, cells.Cut(stride, BLOCK // stride, BLOCK // stride), tokens, tokens)
    for sums in (True, False):
        cells.cell_mass(given, 0, stride, sums=sums, peaks=not sums)


def selected(tokens: int, dtype: torch.dtype) -> None:
    """Compile what the oracle, ProxyAttn, VecAttention and FlashPrefill take."""
    cells.cell_mass(operands(tokens, dtype, cells.Cut(1, BLOCK, BLOCK), tokens, tokens), 0)
    proxies = operands(tokens, dtype, cells.Cut(1, BLOCK // 8, BLOCK), tokens, tokens // 8)
    cells.cell_mass(proxies, 0, 8, peaks=True)
    cells.cell_peaks(operands(tokens, dtype, cells.Cut(1, 1, BLOCK), tokens, tokens // BLOCK))
    cells.query_logs(operands(tokens, dtype, cells.Cut(1, BLOCK, 1), tokens // BLOCK, tokens))


def last_queries(tokens: int, rows: int, dtype: torch.dtype, dim: int = DIM) -> None:
    """Compile what MInference and FlexPrefill take."""
    spans = empty(1, rows, dtype=torch.int32), empty(1, rows, dtype=torch.int32)
    tail.tail_sums(empty(1, HEADS, rows, dim, dtype=dtype), empty(1, KV_HEADS, tokens, dim, dtype=dtype), *spans)
    above.largest_bound(empty(1, HEADS, tokens // BLOCK, tokens // BLOCK, dtype=torch.float32), 0.9)


if __name__ == "__main__":
    for module in (
        above,
        cells,
        magnitude,
        pool,
        scores,
        select,
        sketch_fine,
        sketch_mass,
        sketch_proxies,
        sketch_sums,
        tail,
    ):
        module.launch = compile_only
    for module in (above, cells, ops, sketch_ops, sketch_tables, tail):
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
    selected(16384, torch.bfloat16)
    selected(4096, torch.float32)
    antidiagonals(8192, torch.bfloat16, 16)
    antidiagonals(8000, torch.bfloat16, 8)
    last_queries(131072, 64, torch.bfloat16)
    last_queries(131072, 128, torch.bfloat16)
    last_queries(4096, 128, torch.float32)
    last_queries(4096, 128, torch.float16, dim=192)
    for line in compiled.values():
        print(json.dumps(line))
