"""The memory floor: a Triton kernel that reads tensors once and does nothing else worth the name."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl


@triton.jit
def _read_kernel(source, sums, n, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Each program adds STEPS tiles of BLOCK elements and stores one float32."""
    start = tl.program_id(0).to(tl.int64) * BLOCK * STEPS
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in tl.static_range(STEPS):
        at = start + step * BLOCK + lane
        total += tl.load(source + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(sums + tl.program_id(0), tl.sum(total))


def reader(tensors: tuple[torch.Tensor, ...]) -> Callable[[], list[torch.Tensor]]:
    """A call that reads the memory of every tensor once (each must fill its storage, in any order)."""
    block, steps = 4096, 8
    flat = [tensor.as_strided((tensor.numel(),), (1,)) for tensor in tensors]
    sums = [torch.empty(triton.cdiv(x.numel(), block * steps), device=x.device) for x in flat]

    def call() -> list[torch.Tensor]:
        for x, out in zip(flat, sums, strict=True):
            grid = (out.numel(),)
            _read_kernel[grid](x, out, x.numel(), BLOCK=block, STEPS=steps, num_warps=8)  # pyright: ignore[reportIndexIssue]
        return sums

    return call
