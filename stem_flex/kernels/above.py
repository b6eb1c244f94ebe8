"""Sums of what reaches each of several bounds, in one reading: for FlexPrefill's largest entries of a whole head.

A program reads TILE numbers of one head into registers and sums them again for every bound; the sums of a head's tiles
are added by PyTorch, in the same order on every run.

Model: ``4 N`` bytes read for ``BOUNDS`` sums, and BOUNDS N comparisons and additions. 32 heads of 1024 x 1024 blocks:
134 MB, 50 us; an eighth of the 31 readings that one bound at a time takes, each of which writes a copy, too.
"""

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from stem_flex.kernels.launch import launch
from stem_flex.kernels.ops import _guard

# Tuning: numbers that a program holds, warps.
TILE = 4096
WARPS = 4


@triton.jit(do_not_specialize=["tiles"])
def _above_kernel(x, bounds, parts, size, tiles, BOUNDS: tl.constexpr, TILE: tl.constexpr):
    """One program a tile of a head: ``parts`` (heads, BOUNDS, tiles) from x (heads, size), ``bounds`` (heads, BOUNDS).

    Bounds are bits of floats that are no less than 0, whose order is that of the numbers.
    """
    pid = tl.program_id(0)
    head = (pid // tiles).to(tl.int64)
    tile = pid % tiles
    at = tile * TILE + tl.arange(0, TILE)
    value = tl.load(x + head * size + at, mask=at < size, other=0.0)
    bits = value.to(tl.int32, bitcast=True)
    for i in range(BOUNDS):
        bound = tl.load(bounds + head * BOUNDS + i)
        tl.store(parts + (head * BOUNDS + i) * tiles + tile, tl.sum(tl.where(bits >= bound, value, 0.0), axis=0))


@lru_cache(maxsize=64)
def _meta(bounds: int) -> dict[str, object]:
    """Compile-time arguments and options."""
    return dict(BOUNDS=bounds, TILE=TILE, num_warps=WARPS)


def sums_above(x: Tensor, bounds: Tensor) -> Tensor:
    """For each head the sum of its entries from each bound on.

    Args:
        x: float32 (B, H, Qb, Kb), contiguous, no entry below 0.
        bounds: int32 (B, H, T): bits of float32 numbers no less than 0.

    Returns:
        float32 (B, H, T).
    """
    heads, size, number = x.shape[0] * x.shape[1], x.shape[2] * x.shape[3], bounds.shape[2]
    tiles = -(-size // TILE)
    parts = x.new_empty(*bounds.shape, tiles)
    with _guard(x):
        launch(_above_kernel, heads * tiles, (x, bounds, parts, size, tiles), _meta(number), {}, "above")
    return parts.sum(-1)
