"""Logits of cells reduced by block, against loops over cells in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stem_flex.kernels import cell_tiles, cells
from stem_flex.kernels.cells import Cut, Operands
from tests.kernels.loops import TOLERANCE, devices

# batch, query and key heads, Lq, Lk, D, cut, padded
CASES = {
    "aligned": (1, 1, 1, 128, 128, 16, Cut(8, 4, 4), False),
    "ragged, GQA, batch": (2, 2, 1, 43, 75, 24, Cut(4, 2, 4), False),
    "padded": (2, 1, 1, 71, 80, 16, Cut(4, 8, 2), True),
    "one token": (2, 2, 1, 30, 43, 24, Cut(1, 16, 32), False),
    "a cell a block": (1, 1, 1, 64, 80, 16, Cut(16, 1, 1), False),
}
both = pytest.mark.parametrize("case", CASES)


def cell_of(x: Tensor, cell: int, tokens: int, valid: tuple[int, int], reverse: bool) -> Tensor:
    """``tokens`` tokens end to end, zeros for padding."""
    places = [cell * tokens + r for r in range(tokens)]
    rows = [x[t] if valid[0] <= t < min(valid[1], x.shape[0]) else torch.zeros_like(x[0]) for t in places]
    return torch.cat(rows[::-1] if reverse else rows)


def logits_of(operands: Operands) -> Tensor:
    """(B, Hq, rows, key cells) in float64, -inf where the spans allow nothing."""
    q, k, (lo, hi), valid, cut, scale = operands
    rows, keys = lo.shape[1], -(-k.shape[2] // cut.tokens)
    found = torch.full((*q.shape[:2], rows, keys), -math.inf, dtype=torch.float64)
    for b in range(q.shape[0]):
        ranges = [0 if x is None else int(x[b]) for x in valid]
        key_range = (0, k.shape[2]) if valid[0] is None else (ranges[0], ranges[1])
        query_range = (0, q.shape[2]) if valid[2] is None else (ranges[2], ranges[3])
        for h in range(q.shape[1]):
            head = h // (q.shape[1] // k.shape[1])
            right = [cell_of(k[b, head].double().cpu(), j, cut.tokens, key_range, False) for j in range(keys)]
            for a in range(rows):
                first, last = int(lo[b % lo.shape[0], a]), int(hi[b % lo.shape[0], a])
                if last > first:
                    left = cell_of(q[b, h].double().cpu(), a, cut.tokens, query_range, True)
                    for j in range(first, last):
                        found[b, h, a, j] = scale * (left @ right[j])
    return found


def by_block(logits: Tensor, columns: int) -> Tensor:
    return torch.nn.functional.pad(logits, (0, -logits.shape[-1] % columns), value=-math.inf).unflatten(
        -1, (-1, columns)
    )


def made(case: str, dtype: torch.dtype, device: str) -> Operands:
    """Random vectors and spans, some of them empty; q and k strided as BSHD."""
    batch, heads, kv_heads, q_len, k_len, dim, cut, padded = CASES[case]
    shapes = (batch, q_len, heads, dim), (batch, k_len, kv_heads, dim)
    q, k = (torch.randn(shape).mul(2 / cut.tokens**0.25).to(dtype).transpose(1, 2).to(device) for shape in shapes)
    rows = -(-q_len // (cut.tokens * cut.rows)) * cut.rows
    keys = -(-k_len // cut.tokens)
    hi = torch.randint(0, keys + 1, (batch, rows), dtype=torch.int32)
    lo = (hi - torch.randint(0, keys, (batch, rows), dtype=torch.int32)).clamp(min=0)
    hi[:, -(-q_len // cut.tokens) :] = 0
    valid = (torch.tensor([3, 10]), torch.tensor([77, 50]), torch.tensor([0, 7]), torch.tensor([65, 71]))
    ranges = tuple(x.int().to(device) for x in valid) if padded else (None,) * 4
    return Operands(q, k, (lo.to(device), hi.to(device)), ranges, cut, dim**-0.5)


@devices
@both
@pytest.mark.parametrize(
    ("dtype", "sums", "peaks"),
    [(torch.float32, True, False), (torch.float32, False, True), (torch.bfloat16, True, True)],
)
def test_cell_mass(device, case, dtype, sums, peaks, poisoned):
    """One softmax a row (or its largest logit as normaliser), by block, then over the rows."""
    operands = made(case, dtype, device)
    logits = logits_of(operands)
    blocks = by_block(logits, operands.cut.columns)
    top = logits.amax(-1)[..., None] if not sums else logits.logsumexp(-1)[..., None]
    entries = blocks.amax(-1) if peaks else blocks.logsumexp(-1)
    weights = torch.where(top == -math.inf, 0.0, (entries - top).exp()).unflatten(2, (-1, operands.cut.rows))
    total, peak = cells.cell_mass(operands, sums=sums, peaks=peaks)
    tolerance = {"atol": 4 * TOLERANCE[dtype], "rtol": 4 * TOLERANCE[dtype]}
    torch.testing.assert_close(total.double().cpu(), weights.sum(3), **tolerance)
    torch.testing.assert_close(peak.double().cpu(), weights.amax(3), **tolerance)


@devices
@pytest.mark.parametrize("case", ["aligned", "one token"])
def test_cell_mass_of_causal_rows(device, case, poisoned, monkeypatch):
    """Chunks of rows that are as narrow as the host knows them to be."""
    operands = made(case, torch.float32, device)
    rows, keys = operands.spans[0].shape[1], -(-operands.k.shape[2] // operands.cut.tokens)
    hi = torch.arange(1, rows + 1, dtype=torch.int32, device=device).clamp(max=keys)[None]
    operands = operands._replace(spans=(torch.zeros_like(hi), hi))
    monkeypatch.setattr(cell_tiles, "FLOAT_TILE", cell_tiles.Tile(16, 16, 32, 4, 2))
    whole = cells.cell_mass(operands)
    monkeypatch.setattr(cells, "WORKSPACE", 1)
    narrow = cells.cell_mass(operands, 0, operands.cut.tokens)
    torch.testing.assert_close(narrow, whole)
    torch.testing.assert_close(
        narrow[0].sum(-1), torch.full_like(narrow[0][..., 0], operands.cut.rows), atol=1e-4, rtol=0
    )


@devices
@both
def test_cell_peaks(device, case, poisoned):
    operands = made(case, torch.float32, device)
    expected = by_block(logits_of(operands), operands.cut.columns).amax(-1)
    found = cells.cell_peaks(operands).cpu() * math.log(2)
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=1e-5)


@devices
def test_query_logs(device, poisoned):
    """Sums over the queries of a block, key by key."""
    operands = made("one token", torch.float32, device)
    expected = logits_of(operands).unflatten(2, (-1, operands.cut.rows)).logsumexp(3)
    found = cells.query_logs(operands._replace(cut=Cut(1, operands.cut.rows, 1))).cpu() * math.log(2)
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("item_size", [2, 4])
@pytest.mark.parametrize("block", [16, 128, 256, 512, 1024])
@pytest.mark.parametrize("tokens", [1, 16])
def test_tiles_fit_registers_and_shared_memory(item_size, block, tokens):
    """128 sums a thread, operands within 200 KB, one block in one tile; blocks of 128 keep what was tuned."""
    for by_query in (False, True):
        cut = Cut(tokens, block // tokens, 1) if by_query else Cut(tokens, 1, block // tokens)
        if 0 in cut:
            continue
        tile = cell_tiles.tile_of(item_size, cut, 128, by_query=by_query)
        assert tile.block_m * tile.block_n <= 32 * 128 * tile.warps
        assert (tile.block_m + tile.block_n) * tile.block_d * item_size * tile.stages <= 200 * 1024
        assert (tile.block_m % cut.rows if by_query else tile.block_n % cut.columns) == 0
        if block <= 128:
            tuned = (
                cell_tiles.FLOAT_TILE
                if item_size == 4
                else cell_tiles.LONG_TILE
                if tokens == 16
                else cell_tiles.HALF_TILE
            )
            sides = (max(tuned.block_m, cut.rows), tuned.block_n) if by_query else (
                tuned.block_m, max(tuned.block_n, cut.columns))  # fmt: skip
            assert tile == tuned._replace(block_m=sides[0], block_n=sides[1])


@devices
@pytest.mark.parametrize("block", [256, 512])
def test_long_blocks(device, block, poisoned):
    """Key blocks and query blocks of more tokens than a tile has by itself."""
    q, k = (torch.randn(1, h, 600, 16) for h in (2, 1))
    hi = torch.arange(1, 601, dtype=torch.int32)[None]
    rows = torch.nn.functional.pad(hi, (0, -600 % 64))
    spans = torch.zeros_like(rows).to(device), rows.to(device)
    operands = Operands(q.to(device), k.to(device), spans, (None,) * 4, Cut(1, 64, block), 0.25)
    expected = 0.25 * torch.einsum("bhid, bhjd -> bhij", q, k.expand_as(q)).double()
    expected = expected.masked_fill(torch.ones(600, 600, dtype=torch.bool).triu(1), -math.inf)
    total, _ = cells.cell_mass(operands, 0)
    weights = torch.nn.functional.pad(expected.softmax(-1), (0, -600 % block, 0, -600 % 64))
    by_block = weights.unflatten(3, (-1, block)).sum(-1).unflatten(2, (-1, 64)).sum(3)
    torch.testing.assert_close(total.double().cpu(), by_block, atol=1e-4, rtol=1e-5)
    whole = torch.nn.functional.pad(hi, (0, -600 % block)).to(device)
    logs = cells.query_logs(operands._replace(spans=(torch.zeros_like(whole), whole), cut=Cut(1, block, 1)))
    of_block = torch.nn.functional.pad(expected, (0, 0, 0, -600 % block), value=-math.inf)
    found = logs.cpu().double() * math.log(2)
    torch.testing.assert_close(found, of_block.unflatten(2, (-1, block)).logsumexp(3), atol=2e-5, rtol=1e-5)


def test_other_dtypes_are_refused():
    operands = made("one token", torch.float32, "cpu")
    with pytest.raises(TypeError, match=r"q and k must share a dtype of .*, got torch.float64"):
        cells.cell_peaks(operands._replace(q=operands.q.double(), k=operands.k.double()))
