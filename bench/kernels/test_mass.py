"""The true attention mass of every pair of blocks, the oracle."""

from __future__ import annotations

from stem_flex.selectors.oracle import block_mass


def test_mass(timed, qkv):
    q, k, _ = (x[:, :, :32768] for x in qkv)
    assert timed(lambda: block_mass(q, k, (128, 128)))[0].shape[-1] == 256
