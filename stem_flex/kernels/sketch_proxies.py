"""The proxies of blocks for the block sketch: outlying tokens and means of groups, in one pass over q or k.

A block of BLOCK tokens is represented by its OUTLIERS tokens farthest from the mean of its real tokens (ties to the
lower index) and by the means of MEANS contiguous groups of BLOCK/MEANS tokens, over real tokens only. Proxies come in
that order, in the input's dtype; distances and means are taken in float32. What stands for no real token is zeros.

Places: the proxy p of block i of (batch, head) bh lies at ``bh*stride_h + i*stride_i + p*stride_p``, `Plane.width`
elements, D rounded up to a power of two with zeros. Keys lie proxy by proxy, (B, Hkv, P, Kb, width), so that a tile of
key blocks is one run of memory for each proxy; queries block by block, (B, Hq, rows, P, width).

A token's place among its block's distances is the number of tokens before it, counted over all BLOCK^2 pairs: no loop,
and every one of the first OUTLIERS places is filled, by tokens that are not real after all that are.

Model (e = bytes an element): reads ``e*L*D`` and writes ``e*L*D*(OUTLIERS + MEANS)/BLOCK`` bytes a head (19 % of q for
16 + 8 proxies of 128); ~6 operations an element and ~4 a pair. Bound by memory: 1.1 GB for the queries of 128K tokens
of 32 heads, D=128, 16 bit.
"""

from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from stem_flex.kernels.launch import Plan, launch
from stem_flex.kernels.pool import _locate, _valid_range

# Tuning: bytes of a block that a thread holds.
BYTES_PER_THREAD = 256
MOST_WARPS = 16

MOST_BLOCK = 512
"""Largest block, in tokens: all pairs of its tokens are compared."""


