"""The sketch's scores by Triton against the definition: in Triton's interpreter on the CPU, compiled on the GPU."""

from __future__ import annotations

import math

import pytest
import torch

from stem_flex import StemConfig, layout, reference
from stem_flex.kernels import sketch_chunks, sketch_mass, sketch_sums
from stem_flex.kernels.scores import Chunk
from stem_flex.kernels.sketch_chunks import Chunks
from stem_flex.kernels.sketch_sums import Tile
from stem_flex.selectors import sketch
from tests.kernels.loops import assert_nearly_all_scores, assert_scores, devices, on

pytestmark = pytest.mark.usefixtures("poisoned")

CONFIG = StemConfig(block_size=16, stride=8)
SIZES = (2, 4, 1, 2)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch) -> None:
    """Several tiles of few blocks, two of them a program, so that plain and edge tiles meet."""
    for name in ("HALF_TILE", "FLOAT_TILE"):
        monkeypatch.setattr(sketch_sums, name, Tile(32, 16, 16, 2, 4, 2))


def inputs(B, Hq, Hkv, Lq, Lk, D, dtype=torch.float32):
    q, k = torch.randn(B, Hq, Lq, D) * 2 + 0.3, torch.randn(B, Hkv, Lk, D) * 2 + 0.2
    return q.to(dtype), k.to(dtype), k.to(dtype)


def compare(device, q, k, v, config, tolerance, options, sizes=SIZES):
    """The kernels' scores (0 to 2) within ``tolerance`` of the definition's, and -inf in the same places."""
    expected = reference.sketch_scores(q.double(), k.double(), v.double(), config, sketch=sizes, **options)
    got = sketch.scores(*on(device, q, k, v), config, sketch=sizes, impl="triton", **options).cpu()
    assert_scores(got, expected, tolerance)
    return got, expected


STRUCTURES = {
    "aligned": (320, 320, {}),
    "ragged": (41, 333, {"q_offset": 292}),
    "window": (50, 320, {"q_offset": 270, "layout": layout.sliding_window(130)}),
    "full": (20, 330, {"layout": layout.full()}),
}


@devices
@pytest.mark.parametrize("structure", STRUCTURES)
def test_scores_are_the_definition(device, structure, monkeypatch):
    monkeypatch.setattr(sketch_chunks, "ROWS", 0)
    monkeypatch.setattr(sketch_chunks, "WORKSPACE_BYTES", 1)  # chunks of 16 rows
    Lq, Lk, options = STRUCTURES[structure]
    compare(device, *inputs(1, 1, 1, Lq, Lk, 16), CONFIG, 2e-5, options)


@devices
@pytest.mark.parametrize("heads", [(3, 1), (4, 2)])
def test_groups_share_keys(device, heads):
    """Several query heads of a key head, dims that are no power of two, query and key blocks of two sizes."""
    config = StemConfig(block_size=(32, 16), stride=8)
    compare(device, *inputs(1, *heads, 40, 290, 24), config, 2e-5, {"q_offset": 250}, (2, 4, 0, 2))


@devices
def test_rows_of_a_batch_may_differ(device):
    """Padding, kv_len and offsets of each batch row; what is not real holds NaN and is not seen."""
    q, k, v = inputs(2, 1, 1, 40, 300, 16)
    offset, lengths = torch.tensor([260, 150]), torch.tensor([281, 187])
    for b in range(2):
        k[b, :, lengths[b] :] = math.nan
        q[b, :, max(0, int(lengths[b] - offset[b])) :] = math.nan
    options = {"layout": layout.padding(lengths, "right"), "q_offset": offset}
    clean = [x.nan_to_num() for x in (q, k, v)]
    expected = reference.sketch_scores(*clean, CONFIG, sketch=SIZES, **options)
    options["layout"] = layout.padding(lengths.to(device), "right")
    options["q_offset"] = offset.to(device)
    got = sketch.scores(*on(device, q, k, v), CONFIG, sketch=SIZES, impl="triton", **options).cpu()
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


@devices
def test_left_padding_and_documents(device):
    padded = {"layout": layout.padding([290], "left"), "q_offset": 270}
    compare(device, *inputs(1, 1, 1, 30, 300, 16), CONFIG, 2e-5, padded)
    documents = {"layout": layout.documents([0, 7, 150, 300]), "q_offset": 140}
    compare(device, *inputs(1, 1, 1, 48, 300, 16), CONFIG, 2e-5, documents)


