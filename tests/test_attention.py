"""stem_attention: compiled flex_attention against dense masked softmax in float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask

from stem_flex import StemConfig, layout, reference, stem_attention, stem_block_mask, testing
from stem_flex.attention import _flex, sparse_prefill
from stem_flex.plumbing import compiled as _compiled
from stem_flex.plumbing.captured import code_of
from stem_flex.plumbing.compiled import _copy, based, compiled, to_constant

# flex_attention's C++ kernel compiles for each dtype, head dim and kind of mask: few kinds of call here
CONFIG = StemConfig(block_size=64, schedule="fixed", k_start=2, sink_blocks=1, local_blocks=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_dense_masked_softmax(make_qkv, dtype):
    for length in (500, 320):  # the second length compiles once more, for all others
        q, k, v = make_qkv(Lq=length, D=32, dtype=dtype)
        mask = stem_block_mask(q, k, v, CONFIG)
        assert not testing.block_mask_to_dense(mask)[0, 0, -1].all()
        testing.assert_matches_dense(mask, q, k, v)
        torch.testing.assert_close(stem_attention(q, k, v, CONFIG), sparse_prefill(q, k, v, mask), atol=0, rtol=0)


def test_attention_is_the_references(make_qkv):
    q, k, v = make_qkv(Lq=500, D=32)
    out = stem_attention(q, k, v, CONFIG)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), reference.stem_attention(q, k, v, CONFIG), atol=1e-5, rtol=1e-5)
    sharp = stem_attention(q, k, v, CONFIG, scale=0.5)
    expected = reference.stem_attention(q, k, v, CONFIG, scale=0.5)
    torch.testing.assert_close(sharp.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_budget_of_everything_is_dense_causal_attention(make_qkv):
    q, k, v = make_qkv(Lq=500, D=32)
    out = stem_attention(q, k, v, CONFIG, budget=8)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_padding_gives_zeros_and_the_rest_is_unpadded(make_qkv):
    q, k, v = make_qkv(Lq=320, D=32)
    structure = layout.padding([320, 192])
    mask = stem_block_mask(q, k, v, CONFIG, layout=structure)
    testing.assert_matches_dense(mask, q, k, v)
    out = stem_attention(q, k, v, CONFIG, layout=structure)
    assert torch.equal(out[1, :, :128], torch.zeros_like(out[1, :, :128]))
    alone = stem_attention(*(x[1:, :, 128:] for x in (q, k, v)), CONFIG, layout=layout.padding([192]))
    torch.testing.assert_close(out[1:, :, 128:], alone, atol=1e-5, rtol=1e-5)


def test_chunks_of_a_static_buffer(make_qkv):
    q, k, v = make_qkv(Lq=400, D=32)
    config = StemConfig(**{**vars(CONFIG), "metric": "log"})
    whole = stem_attention(q, k, v, config)
    buffers = [F.pad(x, (0, 0, 0, 100)) for x in (k, v)]
    for start, end in ((0, 256), (256, 400)):
        offset = torch.tensor([start, start])
        part = stem_attention(
            q[:, :, start:end], *buffers, config, q_offset=offset, kv_len=offset + end - start, prompt_len=400
        )
        torch.testing.assert_close(part, whole[:, :, start:end], atol=1e-5, rtol=1e-5)


def test_mla_shapes_documents_and_groups(make_qkv):
    q, k, v = make_qkv(B=1, Hq=7, Hkv=1, Lq=300, D=48, Dv=32)
    mask = stem_block_mask(q, k, v, CONFIG, layout=layout.documents([0, 70, 300]) & layout.sliding_window(150))
    testing.assert_matches_dense(mask, q, k, v)


@pytest.mark.slow
@pytest.mark.parametrize(
    "block_size", [(128, 128), (128, 64), (256, 128), (64, 128)], ids=lambda size: f"{size[0]}x{size[1]}"
)
def test_block_sizes(make_qkv, block_size):
    q, k, v = make_qkv(B=1, Lq=700, D=32)
    config = StemConfig(**{**vars(CONFIG), "block_size": block_size})
    testing.assert_matches_dense(stem_block_mask(q, k, v, config), q, k, v)


@pytest.mark.slow
def test_class_table_masks_and_score_mods(make_qkv):
    q, k, v = make_qkv(B=1, Lq=300, D=32)
    dilated = layout.from_mask_mod(lambda b, h, i, j: (i - j) % (h + 2) == 0, 1, 4, 300, 300)
    mask = stem_block_mask(q, k, v, CONFIG, layout=layout.causal() & dilated)
    testing.assert_matches_dense(mask, q, k, v, score_mod=lambda score, b, h, i, j: score - 0.01 * (i - j))


@pytest.mark.slow
def test_eager_attention_under_the_exact_mask_mod(make_qkv):
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = make_qkv(Lq=300, D=32)
    mask = stem_block_mask(q, k, v, CONFIG, mask_mod="exact")
    eager = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)  # ignores lists, obeys the mask_mod
    torch.testing.assert_close(stem_attention(q, k, v, CONFIG), eager, atol=1e-5, rtol=1e-5)


def test_running_eagerly_is_an_error():
    code = (
        "import torch\n"
        "from stem_flex import stem_attention\n"
        "x = torch.randn(1, 1, 64, 16)\n"
        "try: stem_attention(x, x, x)\n"
        "except RuntimeError as error: assert 'would run eagerly' in str(error), error\n"
        "else: raise SystemExit('ran eagerly')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "TORCHDYNAMO_DISABLE": "1"})


def test_another_threads_compilation_makes_nothing_eager(make_qkv, monkeypatch):
    q, k, v = make_qkv(Lq=320, D=32)
    expected = stem_attention(q, k, v, CONFIG)
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)  # what this thread sees meanwhile
    torch.testing.assert_close(stem_attention(q, k, v, CONFIG), expected, atol=0, rtol=0)


def test_block_sizes_and_options_are_constants_of_the_graph(make_qkv):
    """Inductor's caches look graphs up by their text: what a kernel is compiled for must be in it."""
    found = []

    def backend(graph, inputs):
        sizes = [x for x in inputs if isinstance(x, torch.SymInt)]
        found.append((graph.code, {int(x.node.hint) for x in sizes}))
        return graph.forward

    q, k, v = make_qkv(Lq=300)
    for block in (16, 32):
        run = torch.compile(_copy(_flex, "constants"), fullgraph=True, dynamic=True, backend=backend)
        mask = stem_block_mask(q, k, v, StemConfig(block_size=block, stride=4, schedule="fixed", k_start=3))
        size = (to_constant(block), to_constant(block))
        options = {"BACKEND": "TRITON", "BLOCK_M": to_constant(block), "num_stages": to_constant(5)}
        run(q, k, v, mask, size, 0.25, None, False, options)
    assert len({code for code, _ in found}) == len(found) == 2
    for (code, sizes), block in zip(found, (16, 32), strict=True):
        assert f"{block}, {block}, mask_fn_0" in code
        assert f"'BLOCK_M': {block}" in code
        assert "'num_stages': 5" in code
        assert not sizes & {5, block}