class Plane(NamedTuple):
    """How one side's blocks are represented and where their proxies lie (elements)."""

    heads: int
    length: int
    head_dim: int
    block: int
    outliers: int
    means: int
    width: int
    stride_h: int
    stride_i: int
    stride_p: int

    @property
    def proxies(self) -> int:
        """Proxies of a block."""
        return self.outliers + self.means

    @property
    def blocks(self) -> int:
        """Blocks of a head."""
        return -(-self.length // self.block)


def query_plane(heads: int, length: int, head_dim: int, block: int, outliers: int, means: int, rows: int) -> Plane:
    """Block by block: (heads, rows, P, width)."""
    width, proxies = triton.next_power_of_2(max(head_dim, 16)), outliers + means
    return Plane(heads, length, head_dim, block, outliers, means, width, rows * proxies * width, proxies * width, width)


def key_plane(heads: int, length: int, head_dim: int, block: int, outliers: int, means: int) -> Plane:
    """Proxy by proxy: (heads, P, blocks, width)."""
    width, blocks = triton.next_power_of_2(max(head_dim, 16)), -(-length // block)
    proxies = outliers + means
    return Plane(
        heads, length, head_dim, block, outliers, means, width, proxies * blocks * width, width, blocks * width
    )


@triton.jit
def _places(far, token, BLOCK: tl.constexpr):
    """How many tokens come before each: farther ones, and as far ones of a lower number."""
    far = tl.reshape(far, (BLOCK,))
    token = tl.reshape(token, (BLOCK,))
    farther = far[:, None] > far[None, :]
    tied = (far[:, None] == far[None, :]) & (token[:, None] < token[None, :])
    return tl.sum((farther | tied).to(tl.int32), axis=0)  # summed in a thread's registers: axis 1 lies across the warp


@triton.jit(do_not_specialize=["length", "row", "blocks"])
def _proxies_kernel(
    x, out, coarse, start, end, stride_b, stride_h, stride_t, out_h, out_i, out_p, coarse_h, coarse_i, coarse_p, length,
    row, blocks,
    HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, OUTLIERS: tl.constexpr,
    MEANS: tl.constexpr, COARSE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program a block; axes of tiles: group, token of the group, dim. WIDE: a block spans 2^31 elements.

    ``coarse``, unless None, gets the first COARSE outliers and the block's mean.

    The block is read once and stays in registers, in the input's dtype: means, distances and the outliers' copies are
    taken from it. Its means are sums in a thread's registers, its distances cross half a warp.
    """
    TOKENS: tl.constexpr = BLOCK // MEANS
    b, h, i = _locate(tl.program_id(0), HEADS, blocks, stride_h < stride_t)
    low, high = _valid_range(start, end, b, length)
    first = (row + i) * BLOCK
    g = tl.arange(0, MEANS)
    d = tl.arange(0, WIDTH)
    x += b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + first.to(tl.int64) * stride_t
    out += (b * HEADS + h).to(tl.int64) * out_h + i.to(tl.int64) * out_i
    if WIDE:
        stride_t = stride_t.to(tl.int64)
        out_p = out_p.to(tl.int64)
        coarse_p = coarse_p.to(tl.int64)
    token = g[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
    real = (first + token >= low) & (first + token < high)
    mask = real[:, :, None]
    if D < WIDTH:
        mask = mask & (d < D)[None, None, :]
    tile = tl.load(x + (token * stride_t)[:, :, None] + d[None, None, :], mask=mask, other=0.0)
    sums = tl.sum(tile.to(tl.float32), axis=1)
    counts = tl.sum(real.to(tl.float32), axis=1)
    means = sums / tl.maximum(counts, 1.0)[:, None]
    tl.store(out + ((OUTLIERS + g) * out_p)[:, None] + d[None, :], means.to(out.dtype.element_ty))
    center = tl.sum(sums, axis=0) / tl.maximum(tl.sum(counts, axis=0), 1.0)
    if coarse is not None:
        coarse += (b * HEADS + h).to(tl.int64) * coarse_h + i.to(tl.int64) * coarse_i
        tl.store(coarse + COARSE * coarse_p + d, center.to(coarse.dtype.element_ty))
    if OUTLIERS > 0:
        off = tile.to(tl.float32) - center[None, None, :]
        if D < WIDTH:
            off = tl.where((d < D)[None, None, :], off, 0.0)
        far = tl.sum(off * off, axis=2)
        far = tl.where(far == far, far, float("inf"))  # a NaN token is as far as can be, and has a place of its own
        far = tl.where(real, far, -1.0)
        place = tl.reshape(_places(far, token, BLOCK), (MEANS, TOKENS))
        chosen = (place < OUTLIERS)[:, :, None]
        tl.store(out + (place * out_p)[:, :, None] + d[None, None, :], tile, mask=chosen)
        if COARSE > 0:
            first_ones = (place < COARSE)[:, :, None]
            tl.store(coarse + (place * coarse_p)[:, :, None] + d[None, None, :], tile, mask=first_ones)


@lru_cache(maxsize=256)
def _proxies_meta(plane: Plane, coarse: Plane | None, stride_t: int, item_size: int) -> dict[str, object]:
    warps = plane.block * plane.width * item_size // (32 * BYTES_PER_THREAD)
    wide = max(plane.block * abs(stride_t), plane.proxies * plane.stride_p) >= 2**31
    return dict(
        HEADS=plane.heads, D=plane.head_dim, WIDTH=plane.width, BLOCK=plane.block, OUTLIERS=plane.outliers,
        MEANS=plane.means, COARSE=0 if coarse is None else coarse.outliers, WIDE=wide,
        num_warps=max(1, min(MOST_WARPS, warps)),
    )  # fmt: skip


def proxies(
    x: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    out: Tensor,
    plane: Plane,
    plan: Plan,
    *,
    row: int,
    count: int,
    slot: str,
    coarse: tuple[Tensor, Plane] | None = None,
) -> None:
    """Write the proxies of the blocks [row, row + count) of every head of x (B, H, L, D), unit last stride.

    ``start`` and ``end``: None, or int32 (B,): real tokens, start <= token < end. ``out``: x's dtype, 1-D, as ``plane``
    lays it out, block ``row`` first. ``coarse``: another such pair, of at most as many outliers and one mean, the
    block's.
    """
    fewer, fewer_plane = (None, None) if coarse is None else coarse
    strides = (0, 0, 0) if fewer_plane is None else (fewer_plane.stride_h, fewer_plane.stride_i, fewer_plane.stride_p)
    args = (
        x, out, fewer, start, end, *x.stride()[:3], plane.stride_h, plane.stride_i, plane.stride_p, *strides,
        plane.length, row, count,
    )  # fmt: skip
    meta = _proxies_meta(plane, fewer_plane, x.stride(2), x.element_size())
    launch(_proxies_kernel, x.shape[0] * plane.heads * count, args, meta, plan, (slot, row))
