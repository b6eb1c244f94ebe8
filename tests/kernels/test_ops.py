"""The Triton kernels together, and as operators of torch: against small loops, in the interpreter or on the GPU."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stem_flex import StemConfig, stem_block_mask
from stem_flex.kernels import scores as scores_module
from stem_flex.kernels import stem_scores, stem_select, stem_tables
from stem_flex.plumbing.tables import block_classes
from tests.kernels.loops import (
    DEVICE,
    TOLERANCE,
    all_valid,
    causal_rows,
    chosen,
    devices,
    expected_scores,
    inputs,
    listed,
    on,
)

pytestmark = pytest.mark.usefixtures("poisoned")

# ---- tables ----


def check_tables(device, q, k, v, rows, budget, valid=(None,) * 4, *, classes=None, tolerance=3e-6, **options):
    """Compare with the loops; where the choice differs, only scores within rounding of the threshold may."""
    Kb = -(-k.shape[2] // options["block_k"])
    sink, local = 1, 1
    partial_columns, width = (Kb, 2 * Kb) if classes is not None else (4, 4 + Kb)
    everything = all_valid(q.shape[0], q.shape[2], k.shape[2])
    ranges = tuple(b if a is None else a for a, b in zip(valid, everything, strict=True))
    scores = expected_scores(
        q, k, v, ranges, *(options[n] for n in ("block_q", "block_k", "stride", "metric", "value_weight"))
    )
    expected = chosen(scores, rows, budget, classes, sink, local)
    args = on(device, q, k, v, rows, budget, classes, *valid)
    extra = {"max_key_blocks": Kb, **options}
    buffer, counts = stem_tables(*args, **extra, sink=sink, local=local, partial_columns=partial_columns, width=width)
    got = listed(buffer, counts, width, partial_columns, Kb)
    for (b, h, i), (partial, full) in got.items():
        different = {*partial, *full} ^ {*expected[b, h, i][0], *expected[b, h, i][1]}
        values = scores[b, h, i, sorted(different)]
        assert different or (partial, full) == expected[b, h, i]
        assert not different or float(values.max() - values.min()) <= tolerance, (b, h, i, different)
    return buffer, counts


OPTIONS = dict(block_q=64, block_k=64, stride=8, metric="zscore", value_weight=0.2)


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("block_q", "block_k"), [(64, 64), (128, 64), (64, 128)])
def test_tables_match_loops(device, dtype, block_q, block_k):
    q, k, v = inputs(2, 2, 1, 190, 320, 32, 16, dtype)
    rows = causal_rows(190, 320, block_q, block_k, offset=130)
    budget = (torch.arange(rows.shape[1], dtype=torch.int32) // 2 + 1)[None, None]
    options = {**OPTIONS, "block_q": block_q, "block_k": block_k}
    check_tables(device, q, k, v, rows, budget, tolerance=TOLERANCE[dtype] * 2, causal_offset=130, **options)


@devices
@pytest.mark.parametrize("metric", ["zscore", "log"])
def test_tables_with_padding(device, metric):
    q, k, v = inputs(3, 2, 1, 300, 300, 16, 16, torch.float32)
    start = torch.tensor([0, 70, 299], dtype=torch.int32)
    end = torch.tensor([300, 300, 300], dtype=torch.int32)
    rows = causal_rows(300, 300, 64, 64).repeat(3, 1, 1)
    for b in range(3):
        rows[b, :, 0] = start[b] // 64
        rows[b, :, 2] = (start[b] + 63) // 64
        rows[b, rows[b, :, 1] <= rows[b, :, 0]] = 0
        rows[b, :, 3] = torch.maximum(rows[b, :, 2], rows[b, :, 3])
    budget = torch.full((1, 1, 1), 2, dtype=torch.int32)
    check_tables(device, q, k, v, rows, budget, (start, end, start, end), **{**OPTIONS, "metric": metric})


@devices
def test_tables_with_classes(device):
    q, k, v = inputs(1, 4, 2, 300, 300, 16, 16, torch.float32)
    classes = torch.randint(0, 3, (1, 4, 5, 5), dtype=torch.int8)
    rows = torch.tensor([0, 5, 0, 0, 0, 1, 0, 5], dtype=torch.int32).expand(1, 5, 8).contiguous()
    check_tables(device, q, k, v, rows, torch.full((1, 1, 1), 2, dtype=torch.int32), classes=classes, **OPTIONS)


@devices
@pytest.mark.parametrize(("window", "offset"), [(None, 0), (100, None)])
def test_tables_in_chunks(device, window, offset, monkeypatch):
    """A workspace smaller than the scores, with and without the causal bound."""
    q, k, v = inputs(1, 1, 1, 300, 300, 16, 16, torch.float32)
    rows = causal_rows(300, 300, 16, 16, window=window)
    budget = torch.full((1, 1, 1), 5, dtype=torch.int32)
    options = {**OPTIONS, "block_q": 16, "block_k": 16, "max_key_blocks": 19 if window is None else 8}
    monkeypatch.setattr(scores_module, "MOST_WORKSPACE_BYTES", 16 * 32 * 4)
    assert len(scores_module.chunks(1, 19, 19, 16, 16, offset, 16 * 32 * 4)[0]) == 2
    check_tables(device, q, k, v, rows, budget, causal_offset=offset, **options)


@pytest.mark.parametrize("offset", [None, 0, 1000])
@pytest.mark.parametrize("q_blocks", [1, 16, 17, 1024, 8192])
def test_chunks_cover_the_rows_within_the_workspace(offset, q_blocks):
    heads, limit = 32, scores_module.workspace_bytes(32, q_blocks)
    assert scores_module.WORKSPACE_BYTES <= limit <= scores_module.MOST_WORKSPACE_BYTES
    cut, size = scores_module.chunks(heads, q_blocks, q_blocks, 128, 128, offset, limit)
    assert 4 * size <= limit
    row = 0
    for chunk in cut:
        assert chunk.row == row
        row += chunk.height
        assert chunk.width >= min(q_blocks, row if offset is not None else q_blocks)
        assert heads * chunk.height * -(-chunk.width // 16) * 16 <= size
    assert row == q_blocks


# ---- operators ----


@devices
def test_operators_trace_without_breaks(device):
    q, k, v, rows, budget = on(
        device, *inputs(1, 2, 1, 100, 100, 16, 16, torch.float32), causal_rows(100, 100, 64, 64),
        torch.full((1, 1, 1), 1, dtype=torch.int32),
    )  # fmt: skip

    def build(q, k, v):
        scores = stem_scores(q, k, v, rows, **OPTIONS)
        table = dict(sink=1, local=1, partial_columns=4, width=6)
        return (
            *stem_tables(q, k, v, rows, budget, **OPTIONS, **table, max_key_blocks=2),
            *stem_select(scores, rows, budget, **table),
        )

    compiled = torch.compile(build, fullgraph=True, backend="aot_eager")
    got, expected = compiled(q, k, v), build(q, k, v)
    for tables in (slice(0, 2), slice(2, 4)):  # what lies past the counts is nobody's
        assert listed(*got[tables], 6, 4, 2) == listed(*expected[tables], 6, 4, 2)


@devices
def test_fake_implementations_agree(device):
    q, k, v, rows = on(device, *inputs(2, 2, 1, 70, 70, 16, 16, torch.float32), causal_rows(70, 70, 64, 64))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    valid = (None,) * 5
    torch.library.opcheck(torch.ops.stem_flex.scores, (q, k, v, rows, *valid), OPTIONS, test_utils=checks)


def test_operators_carry_no_gradient():
    q, k, v, rows = on(DEVICE, *inputs(1, 1, 1, 64, 64, 16, 16, torch.float32), causal_rows(64, 64, 64, 64))
    assert not stem_scores(q.requires_grad_(), k, v, rows, **OPTIONS).requires_grad


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda q, k, v, o: (q.transpose(2, 3).contiguous().transpose(2, 3), k, v, o), ValueError, "q must have unit"),
        (lambda q, k, v, o: (q, k.half(), v, o), TypeError, "float16 for k"),
        (lambda q, k, v, o: (q.double(), k.double(), v.double(), o), TypeError, "float64 for q"),
        (lambda q, k, v, o: (q, k, v, {**o, "stride": 7}), ValueError, "stride must divide both"),
        (lambda q, k, v, o: (q, k, v, {**o, "metric": "norm"}), ValueError, "metric must be one of"),
    ],
)
def test_wrong_input_is_refused(change, error, match):
    rows = causal_rows(64, 64, 64, 64).to(DEVICE)
    q, k, v, options = change(*on(DEVICE, *inputs(1, 1, 1, 64, 64, 16, 16, torch.float32)), OPTIONS)
    with pytest.raises(error, match=match):
        stem_scores(q, k, v, rows, **options)


@devices
def test_modes_see_the_operator(device):
    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    q, k, v = on(device, *inputs(1, 2, 1, 200, 200, 16, 16, torch.float32))
    alone = stem_block_mask(q, k, v, StemConfig(block_size=32), impl="triton")
    with Recorder():
        watched = stem_block_mask(q, k, v, StemConfig(block_size=32), impl="triton")
    assert "stem_flex.tables.default" in seen
    assert torch.equal(block_classes(alone), block_classes(watched))


@devices
def test_transforms_and_traces_see_the_operator(device):
    q, k, v = on(device, *inputs(1, 2, 1, 200, 200, 16, 16, torch.float32))
    config = StemConfig(block_size=32)
    alone = stem_block_mask(q, k, v, config, impl="triton")

    def kept(q):
        return q.sum() + stem_block_mask(q, k, v, config, impl="triton").full_kv_num_blocks.sum()

    expected = torch.func.grad(lambda q: q.sum())(q)
    assert torch.equal(torch.func.grad(kept)(q), expected)
    traced = torch.jit.trace(kept, (q,), check_trace=False)
    assert "stem_flex::tables" in str(traced.graph)
    assert torch.equal(traced(q), q.sum() + alone.full_kv_num_blocks.sum())