@torch._dynamo.config.patch(recompile_limit=1)
def test_the_recompile_limit_is_an_error():
    def double(x, n):
        return x * n

    run = compiled(double, "test_the_recompile_limit_is_an_error")
    run(torch.ones(2), 2.5)
    with pytest.raises(RuntimeError, match="would run eagerly, which is dense"):
        run(torch.ones(2, 2, dtype=torch.float64), 3.5)


class Bias:
    def __init__(self, slope):
        self.slope = slope

    def mod(self, score, b, h, q_idx, kv_idx):
        return score - self.slope * (q_idx - kv_idx)


def test_methods_of_two_objects_are_one_kind_of_call():
    one, two = (code_of(Bias(slope).mod, (float,)) for slope in (0.1, 0.2))
    assert one.code == two.code != code_of(lambda score, b, h, q_idx, kv_idx: score, (float,)).code
    assert (one.numbers, two.numbers) == (("0.1",), ("0.2",))


def test_more_numbers_than_can_be_compiled_in_are_an_error(monkeypatch):
    def scaled(x, n):
        return x * n

    monkeypatch.setattr(_compiled, "MOST_CONSTANTS", 2)
    for n in (0.5, 1.5, 0.5):
        assert compiled(scaled, "too many numbers", constants=(str(n),))(torch.ones(1), n) == n
    with pytest.raises(RuntimeError, match="read more than 2 different numbers"):
        compiled(scaled, "too many numbers", constants=("2.5",))


