"""Turn group magnitudes into one bias per key block: ``value_weight * mag(J)``, metric ``"zscore"``.

With l_g the log magnitude of group g and mean, std (ddof=1) over all complete groups of the (batch, kv head),

    mag(J) = mean over the n groups of J of relu((l_g - mean) / (std + 1e-6))        0 with fewer than 2 complete groups

Every program combines the per-block (count, mean, M2) of its whole row by Chan's formula, then normalises its own
blocks: no second launch, no atomics, the same result on every run. (``"log"`` writes its bias while pooling.)

Model: reads ``12*Kb`` bytes a program (from L2; B*Hkv*ceil(Kb/BLOCKS) programs) plus ``4*n*G``, writes ``4*G`` bytes,
G = B*Hkv*Kb. 0.5 MB at 128K tokens, 8 heads: microseconds.
"""

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from stem_flex.kernels.launch import Plan, launch
from stem_flex.kernels.pool import Sizes

# Tuning: key blocks a program normalises, blocks whose statistics it combines at once, warps.
BLOCKS = 64
COMBINE = 1024
MAGNITUDE_WARPS = 4


@triton.jit(do_not_specialize=["k_blocks", "total"])
def _magnitude_kernel(
    stats, k_blocks, total, value_weight,
    N: tl.constexpr, NP: tl.constexpr, BLOCKS: tl.constexpr, COMBINE: tl.constexpr,
):  # fmt: skip
    """One program a tile of BLOCKS key blocks of one (batch, kv head). ``total`` is G, N the groups a block."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(k_blocks, BLOCKS)
    G = total.to(tl.int64)
    row = (pid // tiles).to(tl.int64) * k_blocks
    count = 0.0
    mean = 0.0
    spread = 0.0
    for start in range(0, k_blocks, COMBINE):
        at = start + tl.arange(0, COMBINE)
        inside = at < k_blocks
        c = tl.load(stats + G + row + at, mask=inside, other=0.0)
        m = tl.load(stats + 2 * G + row + at, mask=inside, other=0.0)
        s = tl.load(stats + 3 * G + row + at, mask=inside, other=0.0)
        tile_count = tl.sum(c, axis=0)
        top = tl.max(tl.where(c > 0, m, float("-inf")), axis=0)  # as in pooling: equal means stay exact
        top = tl.where(tile_count > 0, top, 0.0)
        tile_mean = top + tl.sum(tl.where(c > 0, c * (m - top), 0.0), axis=0) / tl.maximum(tile_count, 1.0)
        tile_spread = tl.sum(s + c * (m - tile_mean) * (m - tile_mean), axis=0)
        both = tl.maximum(count + tile_count, 1.0)
        delta = tile_mean - mean
        spread += tile_spread + delta * delta * (count * tile_count / both)
        mean += delta * (tile_count / both)
        count += tile_count
    std = tl.sqrt(spread / tl.maximum(count - 1.0, 1.0))

    j = (pid % tiles) * BLOCKS + tl.arange(0, BLOCKS)
    g = tl.arange(0, NP)
    mask = (j < k_blocks)[:, None] & (g < N)[None, :]
    logs = tl.load(stats + 4 * G + (row + j)[:, None] * N + g[None, :], mask=mask, other=float("-inf"))
    z = tl.maximum((logs - mean) / (std + 1e-6), 0.0)
    magnitude = tl.where(count >= 2.0, tl.sum(z, axis=1) / N, 0.0)
    tl.store(stats + row + j, value_weight * magnitude, mask=j < k_blocks)


@lru_cache(maxsize=256)
def _magnitude_meta(groups: int, blocks: int, combine: int) -> dict[str, object]:
    """Compile-time arguments and options."""
    power = triton.next_power_of_2(groups)
    return dict(N=groups, NP=power, BLOCKS=blocks, COMBINE=combine, num_warps=MAGNITUDE_WARPS)


def magnitude(stats: Tensor, sizes: Sizes, value_weight: float, plan: Plan) -> None:
    """Fill the bias plane of ``stats`` from its statistics (`stem_flex.kernels.pool`), metric ``"zscore"``."""
    programs = sizes.batch * sizes.kv_heads * -(-sizes.k_blocks // BLOCKS)
    args = (stats, sizes.k_blocks, sizes.key_blocks, value_weight)
    launch(_magnitude_kernel, programs, args, _magnitude_meta(sizes.groups, BLOCKS, COMBINE), plan, "magnitude")
