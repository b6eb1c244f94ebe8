"""The largest entries of a whole head within a part of its sum, without a sort: for FlexPrefill.

The bits of floats no less than 0 have the order of the numbers, so that the least entry to keep is found by cutting
the range of bits. A step cuts each head's range in PIECES: programs read TILE numbers of a head into registers and sum
them from each inner bound on (`_above_kernel`); one program a head adds the tiles' sums, in the same order on every
run, and goes on to the piece in which the sum passes the limit (`_narrow_kernel`). No host sync: the ranges are as wide
for every head, and the steps as many as 31 bits take.

Model: ``4 N`` bytes read a step, and PIECES N comparisons and additions. 32 heads of 1024 x 1024 blocks: 134 MB, 12
readings in 0.78 ms of an H100; halving by PyTorch reads as much 31 times and writes a copy each time, 14 ms.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stem_flex.kernels.launch import launch, plan_of
from stem_flex.kernels.ops import _guard

# Tuning: numbers that a program holds, sums that one adds at once, pieces of a step, warps.
TILE = 4096
ADDED = 512
PIECES = 8
WARPS = 4

INFINITY = 0x7F800000  # its bits


@triton.jit(do_not_specialize=["tiles", "step"])
def _above_kernel(x, lows, parts, size, tiles, step, PIECES: tl.constexpr, TILE: tl.constexpr):
    """One program a tile of a head: ``parts`` (heads, PIECES - 1, tiles) from x (heads, size) and ``lows``."""
    pid = tl.program_id(0)
    head = (pid // tiles).to(tl.int64)
    tile = pid % tiles
    low = tl.load(lows + head)
    at = tile * TILE + tl.arange(0, TILE)
    value = tl.load(x + head * size + at, mask=at < size, other=0.0)
    bits = value.to(tl.int32, bitcast=True)
    for i in range(1, PIECES):
        total = tl.sum(tl.where(bits >= low + step * i, value, 0.0), axis=0)
        tl.store(parts + (head * (PIECES - 1) + i - 1) * tiles + tile, total)


@triton.jit(do_not_specialize=["tiles", "step"])
def _narrow_kernel(parts, limit, lows, tiles, step, PIECES: tl.constexpr, TILE: tl.constexpr):
    """One program a head: ``lows`` moves to the last bound from which on the sum passes the limit."""
    head = tl.program_id(0).to(tl.int64)
    low = tl.load(lows + head)
    most = tl.load(limit + head)
    over = 0
    for i in range(1, PIECES):
        total = 0.0
        for start in range(0, tiles, TILE):
            at = start + tl.arange(0, TILE)
            row = parts + (head * (PIECES - 1) + i - 1) * tiles
            total += tl.sum(tl.load(row + at, mask=at < tiles, other=0.0), axis=0)
        over += (total > most).to(tl.int32)  # sums fall as bounds rise: these are the lowest ones
    tl.store(lows + head, low + step * over)


def largest_bound(x: Tensor, part: float) -> Tensor:
    """The least bits such that each head's entries that reach them sum to at most ``part`` (1 + 1e-6) of all.

    Args:
        x: float32 (B, H, Qb, Kb), contiguous, no entry below 0, none infinite or NaN.
        part: in [0, 1].

    Returns:
        int32 (B, H), at least 1: a zero reaches nothing.
    """
    heads, size = x.shape[0] * x.shape[1], x.shape[2] * x.shape[3]
    tiles = -(-size // TILE)
    parts = x.new_empty(heads, PIECES - 1, tiles)
    lows = x.new_zeros(heads, dtype=torch.int32)
    plan = plan_of((_above_kernel, x.device, size, x.data_ptr() % 16, TILE, ADDED, PIECES))
    meta = dict(PIECES=PIECES, num_warps=WARPS)

    def above(step: int) -> None:
        args = (x, lows, parts, size, tiles, step)
        launch(_above_kernel, heads * tiles, args, meta | {"TILE": TILE}, plan, "above")

    with _guard(x):
        above(0)  # from 0 on: everything
        limit = parts[:, 0].sum(-1) * (part * (1 + 1e-6))
        width = INFINITY
        while width > 1:
            width = -(-width // PIECES)
            above(width)
            launch(_narrow_kernel, heads, (parts, limit, lows, tiles, width), meta | {"TILE": ADDED}, plan, "narrow")
    return (lows + 1).view(x.shape[:2])