def test_numbers_may_change_places():
    def capped_below(cap, width):
        return lambda score, b, h, i, j: torch.where(i - j < width, cap * torch.tanh(score / cap), score)

    def capped_above(width, cap):
        return lambda score, b, h, i, j: torch.where(i - j < width, score, cap * torch.tanh(score / cap))

    x = torch.randn(1, 2, 150, 16)
    for score_mod in (capped_below(0.5, 64), capped_above(64, 0.5), capped_below(64.0, 2)):
        out = stem_attention(x, x, x, score_mod=score_mod)
        torch.testing.assert_close(
            out.double(), reference.stem_attention(x, x, x, score_mod=score_mod), atol=1e-5, rtol=0
        )


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "flash"])
def test_masks_of_all_lengths_are_one_kind_of_call(make_qkv, backend):
    if backend == "flash":
        pytest.importorskip("flash_attn.cute", reason="flash-attn-4 is not installed")
    config, kinds = StemConfig(schedule="fixed", k_start=1, sink_blocks=1, local_blocks=1), set()
    for length in (700, 900, 1024):
        q, k, v = make_qkv(B=1, Lq=length, D=64, dtype=torch.bfloat16, device="cuda")
        every_third = create_block_mask(lambda b, h, i, j: (i >= j) & ((i - j) % 3 == 0), 1, 1, length, length)
        exact = stem_block_mask(q, k, v, config, mask_mod="exact")
        for mask in (exact, stem_block_mask(q, k, v, config, layout=layout.from_block_mask(every_third))):
            testing.assert_matches_dense(mask, q, k, v, backend=backend)
            kinds.add(code_of(mask.mask_mod, (int, float)))
    assert len(kinds) <= 2 + 1  # 1024 needs no cut


@pytest.mark.parametrize(
    ("device", "backend"),
    [
        ("cpu", "cpu"),
        pytest.param("cuda", "triton", marks=pytest.mark.gpu),
        pytest.param("cuda", "flash", marks=pytest.mark.gpu),
    ],
)
def test_numbers_that_mods_read_may_vary(make_qkv, device, backend):
    if backend == "flash":
        pytest.importorskip("flash_attn.cute", reason="flash-attn-4 is not installed")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def window(width):
        return lambda b, h, i, j: (i >= j) & (i - j < width)

    for length, slope, width in ((300, 0.1, 70), (333, 0.3, 90)):
        q, k, v = make_qkv(B=1, Lq=length, D=64, dtype=dtype, device=device)
        structure = layout.from_mask_mod(window(width), None, None, length, length)
        options = {"layout": structure, "score_mod": Bias(slope).mod}
        out = stem_attention(q, k, v, backend=backend, **options)
        expected = reference.stem_attention(*(x.cpu() for x in (q, k, v)), **options)
        torch.testing.assert_close(out.cpu().double(), expected, atol=3e-2 if device == "cuda" else 1e-5, rtol=1e-2)


def wrong_mask(**changes):
    x = torch.randn(*(changes.get(name, size) for name, size in (("B", 2), ("H", 4), ("L", 100))), 16)
    return stem_block_mask(x, x, x, StemConfig(block_size=32))


@pytest.mark.parametrize(
    ("mask", "error", "match"),
    [
        (lambda: "causal", TypeError, "block_mask must be a BlockMask, got str"),
        (lambda: wrong_mask(L=90), ValueError, r"lengths \(100, 100\), got \(90, 90\)"),
        (lambda: wrong_mask(H=2), ValueError, "block_mask must have H=1 or q's 4, got 2"),
        (lambda: wrong_mask(B=3), ValueError, "block_mask must have B=1 or q's 2, got 3"),
    ],
)
def test_block_masks_that_do_not_fit_are_refused(make_qkv, mask, error, match):
    with pytest.raises(error, match=match):
        sparse_prefill(*make_qkv(Lq=100), mask())


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"backend": "sdpa"}, ValueError, "backend must be one of .* got 'sdpa'"),
        ({"backend": "triton"}, ValueError, "backend='triton' needs CUDA tensors, got cpu"),
        ({"backend": "flash"}, ValueError, "backend='flash' needs CUDA tensors, got cpu"),
        ({"return_lse": True}, ValueError, "return_lse must be False on the CPU, got True"),
        ({"q_offset": -1}, ValueError, "q_offset must be 0 or more, got -1"),
        ({"budget": 0}, ValueError, "budget must be at least 1 block, got 0"),
        ({"layout": 3}, (TypeError, ValueError), "layout must come from"),
        ({"scale": "a"}, TypeError, "scale must be a number or None, got str"),
        ({"scale": torch.tensor(0.3)}, TypeError, "scale must be a number or None, got Tensor"),
        ({"score_mod": 3}, TypeError, "score_mod must be a score_mod .* got int"),
        ({"score_mod": lambda s: s}, TypeError, r"score_mod must be a score_mod .* got a function of \(s\)"),
        ({"options": 3}, TypeError, "options must be a dict .* got int"),
    ],
)
def test_wrong_options_are_refused(make_qkv, options, error, match):
    with pytest.raises(error, match=match):
        stem_attention(*make_qkv(Lq=100), CONFIG, **options)


def test_gradients_and_float64_are_refused_on_the_cpu(make_qkv):
    q, k, v = make_qkv(Lq=100)
    with pytest.raises(ValueError, match="must not need gradients on the CPU"):
        stem_attention(q.requires_grad_(), k, v, CONFIG)
    with pytest.raises(ValueError, match=r"q must be float16, bfloat16 or float32, got float64"):
        stem_attention(*make_qkv(Lq=100, dtype=torch.float64), CONFIG)


