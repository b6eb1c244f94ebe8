"""A fine sketch of what a coarse one proposes, by Triton against the definition: interpreted, and compiled on a GPU."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from stem_flex import StemConfig, layout, reference
from stem_flex.kernels import sketch_chunks, sketch_fine, sketch_sums
from stem_flex.kernels.sketch_sums import Tile
from stem_flex.selectors import sketch
from tests.kernels.loops import assert_nearly_all_scores, assert_scores, devices, on

pytestmark = pytest.mark.usefixtures("poisoned")

CONFIG = StemConfig(
    block_size=16, stride=8, mu=1.0, routing="sketch", sketch=(3, 4, 2, 2), coarse=(2, 1), budget="mass", threshold=0.3
)
STRUCTURES = {
    "aligned": (160, 272, {"q_offset": 112}),
    "chunk": (41, 333, {"q_offset": 292}),
    "window": (50, 320, {"q_offset": 270, "layout": layout.sliding_window(130)}),
    "left padding": (30, 300, {"q_offset": 270, "layout": layout.padding([290], "left")}),
    "documents": (48, 300, {"q_offset": 140, "layout": layout.documents([0, 7, 150, 300])}),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch) -> None:
    """Several tiles of few blocks in each pass."""
    for name in ("HALF_TILE", "FLOAT_TILE"):
        monkeypatch.setattr(sketch_sums, name, Tile(32, 16, 16, 2, 4, 2))
    monkeypatch.setattr(sketch_fine, "TILE", 16)
    monkeypatch.setattr(sketch_fine, "SCAN", 16)
    monkeypatch.setattr(sketch_fine, "READ", 32)
    sketch_fine._fine_meta.cache_clear()
    yield
    sketch_fine._fine_meta.cache_clear()


def inputs(Hq, Hkv, Lq, Lk, B=1, D=16):
    return torch.randn(B, Hq, Lq, D) * 3 + 0.3, *(torch.randn(B, Hkv, Lk, D) * 2 + 0.2 for _ in range(2))


def compare(device, q, k, v, config, options, capacity=256, tolerance=2e-5):
    """The kernel's scores are the definition's; returns what scores above the threshold."""
    expected = reference.sketch_scores(
        q.double(), k.double(), v.double(), config, sketch=config.sketch, coarse=config.coarse,
        threshold=config.threshold, capacity=capacity, **options,
    )  # fmt: skip
    got = sketch.scores(*on(device, q, k, v), config, impl="triton", **options).cpu()
    assert_scores(got, expected, tolerance)
    return got > config.threshold


@devices
@pytest.mark.parametrize("structure", STRUCTURES)
def test_scores_are_the_definition(device, structure, monkeypatch):
    monkeypatch.setattr(sketch_chunks, "ROWS", 0)
    monkeypatch.setattr(sketch_chunks, "WORKSPACE_BYTES", 1)  # chunks of 16 rows
    Lq, Lk, options = STRUCTURES[structure]
    compare(device, *inputs(2, 1, Lq, Lk), CONFIG, options)


@devices
@pytest.mark.parametrize("threshold", [0.1, 0.02])
def test_crowded_rows_propose_fewer(device, threshold, monkeypatch):
    """More blocks above the slack than there is room for: the bound doubles, past the threshold too."""
    monkeypatch.setattr("stem_flex.budget.PROPOSED", 4)
    config = replace(CONFIG, threshold=threshold, cap=4)
    compare(device, *inputs(1, 1, 41, 333), config, {"q_offset": 292}, capacity=4)


@devices
@pytest.mark.parametrize("coarse", [(0, 0), (3, 2)])
def test_any_part_of_the_outliers(device, coarse):
    """Dims that are no power of two, groups of three heads, two block sizes."""
    config = replace(CONFIG, block_size=(32, 16), coarse=coarse)
    compare(device, *inputs(3, 1, 40, 290, D=24), config, {"q_offset": 250})


@devices
def test_rows_of_a_batch_may_differ(device):
    """Padding, kv_len and offsets of each batch row; what is not real holds NaN and is not seen."""
    q, k, v = inputs(1, 1, 40, 300, B=2)
    offset, lengths = torch.tensor([260, 150]), torch.tensor([281, 187])
    clean = [x.clone() for x in (q, k, v)]
    for b in range(2):
        k[b, :, lengths[b] :] = math.nan
        q[b, :, max(0, int(lengths[b] - offset[b])) :] = math.nan
    options = {"layout": layout.padding(lengths, "right"), "q_offset": offset}
    expected = reference.sketch_scores(*clean, CONFIG, sketch=CONFIG.sketch, coarse=CONFIG.coarse, threshold=0.3,
                                       **options)  # fmt: skip
    options = {"layout": layout.padding(lengths.to(device), "right"), "q_offset": offset.to(device)}
    got = sketch.scores(*on(device, q, k, v), CONFIG, impl="triton", **options).cpu()
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


@devices
def test_class_tables(device):
    """A mask that no interval says, of its own for each head."""

    def mod(b, h, i, j):
        return (i + 230 >= j) & ((j // 40 + h) % 2 == 0)

    compare(device, *inputs(2, 1, 40, 280), CONFIG, {"layout": layout.from_mask_mod(mod, 1, 2, 40, 280)})


@devices
def test_large_logits_stay_exact(device):
    """Logits hundreds apart, the largest in blocks that a row may not see."""
    q, k, v = inputs(1, 1, 64, 320)
    k[:, :, 200:] *= 40
    compare(device, q * 4, k, v, CONFIG, {"q_offset": 130}, tolerance=5e-4)


@devices
def test_a_low_threshold_proposes_everything(device):
    """Then every pair has the fine sketch's own score, as without a coarse one."""
    q, k, v = on(device, *inputs(2, 1, 60, 300))
    config = replace(CONFIG, threshold=1e-12)
    got, whole = (
        sketch.scores(q, k, v, each, impl="triton", q_offset=240) for each in (config, replace(config, coarse=None))
    )
    torch.testing.assert_close(got, whole, atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("coarse", [(4, 1), (8, 2)])
@pytest.mark.parametrize("dim", [64, 128, 192])
def test_compiled_tiles_at_real_sizes(monkeypatch, dtype, coarse, dim):
    """Blocks of 128, the tiles that prompts get, a ragged window: nearly every score as PyTorch's in float32.

    A token may be outlying, or a block be proposed, by a rounding, so a few rows in a hundred may differ.
    """
    monkeypatch.undo()
    sketch_fine._fine_meta.cache_clear()
    q, k, v = (torch.randn(2, h, 9001, dim, device="cuda", dtype=dtype) for h in (8, 2, 2))
    options = {"layout": layout.sliding_window(7000) & layout.padding([9001, 5555])}
    config = replace(StemConfig.mass(0.2), coarse=coarse)
    got = sketch.scores(q * 2, k, v, config, impl="triton", **options)
    expected = sketch.scores(q * 2, k, v, config, impl="torch", **options)
    assert_nearly_all_scores(got, expected, dtype, 3e-2)