@devices
def test_class_tables(device):
    """A mask that no interval says, of its own for each head."""

    def mod(b, h, i, j):
        return (i + 230 >= j) & ((j // 40 + h) % 2 == 0)

    q, k, v = inputs(1, 2, 1, 40, 280, 16)
    compare(device, q, k, v, CONFIG, 2e-5, {"layout": layout.from_mask_mod(mod, 1, 2, 40, 280)})


@devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_scores(device, dtype):
    """Twice the error of the same computation by PyTorch in that type at most, proxies and products rounded to it."""
    q, k, v = inputs(1, 2, 1, 48, 300, 16, dtype)
    options = {"q_offset": 252}
    expected = reference.sketch_scores(*(x.double() for x in (q, k, v)), CONFIG, sketch=SIZES, **options)
    bound = layout.causal().bind(1, 2, 48, 300, q_offset=252, block_size=(16, 16))
    rounded = _rounded_scores(q, k, bound, dtype)
    allowed = ~expected.isneginf()
    by_torch = (rounded.double() - expected)[allowed].abs().max()
    compare(device, q, k, v, CONFIG, 2 * float(by_torch), options)


def _rounded_scores(q, k, bound, dtype):
    """The PyTorch path with every proxy, logit and mass rounded to ``dtype``."""
    (queries, weight), (keys, stood_for) = sketch.proxies(q, 16, *SIZES[:2]), sketch.proxies(k, 16, *SIZES[2:])
    keys = keys.to(dtype).repeat_interleave(q.shape[1] // k.shape[1], 1).flatten(2, 3)
    logits = torch.einsum("bhiad,bhnd->bhian", queries.to(dtype), keys) / math.sqrt(q.shape[-1])
    logits = logits + stood_for.log().to(dtype).flatten()
    hidden = ~bound.allowed().repeat_interleave(sum(SIZES[2:]), -1)[:, :, :, None]
    mass = logits.masked_fill(hidden, -math.inf).softmax(-1).unflatten(-1, (-1, sum(SIZES[2:]))).sum(-1)
    share = (weight / weight.sum(-1, keepdim=True)).to(dtype)[:, None, ..., None]
    return ((mass * share).sum(3) + mass.masked_fill(share == 0, 0).amax(3)).masked_fill(~bound.allowed(), -math.inf)


@devices
def test_large_logits_stay_exact(device):
    """Logits hundreds apart, the largest in blocks that a row may not see: nothing overflows or is drowned."""
    q, k, v = inputs(1, 1, 1, 64, 320, 16)
    k[:, :, 200:] *= 40
    compare(device, q * 4, k, v, CONFIG, 5e-4, {"q_offset": 130})


@devices
def test_rows_are_counted_in_passing(device, monkeypatch):
    """Chunks of 16 rows, not full: allowed pairs are written, those above one threshold or each row's are counted."""
    q, k, v = inputs(1, 2, 1, 19 * 16, 19 * 16, 16)
    expected = reference.sketch_scores(q, k, v, CONFIG, sketch=SIZES)[0]
    q, k, rows = on(device, q, k, layout.causal().bind(1, 2, 304, 304, block_size=(16, 16)).rows)
    monkeypatch.setattr(sketch_chunks, "ROWS", 0)
    monkeypatch.setattr(sketch_chunks, "WORKSPACE_BYTES", 1)
    sizes = sketch_mass.sizes_of(q, k, 16, 16, SIZES)
    counts = torch.full((1, 2, 19), -1, dtype=torch.int32, device=device)
    levels = torch.rand(1, 2, 19, device=device) / 2
    for place, threshold in enumerate((levels, 0.25)):
        chunks = Chunks(q, k, rows, (None,) * 5, sizes, None, 0, threshold, 0, {})
        assert chunks.cut == (Chunk(0, 16, 16), Chunk(16, 3, 19))
        chunk = chunks.cut[place]
        out = torch.full((2, 16, 32), math.nan, device=device)
        chunks.score(chunk, out, 16 * 32, 32, full=False, counts=counts)
        part = slice(chunk.row, chunk.row + chunk.height)
        allowed = ~expected[:, part].isneginf()
        assert torch.equal(~out[:, : chunk.height, :19].isnan().cpu(), allowed)
        got = out[:, : chunk.height, :19].nan_to_num(-1)
        torch.testing.assert_close(got.cpu()[allowed], expected[:, part][allowed], atol=2e-5, rtol=0)
        above = got > (threshold[0, :, part, None] if isinstance(threshold, torch.Tensor) else threshold)
        assert torch.equal(counts[0, :, part], above.sum(-1, dtype=torch.int32))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("sizes", [(16, 8, 4, 8), (0, 16, 0, 16)])
@pytest.mark.parametrize("dim", [64, 128, 192])
def test_compiled_tiles_at_real_sizes(monkeypatch, dtype, sizes, dim):
    """Blocks of 128, the tiles that prompts get, a ragged window: nearly every score as PyTorch's in float32.

    A token may be outlying by a rounding, so a few rows in a thousand may differ.
    """
    monkeypatch.undo()
    q, k, v = (torch.randn(2, h, 9001, dim, device="cuda", dtype=dtype) for h in (8, 2, 2))
    options = {"layout": layout.sliding_window(7000) & layout.padding([9001, 5555]), "sketch": sizes}
    got = sketch.scores(q, k, v, impl="triton", **options)
    expected = sketch.scores(q, k, v, impl="torch", **options)
    assert_nearly_all_scores(got, expected, dtype, 5e-3)
