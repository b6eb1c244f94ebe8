"""What the published selectors share."""

from __future__ import annotations

import pytest
import torch

from stem_flex import StemConfig, layout, selectors
from stem_flex.reference import selectors as loops
from stem_flex.selectors import published
from tests.selectors.cases import CONFIG, agree, inputs


@pytest.mark.parametrize("name", ["xattention", "flashprefill", "minference", "flexprefill"])
def test_masks_of_any_kind_are_refused(name):
    q, k, v = inputs((1, 2, 1, 64, 64))
    given = layout.from_mask_mod(lambda b, h, i, j: i >= j, None, None, 64, 64)
    with pytest.raises(
        ValueError, match=rf"layout must give every query one interval of keys for {name}, .* selector='stem'"
    ):
        selectors.get(name).scores(q, k, v, CONFIG, layout=given)


@pytest.mark.parametrize("blocks", [(32, 16), (16, 32)])
@pytest.mark.parametrize("name", ["a-shape", "minference", "xattention", "flashprefill"])
def test_blocks_that_are_not_square(name, blocks):
    config = StemConfig(block_size=blocks, stride=8, sink_blocks=0, local_blocks=0)
    case = (1, 2, 1, 150, 150, None, 0)
    rule, fast, options = {
        "a-shape": (loops.a_shape, None, {"initial": 20, "local": 50}),
        "minference": (
            loops.minference,
            {"heads": (("vertical_and_slash", 32, 105),)},
            {"columns": 32, "offsets": 105},
        ),
        "xattention": (loops.xattention, {}, {"threshold": 0.9}),
        "flashprefill": (loops.flashprefill, {}, {"alpha": 0.2, "full_rows": 2}),
    }[name]
    agree(name, case, rule, fast=fast, config=config, **options)


@pytest.mark.parametrize("name", [selector.name for selector in published.SELECTORS if not selector.has_kernels])
def test_a_selector_is_one_graph(name):
    """Those with kernels: tests/kernels/test_selector_ops.py."""
    q, k, v = (x.float() for x in inputs((1, 2, 1, 100, 100)))
    selector = selectors.get(name)
    config = selector.configured(CONFIG)
    torch._dynamo.reset()  # or this function counts as compiled too often
    compiled = torch.compile(lambda q: selector.scores(q, k, v, config), fullgraph=True, backend="eager")
    assert torch.equal(compiled(q), selector.scores(q, k, v, config))
