"""Masks and layouts pickle and copy, before and after use, and `_adjust` keeps the blocks that are named."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from stem_flex import StemConfig, compose, layout, reference, stem_block_mask, testing
from stem_flex.mask import layout_block_mask
from stem_flex.plumbing import recipes
from stem_flex.plumbing.tables import block_classes

CONFIG = StemConfig(block_size=16, schedule="fixed", k_start=2, sink_blocks=1, local_blocks=1)


def dilated(b, h, i, j):
    return (i >= j) & ((i - j) % 3 == 0)


LAYOUTS = {
    "causal": layout.causal,
    "full": layout.full,
    "window": lambda: layout.sliding_window(30),
    "documents": lambda: layout.documents([0, 30, 100]),
    "ids": lambda: layout.documents(ids=torch.arange(100) // 37),
    "padding": lambda: layout.padding(torch.tensor([100, 71])),
    "prefix": lambda: layout.prefix(torch.tensor([9, 40])),
    "&": lambda: layout.causal() & layout.padding([100, 71]) & layout.sliding_window(30),
    "mask_mod": lambda: layout.causal() & layout.from_mask_mod(dilated, None, None, 100, 100),
    "block mask": lambda: layout.from_block_mask(create_block_mask(dilated, 1, 1, 100, 100, "cpu", 32)),
    "own mask": lambda: layout.from_block_mask(layout_block_mask(layout.sliding_window(50), 1, 1, 100, 100)),
}  # fmt: skip


def through_torch(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "torch.save": through_torch,
}


def said(mask) -> tuple[torch.Tensor, torch.Tensor]:
    """The blocks that a mask lists and the tokens that its mask_mod allows."""
    batch, heads = mask.kv_num_blocks.shape[:2]
    return block_classes(mask), create_mask(mask.mask_mod, batch, heads, *mask.seq_lengths, device="cpu")


def assert_same(one, other):
    assert all(torch.equal(*both) for both in zip(said(one), said(other), strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_and_masks_copy_before_and_after_use(make_qkv, name, way):
    again, (q, k, v), structure = WAYS[way], make_qkv(Hq=2, Hkv=1, Lq=100), LAYOUTS[name]()
    fresh = again(structure)
    masks = [stem_block_mask(q, k, v, CONFIG, layout=structure, mask_mod=kind) for kind in ("layout", "exact")]
    for other in (fresh, again(structure)):
        assert_same(stem_block_mask(q, k, v, CONFIG, layout=other), masks[0])
    for mask in masks:
        copied = again(mask)
        assert isinstance(copied, type(mask))
        assert_same(copied, mask)
        assert (copied.mask_mod is copied.structure.mask_mod) == (mask is masks[0])
        composed = [compose(one, layout.sliding_window(40)) for one in (mask, copied)]
        assert_same(*composed)
        assert_same(again(composed[1]), composed[0])
        assert_same(again(copied), mask)


def test_a_copy_does_not_share_what_the_original_remembers():
    structure = layout.padding(torch.tensor([100, 71]))
    bound = structure.bind(2, 4, 100, 100, block_size=(16, 16))
    other = copy.deepcopy(structure)
    structure.lengths.fill_(50)
    assert torch.equal(other.bind(2, 4, 100, 100, block_size=(16, 16)).rows, bound.rows)
    assert not torch.equal(structure.bind(2, 4, 100, 100, block_size=(16, 16)).rows, bound.rows)


def test_recipes_are_forgotten_with_their_functions():
    gc.collect()
    before = len(recipes._recipes)
    pickle.loads(pickle.dumps(layout_block_mask(layout.sliding_window(5), 1, 1, 64, 64)))
    assert len(recipes._recipes) > 0
    gc.collect()
    assert len(recipes._recipes) <= before


@pytest.mark.parametrize("lengths", [(100, 100), (96, 96), (33, 50), (100, 17)])
@pytest.mark.parametrize("name", ["causal", "padding", "mask_mod"])
def test_adjusted_masks_keep_the_blocks_that_are_named(make_qkv, name, lengths):
    q, k, v = make_qkv(Lq=100)
    mask = stem_block_mask(q, k, v, CONFIG, layout=LAYOUTS[name](), compute_q_blocks=True)
    adjusted = mask._adjust(*lengths)
    testing.assert_valid_block_mask(adjusted, check_classes=False)
    assert adjusted.seq_lengths == lengths
    assert adjusted.q_indices is not None
    expected = reference.dense_mask(mask)[:, :, : lengths[0], : lengths[1]]
    assert torch.equal(reference.dense_mask(adjusted), expected)
    rows, columns = (-(-length // 16) for length in lengths)
    kept = block_classes(adjusted) > 0
    assert torch.equal(kept, block_classes(mask)[:, :, :rows, :columns] > 0)
    whole = block_classes(adjusted) == 2
    assert not whole[:, :, lengths[0] // 16 :].any()
    assert not whole[..., lengths[1] // 16 :].any()


def test_masks_are_not_adjusted_to_longer_lengths(make_qkv):
    q, k, v = make_qkv(Lq=100)
    with pytest.raises(ValueError, match="_adjust must be given lengths of at most"):
        stem_block_mask(q, k, v, CONFIG)._adjust(101, 100)
