"""Sums of the last queries' attention by Triton against PyTorch row by row: in Triton's interpreter, and compiled."""

from __future__ import annotations

import pytest
import torch

from stem_flex.kernels.tail import tail_sums
from tests.kernels.loops import devices, on

pytestmark = pytest.mark.usefixtures("poisoned")

# batch, query heads, KV heads, queries, keys, dim, dtype
CASES = {
    "few": (1, 2, 1, 5, 40, 16, torch.float32),
    "GQA, batch, several steps": (2, 4, 2, 70, 333, 24, torch.float32),
    "chunks of rows, runs": (1, 2, 2, 130, 4200, 32, torch.bfloat16),
    "a run's end": (1, 1, 1, 128, 2048, 16, torch.float16),
    "wide heads": (2, 2, 1, 33, 64, 144, torch.float16),
    "as many queries as keys": (1, 1, 1, 64, 64, 16, torch.float32),
}


def expected(q, k, start, end):
    """In float64, with the weights of all rows in memory."""
    rows, keys = q.shape[2], k.shape[2]
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    key = torch.arange(keys)
    hidden = (key < start[..., None]) | (key >= end[..., None])
    logits = (q.double() @ k.mT * q.shape[3] ** -0.5).masked_fill(hidden[:, None], -torch.inf)
    weights = logits.softmax(-1).nan_to_num(nan=0.0)
    diagonals = weights.new_zeros(*q.shape[:2], rows + keys)
    for row in range(rows):
        diagonals[..., rows - row : rows - row + keys] += weights[:, :, row]
    return weights.sum(2), diagonals


@devices
@pytest.mark.parametrize("case", CASES)
def test_sums(device, case):
    """Causal ends, starts that differ by batch row, a query that sees nothing."""
    batch, heads, kv_heads, rows, keys, dim, dtype = CASES[case]
    q = (2 * torch.randn(batch, rows, heads, dim)).to(dtype).transpose(1, 2)
    k = torch.randn(batch, keys, kv_heads, dim).to(dtype).transpose(1, 2)
    start = torch.randint(0, 4, (batch, 1), dtype=torch.int32).expand(-1, rows)
    end = (keys - rows + 1 + torch.arange(rows, dtype=torch.int32)).expand(batch, -1).clone()
    end[:, 0] = start[:, 0]
    columns, diagonals = expected(q, k, start, end)
    q, k, start, end = on(device, q, k, start, end)
    found = tail_sums(q, k, start, end)
    tolerance = {"rtol": 0, "atol": 2e-3 if dtype != torch.float32 and device == "cuda" else 2e-6 * rows}
    torch.testing.assert_close(found[0].cpu().double(), columns, **tolerance)
    torch.testing.assert_close(found[1].cpu().double(), diagonals, **tolerance)
    assert found[0].dtype == torch.float32


@devices
def test_whole_runs_out_of_a_window(device):
    """Rows that see the last 300 of 4,200 keys, none of the first run, and the plan of a call with fewer rows."""
    q, k = torch.randn(2, 2, 9, 16), torch.randn(2, 2, 4200, 16)
    end = torch.arange(4192, 4201, dtype=torch.int32)[None]
    for batch in (1, 2, 1):
        given = q[:batch], k[:batch], end - 300, end
        for one, other in zip(tail_sums(*on(device, *given)), expected(*given), strict=True):
            torch.testing.assert_close(one.cpu().double(), other, rtol=0, atol=2e-5)


@devices
def test_what_is_no_number_stays_visible(device):
    """As in PyTorch: all keys of the rows that see it, so that no sum is quietly wrong."""
    q, k = torch.randn(1, 1, 4, 16), torch.randn(1, 1, 2500, 16)
    k[0, 0, 2100, 3] = torch.nan
    start = torch.tensor([[0, 0, 0, 2200]], dtype=torch.int32)
    end = torch.tensor([[2497, 2498, 2000, 2500]], dtype=torch.int32)
    assert torch.isnan(tail_sums(*on(device, q, k, start, end))[0]).all()
    end[:, :2] = 2000
    found, sums = tail_sums(*on(device, q, k, start, end)), expected(q, k.nan_to_num(), start, end)
    for one, other in zip(found, sums, strict=True):
        torch.testing.assert_close(one.cpu().double(), other, rtol=0, atol=2e-5)


@devices
def test_spans_of_one_row_serve_the_whole_batch(device):
    q, k = torch.randn(3, 2, 20, 16), torch.randn(3, 1, 90, 16)
    start = torch.zeros(1, 20, dtype=torch.int32)
    end = torch.arange(71, 91, dtype=torch.int32)[None]
    sums = expected(q, k, start, end)
    for one, other in zip(tail_sums(*on(device, q, k, start, end)), sums, strict=True):
        torch.testing.assert_close(one.cpu().double(), other, rtol=0, atol=4e-5)
