"""Masks that FlexAttention's users publish compose with Stem through from_mask_mod."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from stem_flex import StemConfig, compose, layout, reference, stem_block_mask, testing
from stem_flex.plumbing.tables import block_classes

N, SIZE = 300, 32
CONFIG = StemConfig(block_size=SIZE, schedule="fixed", k_start=2, sink_blocks=1, local_blocks=1)
DOCUMENT = torch.repeat_interleave(torch.arange(4), torch.tensor([70, 110, 33, 87]))


def sliding_window(b, h, q, kv):
    return (q >= kv) & (q - kv < 75)


def prefix_lm(b, h, q, kv):
    return (q >= kv) | (kv < 90)


def document(b, h, q, kv):
    return (q >= kv) & (DOCUMENT[q] == DOCUMENT[kv])


def dilated(b, h, q, kv):
    return (q >= kv) & ((q - kv) % 4 == 0) & (q - kv < 200)


def global_and_window(b, h, q, kv):
    return (q >= kv) & ((kv < 10) | (q - kv < 50))


def neighborhood_2d(b, h, q, kv):
    """Pixels of a 15 x 20 image within 2 rows and 3 columns of each other."""
    return ((q // 20 - kv // 20).abs() <= 2) & ((q % 20 - kv % 20).abs() <= 3)


PUBLISHED = (sliding_window, prefix_lm, document, dilated, global_and_window, neighborhood_2d)


@pytest.fixture(params=PUBLISHED, ids=lambda f: f.__name__)
def mod(request):
    return request.param


def test_classes_are_those_of_create_block_mask(mod):
    ours = layout.from_mask_mod(mod, 1, 1, N, N).bind(1, 1, N, N, block_size=(SIZE, SIZE)).classes
    theirs = create_block_mask(mod, 1, 1, N, N, device="cpu", BLOCK_SIZE=SIZE)
    assert torch.equal(ours, block_classes(theirs))


def test_stem_chooses_among_what_the_mask_allows(make_qkv, mod):
    q, k, v = make_qkv(B=2, Hq=4, Hkv=2, Lq=N)
    structure = layout.from_mask_mod(mod, 1, 1, N, N)
    mask = stem_block_mask(q, k, v, CONFIG, layout=structure)
    testing.assert_valid_block_mask(mask)
    assert torch.equal(block_classes(mask) > 0, reference.block_keep(q, k, v, CONFIG, layout=structure))


def test_composed_with_a_causal_stem_mask(make_qkv, mod):
    q, k, v = make_qkv(B=2, Hq=4, Hkv=2, Lq=N)
    causal = stem_block_mask(q, k, v, CONFIG)
    both = compose(causal, mod)
    tokens = testing.block_mask_to_dense(causal) & reference.token_mask(
        layout.from_mask_mod(mod, 1, 1, N, N), 2, 4, N, N
    )
    assert torch.equal(testing.block_mask_to_dense(both), tokens)
