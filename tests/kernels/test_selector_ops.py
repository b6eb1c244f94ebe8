"""The published selectors' operators: graphs, strides, refusals, and whole selectors as one graph."""

from __future__ import annotations

import pytest
import torch

from stem_flex import StemConfig, selectors
from stem_flex.kernels import cell_tiles, cells, selector_ops
from stem_flex.kernels.selector_ops import Cut, Operands
from tests.kernels.loops import devices, on

pytestmark = pytest.mark.usefixtures("poisoned")

CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")
NAMES = ("minference", "flexprefill", "xattention", "cosa", "proxyattn", "flashprefill", "vecattention")


def causal_cells(cut: Cut, device: str) -> Operands:
    """Ragged prompts of 70 tokens, two rows of a batch, one of them padded."""
    q, k = torch.randn(2, 4, 70, 16), torch.randn(2, 2, 70, 16)
    rows = -(-70 // (cut.tokens * cut.rows)) * cut.rows
    high = torch.arange(1, rows + 1, dtype=torch.int32).clamp(max=-(-70 // cut.tokens))[None]
    valid = (torch.tensor([0, 9]), torch.tensor([70, 70]), torch.tensor([0, 9]), torch.tensor([70, 70]))
    valid = tuple(x.int() for x in valid) if cut.tokens > 1 else (None,) * 4
    q, k, low, high, *valid = on(device, q, k, torch.zeros_like(high), high, *valid)
    return Operands(q, k, (low, high), tuple(valid), cut, 0.3)


def arguments(operands: Operands) -> tuple[tuple, dict]:
    given = operands.q, operands.k, *operands.spans, *operands.valid
    return given, {"cut": list(operands.cut), "scale": operands.scale}


@devices
@pytest.mark.parametrize(
    ("name", "cut", "more"),
    [
        ("cell_mass", Cut(4, 8, 8), {"causal_offset": 0, "step": 4, "sums": True, "peaks": True}),
        ("cell_mass", Cut(1, 16, 16), {"causal_offset": None, "step": 1, "sums": False, "peaks": True}),
        ("cell_peaks", Cut(1, 1, 16), {}),
        ("query_logs", Cut(1, 16, 1), {}),
    ],
)
def test_fake_implementations_of_cells_agree(device, name, cut, more):
    given, options = arguments(causal_cells(cut, device))
    torch.library.opcheck(getattr(torch.ops.stem_flex, name), given, options | more, test_utils=CHECKS)


@devices
def test_other_fake_implementations_agree(device):
    q, k, start, end = on(
        device,
        torch.randn(2, 4, 9, 16),
        torch.randn(2, 2, 70, 16),
        torch.zeros(1, 9).int(),
        torch.full((1, 9), 70).int(),
    )
    torch.library.opcheck(torch.ops.stem_flex.tail_sums, (q, k, start, end), test_utils=CHECKS)
    x = torch.rand(2, 3, 5, 7).to(device)
    torch.library.opcheck(torch.ops.stem_flex.largest_bound, (x, 0.5), test_utils=CHECKS)


@devices
def test_what_rows_reach_changes_nothing(device, monkeypatch):
    """Chunks of one tile's rows that are as narrow as the offset and the step say."""
    operands = causal_cells(Cut(4, 8, 8), device)
    whole = selector_ops.cell_mass(operands, peaks=True)
    launched, launch_cells = [], cells._launch_cells
    monkeypatch.setattr(cells, "_launch_cells", lambda *args: launched.append(args[-1]) or launch_cells(*args))
    monkeypatch.setattr(cell_tiles, "FLOAT_TILE", cell_tiles.Tile(16, 16, 32, 4, 2))
    monkeypatch.setattr(cells, "WORKSPACE", 1)
    narrow = selector_ops.cell_mass(operands, 0, 4, peaks=True)
    assert launched == [(0, 16, 16), (16, 8, 18)]  # first row, rows, keys: 18 cells of 4 tokens are 70 and 2
    for one, other in zip(narrow, whole, strict=True):
        torch.testing.assert_close(one, other)


@devices
@pytest.mark.parametrize("name", NAMES)
def test_a_selector_is_one_graph(device, name):
    q, k = on(device, torch.randn(1, 4, 300, 16), torch.randn(1, 2, 300, 16))
    selector = selectors.get(name)
    config = selector.configured(StemConfig(block_size=32, stride=8))

    def score(q, k):
        return selector.scores(q, k, k, config, impl="triton")

    torch._dynamo.reset()  # or this function counts as compiled too often
    compiled = torch.compile(score, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k), score(q, k))
