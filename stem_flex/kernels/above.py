"""The largest entries of a whole head within a part of its sum, without a sort: for FlexPrefill.

The bits of floats no less than 0 have the order of the numbers, so that the least entry to keep is found by cutting
the range of bits. A step cuts each head's range in PIECES: programs read TILE numbers of a head into registers and sum
them from each inner bound on (`_above_kernel`); one program a head adds the tiles' sums, in the same order on every
run, and leaves the piece in which the sum passes the limit (`_narrow_kernel`). No host sync: the steps are as many as
31 bits take.

Model: ``4 N`` bytes read a step, and PIECES N comparisons and additions. 32 heads of 1024 x 1024 blocks: 134 MB, 12
readings in 0.78 ms of an H100; halving by PyTorch reads as much 31 times and writes a copy each time, 14 ms.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stem_flex.kernels.launch import launch, plan_of
from stem_flex.kernels.ops import _guard

# Tuning: numbers that a program holds, pieces of a step, warps.
TILE = 4096
PIECES = 8
WARPS = 4

INFINITY = 0x7F800000


@triton.jit
def _bound(ranges, head, i, PIECES: tl.constexpr):
    """The i-th inner bound of a head's range; beyond the range's end, the end."""
    low = tl.load(ranges + head * 2)
    high = tl.load(ranges + head * 2 + 1)
    return tl.minimum(low + (high - low + PIECES - 1) // PIECES * i, high)


@triton.jit(do_not_specialize=["tiles"])
def _above_kernel(x, ranges, parts, size, tiles, PIECES: tl.constexpr, TILE: tl.constexpr):
    """One program a tile of a head: ``parts`` (heads, PIECES - 1, tiles) from x (heads, size), ranges (heads, 2)."""
    pid = tl.program_id(0)
    head = (pid // tiles).to(tl.int64)
    tile = pid % tiles
    at = tile * TILE + tl.arange(0, TILE)
    value = tl.load(x + head * size + at, mask=at < size, other=0.0)
    bits = value.to(tl.int32, bitcast=True)
    for i in range(1, PIECES):
        reaches = bits >= _bound(ranges, head, i, PIECES)
        total = tl.sum(tl.where(reaches, value, 0.0), axis=0)
        tl.store(parts + (head * (PIECES - 1) + i - 1) * tiles + tile, total)


@triton.jit(do_not_specialize=["tiles"])
def _narrow_kernel(parts, limit, ranges, narrowed, tiles, PIECES: tl.constexpr, TILE: tl.constexpr):
    """One program a head: the piece of its range in which the sum passes the limit."""
    head = tl.program_id(0).to(tl.int64)
    most = tl.load(limit + head)
    over = 0
    for i in range(1, PIECES):
        total = 0.0
        for start in range(0, tiles, TILE):
            at = start + tl.arange(0, TILE)
            row = parts + (head * (PIECES - 1) + i - 1) * tiles
            total += tl.sum(tl.load(row + at, mask=at < tiles, other=0.0), axis=0)
        over += (total > most).to(tl.int32)  # sums fall as bounds rise: these are the lowest ones
    tl.store(narrowed + head * 2, _bound(ranges, head, over, PIECES))
    tl.store(narrowed + head * 2 + 1, _bound(ranges, head, over + 1, PIECES))


def largest_bound(x: Tensor, part: float) -> Tensor:
    """Bits of the least entry of each head from which on its entries sum to at most ``part`` (1 + 1e-6) of all.

    Args:
        x: float32 (B, H, Qb, Kb), contiguous, no entry below 0.
        part: in [0, 1].

    Returns:
        int32 (B, H), at least 1: zeros are no entries; the bits of infinity where not even the largest entry fits.
    """
    heads, size = x.shape[0] * x.shape[1], x.shape[2] * x.shape[3]
    tiles = -(-size // TILE)
    parts = x.new_empty(heads, PIECES - 1, tiles)
    ranges, narrowed = (x.new_zeros(heads, 2, dtype=torch.int32) for _ in range(2))
    plan = plan_of((_above_kernel, x.device, size, x.data_ptr() % 16))
    meta = dict(PIECES=PIECES, num_warps=WARPS)

    def above() -> None:
        launch(_above_kernel, heads * tiles, (x, ranges, parts, size, tiles), meta | {"TILE": TILE}, plan, "above")

    with _guard(x):
        above()  # from 0 to 0: everything
        limit = parts[:, 0].sum(-1) * (part * (1 + 1e-6))
        ranges[:, 1] = INFINITY
        width = INFINITY
        while width > 1:
            above()
            args = (parts, limit, ranges, narrowed, tiles)
            launch(_narrow_kernel, heads, args, meta | {"TILE": min(TILE, 512)}, plan, "narrow")
            ranges, narrowed = narrowed, ranges
            width = -(-width // PIECES)
    return ranges[:, 1].clamp(min=1).view(x.shape[:2])
