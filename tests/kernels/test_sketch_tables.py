"""Tables chosen by sketched mass in one streamed operator, against scores and selection apart."""

from __future__ import annotations

import pytest
import torch

from stem_flex import StemConfig, layout, stem_block_mask
from stem_flex.budget import Mass
from stem_flex.kernels import sketch_chunks, sketch_sums
from stem_flex.plumbing.tables import block_classes
from stem_flex.select import select_blocks
from stem_flex.selectors import sketch
from tests.kernels.loops import devices, on

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch) -> None:
    """Tiles of few blocks: the interpreter takes all of a tile's time for a corner of it."""
    for name in ("HALF_TILE", "FLOAT_TILE"):
        monkeypatch.setattr(sketch_sums, name, sketch_sums.Tile(64, 16, 16, 2, 4, 2))


def config_of(**options) -> StemConfig:
    return StemConfig(
        block_size=32, routing="sketch", sketch=(2, 8, 1, 8), sink_blocks=1, local_blocks=1, **{"mu": 1.0, **options}
    )


STRUCTURES = {
    "causal": {},
    "chunk": dict(q_offset=64),
    "padding": dict(layout=layout.padding([110, 67])),
    "documents": dict(layout=layout.documents([0, 50, 110])),
}


@devices
@pytest.mark.parametrize(
    ("structure", "mu", "coarse"),
    [
        ("causal", 1.0, None),
        ("causal", 0.5, (1, 1)),
        ("chunk", 1.0, None),
        ("padding", 0.5, None),
        ("padding", 1.0, (1, 1)),
        ("documents", 1.0, None),
    ],
)
def test_streamed_tables_keep_what_scores_and_selection_keep(device, structure, mu, coarse, make_qkv, monkeypatch):
    """Chunks of 16 rows, floor and cap active: blocks as from the same scores by the rule, in PyTorch."""
    monkeypatch.setattr(sketch_chunks, "ROWS", 0)
    monkeypatch.setattr(sketch_chunks, "WORKSPACE_BYTES", 1)
    options = STRUCTURES[structure]
    offset = options.get("q_offset", 0)
    q, k, v = on(device, *make_qkv(2, 2, 1, 110 - offset, 16, Lk=110))
    q = q * 3
    config = config_of(budget="mass", threshold=0.3, floor=2, cap=3, mu=mu, coarse=coarse)
    mask = stem_block_mask(q, k, v, config, impl="triton", **options)
    bound = mask.structure
    scores = sketch.scores(q, k, v, config, layout=bound, impl="triton")
    expected = select_blocks(scores, bound, config, budget=Mass(0.3, 2, 3), impl="torch")
    expected = expected.block_mask(bound.mask_mod, bound.seq_lengths, bound.block_size)
    assert torch.equal(block_classes(mask), block_classes(expected))
    assert len(set(block_classes(mask).gt(0).sum(-1).flatten().tolist())) > 1