CARD_LAYOUTS = {
    "causal": lambda n: layout.causal(),
    "window": lambda n: layout.sliding_window(300),
    "prefix": lambda n: layout.prefix(200),
    "documents": lambda n: layout.documents([0, 333, n]),
    "padding": lambda n: layout.padding(torch.tensor([n, 200], device="cuda")),
    "dilated": lambda n: layout.from_mask_mod(lambda b, h, i, j: (i >= j) & ((i - j) % 3 == 0), None, None, n, n),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CARD_LAYOUTS)
@pytest.mark.parametrize("backend", ["triton", "flash"])
@pytest.mark.parametrize("length", [1024, 967])
def test_cuda_attention_is_dense_masked_softmax(make_qkv, name, backend, length):
    if backend == "flash":
        pytest.importorskip("flash_attn.cute", reason="flash-attn-4 is not installed")
    q, k, v = make_qkv(Hq=8, Hkv=2, Lq=length, D=64, dtype=torch.bfloat16, device="cuda")
    structure = CARD_LAYOUTS[name](length)
    config = StemConfig(schedule="fixed", k_start=2, sink_blocks=1, local_blocks=1)
    mask = stem_block_mask(q, k, v, config, layout=structure)
    testing.assert_valid_block_mask(mask)
    testing.assert_matches_dense(mask, q, k, v, backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "flash"])
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128)])
@pytest.mark.parametrize("heads", [(8, 8), (10, 2), (7, 1), (28, 4)])
def test_cuda_head_dims_and_groups(make_qkv, backend, dims, heads):
    if backend == "flash":
        pytest.importorskip("flash_attn.cute", reason="flash-attn-4 is not installed")
    q, k, v = make_qkv(
        B=1, Hq=heads[0], Hkv=heads[1], Lq=700, D=dims[0], Dv=dims[1], dtype=torch.bfloat16, device="cuda"
    )
    config = StemConfig(schedule="fixed", k_start=2, sink_blocks=1, local_blocks=1)
    testing.assert_matches_dense(stem_block_mask(q, k, v, config), q, k, v, backend=backend)


@pytest.mark.gpu
def test_cuda_lse_is_minus_infinity_for_padding(make_qkv):
    q, k, v = make_qkv(Lq=512, D=64, dtype=torch.bfloat16, device="cuda")
    structure = layout.padding(torch.tensor([512, 100], device="cuda"))
    options = {"layout": structure, "return_lse": True}
    out, lse = stem_attention(q, k, v, StemConfig(), **options)
    expected, expected_lse = reference.stem_attention(
        *(x.cpu() for x in (q, k, v)), layout=layout.padding([512, 100]), return_lse=True
    )
    assert torch.equal(lse.isneginf().cpu(), expected_lse.isneginf())
    finite = ~expected_lse.isneginf()
    torch.testing.assert_close(lse.cpu().double()[finite], expected_lse[finite], atol=2e-2, rtol=1e-2)
    assert torch.equal(out[1, :, :412], torch.zeros_like(out[1, :, :412]))
    torch.testing.assert_close(out.cpu().double(), expected, atol=5e-2, rtol=2e-2)


def test_views_inside_a_storage_are_compiled_as_aligned(monkeypatch):
    """Where sizes vary Inductor takes a view's offset for a number that varies too, and no such view for aligned."""
    whole = torch.randn(3, 1, 4, 500, 32)
    expected = stem_attention(*(x.clone() for x in whole), CONFIG)
    assert [x.storage_offset() > 0 for x in whole] == [False, True, True]
    offsets = []

    def spied(*kind):
        run = compiled(*kind)
        return lambda *args: [offsets.extend(x.storage_offset() for x in args[:3]), run(*args)][1]

    monkeypatch.setattr("stem_flex.attention.compiled", spied)
    assert torch.equal(stem_attention(*whole, CONFIG), expected)
    assert offsets == [0, 0, 0]


class Other(torch.Tensor):
    """A tensor that is more than its memory."""


def test_based_tensors_are_the_same_memory():
    x = torch.arange(48.0)
    view = x[8:].view(5, 1, 8)[:, :, ::2]
    (got,) = based(view)
    assert got.storage_offset() == 0
    assert got.data_ptr() == view.data_ptr()
    assert got.stride() == view.stride()
    assert torch.equal(got, view)
    got[0] = -1
    assert x[8] == -1
    assert based(x)[0] is x
    for left in (x[1:], x[8:].as_subclass(Other), torch._neg_view(x)[8:]):
        assert based(left)[0] is left
    with torch.no_grad():
        assert not based(torch.zeros(8, requires_grad=True)[4:])[0].requires_grad
