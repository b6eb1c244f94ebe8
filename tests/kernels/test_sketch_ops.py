"""``torch.ops.stem_flex.sketch_scores``: graphs, strides, gradients, refusals."""

from __future__ import annotations

import pytest
import torch

from stem_flex.kernels.sketch_ops import sketch_scores
from tests.kernels.loops import DEVICE, causal_rows, devices, inputs, on

pytestmark = pytest.mark.usefixtures("poisoned")

OPTIONS = dict(block_q=64, block_k=64, sketch=(2, 2, 1, 2))


@devices
def test_fullgraph_compilation(device):
    q, k, _, rows = on(device, *inputs(1, 2, 1, 100, 100, 16, 16, torch.float32), causal_rows(100, 100, 64, 64))
    compiled = torch.compile(lambda q, k: sketch_scores(q, k, rows, **OPTIONS) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k), sketch_scores(q, k, rows, **OPTIONS) + 1)


@devices
def test_fake_implementation_agrees(device):
    q, k, _, rows = on(device, *inputs(2, 2, 1, 70, 70, 16, 16, torch.float32), causal_rows(70, 70, 64, 64))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    options = OPTIONS | {"sketch": list(OPTIONS["sketch"])}
    torch.library.opcheck(
        torch.ops.stem_flex.sketch_scores, (q, k, rows, *(None,) * 5), options, test_utils=checks
    )  # fmt: skip


@devices
def test_strided_views_are_read_in_place(device):
    """A BSHD projection and a slice of a wider tensor give what their copies give."""
    q = torch.randn(1, 100, 2, 32).transpose(1, 2)
    k = torch.randn(1, 1, 100, 48)[..., 16:]
    rows = causal_rows(100, 100, 64, 64)
    views = [x if device == "cpu" else x.to(device) for x in (q, k)]
    (rows,) = on(device, rows)
    copies = [x.contiguous() for x in views]
    assert torch.equal(sketch_scores(*views, rows, **OPTIONS), sketch_scores(*copies, rows, **OPTIONS))


def test_no_gradient_is_carried():
    q, k, _, rows = on(DEVICE, *inputs(1, 1, 1, 64, 64, 16, 16, torch.float32), causal_rows(64, 64, 64, 64))
    assert not sketch_scores(q.requires_grad_(), k, rows, **OPTIONS).requires_grad


@pytest.mark.gpu
def test_a_cuda_graph_replays_on_new_inputs():
    q, k = (torch.randn(1, h, 4096, 64, device="cuda", dtype=torch.bfloat16) for h in (4, 2))
    rows = causal_rows(4096, 4096, 64, 64).cuda()
    sketch_scores(q, k, rows, **OPTIONS)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = sketch_scores(q, k, rows, **OPTIONS)
    q.normal_()
    graph.replay()
    assert torch.equal(got, sketch_scores(q, k, rows, **OPTIONS))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda q, k, o: (q.transpose(2, 3).contiguous().transpose(2, 3), k, o), ValueError, "q must have unit stride"),
        (lambda q, k, o: (q, k.half(), o), TypeError, "float16 for k"),
        (lambda q, k, o: (q.double(), k.double(), o), TypeError, "float64 for q"),
        (lambda q, k, o: (q, k, {**o, "block_k": 1024}), ValueError, "blocks must be at most 512"),
        (lambda q, k, o: (q, k, {**o, "sketch": (65, 2, 1, 2)}), ValueError, "0 to 64 query outliers"),
        (lambda q, k, o: (q, k, {**o, "sketch": (2, 2, 1, 3)}), ValueError, "power of two of key means"),
        (lambda q, k, o: (q, k, {**o, "coarse": (9, 0)}), ValueError, "coarse must have at most the sketch's outliers"),
        (lambda q, k, o: (q, k, {**o, "coarse": (0, 0)}), ValueError, "capacity must be 1 or more"),
        (
            lambda q, k, o: (q, k, {**o, "coarse": (0, 0), "capacity": 4}),
            ValueError,
            "threshold must be at least 1e-30",
        ),
    ],
)
def test_wrong_input_is_refused(change, error, match):
    rows = causal_rows(64, 64, 64, 64).to(DEVICE)
    q, k, options = change(*on(DEVICE, *inputs(1, 1, 1, 64, 64, 16, 16, torch.float32)[:2]), OPTIONS)
    with pytest.raises(error, match=match):
        sketch_scores(q, k, rows, **options)
