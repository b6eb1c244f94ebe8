"""Phase means of every block and magnitudes of every group, one pass over q, k, v."""

from __future__ import annotations

from stem_flex.kernels.pool import pool, sizes_of


def test_pool(timed, qkv):
    q, k, v = qkv
    sizes = sizes_of(tuple(q.shape), tuple(k.shape), v.shape[-1], 128, 128, 8)
    flats, _ = timed(lambda: pool(q, k, v, None, None, None, None, sizes, "zscore", 0.2, {}))
    assert flats.dtype == q.dtype
