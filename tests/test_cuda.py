"""What only a CUDA device can show: no host sync, graphs, few compilations, flat memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from stem_flex import StemConfig, explain, layout, reference, stem_attention, stem_block_mask
from stem_flex.plumbing.compiled import _compiled
from stem_flex.plumbing.tables import block_classes

pytestmark = pytest.mark.gpu

CONFIG = StemConfig(schedule="fixed", k_start=3, sink_blocks=1, local_blocks=1)


@pytest.fixture(params=["triton", "flash"])
def backend(request):
    if request.param == "flash":
        pytest.importorskip("flash_attn.cute", reason="flash-attn-4 is not installed")
    return request.param


@pytest.fixture
def qkv(make_qkv):
    def make(length, seed=0):
        return make_qkv(B=1, Hq=8, Hkv=2, Lq=length, D=64, dtype=torch.bfloat16, device="cuda", seed=seed)

    return make


def test_nothing_waits_for_the_device(qkv, backend):
    q, k, v = qkv(1024)
    stem_attention(q, k, v, CONFIG, backend=backend)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        stem_attention(q, k, v, CONFIG, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_replays_on_new_data(qkv, backend):
    static = qkv(1024)
    for _ in range(2):
        stem_attention(*static, CONFIG, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = stem_attention(*static, CONFIG, backend=backend)
    for place, new in zip(static, qkv(1024, seed=1), strict=True):
        place.copy_(new)
    graph.replay()
    assert torch.equal(out, stem_attention(*static, CONFIG, backend=backend))


def test_a_graph_reads_lengths_when_it_is_replayed(qkv):
    q, k, v = qkv(1024)
    offset, keys = (torch.tensor([n], dtype=torch.int32, device="cuda") for n in (512, 900))
    chunk = q[:, :, 512:]
    stem_block_mask(chunk, k, v, CONFIG, q_offset=offset, kv_len=keys)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask = stem_block_mask(chunk, k, v, CONFIG, q_offset=offset, kv_len=keys)
    offset.fill_(300)
    keys.fill_(812)
    graph.replay()
    fresh = stem_block_mask(chunk, k, v, CONFIG, q_offset=offset, kv_len=keys)
    assert torch.equal(block_classes(mask), block_classes(fresh))


def test_two_compilations_serve_twenty_lengths(qkv, backend):
    _compiled.cache_clear()
    torch._dynamo.reset()
    counters.clear()
    for length in range(700, 2700, 100):
        stem_attention(*qkv(length), CONFIG, backend=backend)
    own_check = 1 if backend == "flash" else 0
    assert counters["stats"]["unique_graphs"] <= 2 + own_check


def test_memory_stays_flat_over_many_lengths(qkv, backend):
    tensors = qkv(4096)
    stem_attention(*tensors, CONFIG, backend=backend)
    for length in range(1000, 1020):
        stem_attention(*(x[:, :, :length] for x in tensors), CONFIG, backend=backend)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for length in range(2000, 2200):
        stem_attention(*(x[:, :, :length] for x in tensors), CONFIG, backend=backend)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < 4 * 2**20  # bindings remembered, a few KB each


def test_a_layer_compiles_whole(qkv):
    def run(q, k, v):
        return stem_attention(q, k, v, CONFIG, backend="triton")

    compiled = torch.compile(run, fullgraph=True)
    for length in (1024, 1100, 1333):
        q, k, v = qkv(length)
        torch.testing.assert_close(compiled(q, k, v), run(q, k, v), atol=2e-2, rtol=2e-2)


def test_gradients_are_those_of_dense_masked_softmax(qkv):
    leaves = [x.requires_grad_() for x in qkv(700)]
    stem_attention(*leaves, CONFIG).float().square().sum().backward()
    exact = [x.detach().double().requires_grad_() for x in leaves]
    mask = stem_block_mask(*leaves, CONFIG)
    blocks = block_classes(mask).repeat_interleave(128, -1).repeat_interleave(128, -2)[..., :700, :700] > 0
    tokens = blocks & torch.ones(700, 700, dtype=torch.bool, device="cuda").tril()
    q, (k, v) = exact[0], (x.repeat_interleave(4, 1) for x in exact[1:])
    logits = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~tokens, -torch.inf)
    (logits.softmax(-1) @ v).square().sum().backward()
    for ours, theirs in zip(leaves, exact, strict=True):
        assert (ours.grad.double() - theirs.grad).norm() <= 1e-2 * theirs.grad.norm()


MEANS = replace(CONFIG, correction="mean")


@pytest.mark.parametrize("length", [2048, 1999])
def test_means_stand_for_what_is_dropped(qkv, backend, length):
    q, k, v = qkv(length)
    structure = layout.padding(torch.tensor([length - 100], device="cuda"))
    out, lse = stem_attention(q, k, v, MEANS, layout=structure, backend=backend, return_lse=True)
    q, k, v = (x.cpu() for x in (q, k, v))
    mask = stem_block_mask(*(x.cuda() for x in (q, k, v)), CONFIG, layout=structure)
    tokens = reference.token_mask(layout.padding([length - 100]), 1, 8, length, length)
    keep = (block_classes(mask) > 0).cpu()
    expected, expected_lse = reference.mean_corrected_attention(q, k, v, tokens, keep, 128)
    assert (out.double().cpu() - expected).norm() <= 1e-2 * expected.norm()
    torch.testing.assert_close(lse.double().cpu(), expected_lse, atol=2e-2, rtol=1e-2)


def test_blocks_of_equal_keys_lose_nothing(qkv, backend):
    q, k, v = qkv(4096)
    k = k[:, :, ::128].repeat_interleave(128, 2)
    out = stem_attention(q, k, v, MEANS, backend=backend)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert (out - dense).norm() <= 1e-2 * dense.norm()
    assert (stem_attention(q, k, v, CONFIG, backend=backend) - dense).norm() > 0.1 * dense.norm()


def test_means_in_a_graph_that_waits_for_nothing(qkv, backend):
    static = qkv(1024)
    for _ in range(2):
        stem_attention(*static, MEANS, backend=backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        stem_attention(*static, MEANS, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = stem_attention(*static, MEANS, backend=backend)
    for place, new in zip(static, qkv(1024, seed=1), strict=True):
        place.copy_(new)
    graph.replay()
    assert torch.equal(out, stem_attention(*static, MEANS, backend=backend))


def test_two_compilations_of_means_serve_twenty_lengths(qkv):
    _compiled.cache_clear()
    torch._dynamo.reset()
    counters.clear()
    for length in range(700, 2700, 100):
        stem_attention(*qkv(length), MEANS, backend="triton")
    assert counters["stats"]["unique_graphs"] <= 4  # two of the blocks, two of the means


def test_auto_says_when_it_is_dense(qkv):
    q, k, v = qkv(2048)
    assert explain(q, k, v).dense
    assert not explain(q, k, v, backend="triton").dense
    torch.testing.assert_close(
        stem_attention(q, k, v).double().cpu(),
        reference.stem_attention(*(x.cpu() for x in (q, k, v)), StemConfig(schedule="fixed", k_start=1.0)),
        atol=2e-2,
        rtol=2e-2,
    )


def test_lists_follow_q_to_its_device(qkv):
    q, k, v = qkv(600)
    mask = stem_block_mask(q, k, v, CONFIG, layout=layout.documents([0, 100, 600]))
    assert mask.kv_num_blocks.is_cuda


@pytest.mark.parametrize("by_token", [False, True])
def test_addresses_past_two_to_the_31(by_token):
    tokens, heads, dim = 640_000, 32, 128  # 2.6e9 elements a tensor; by token, heads lie side by side
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free memory on the card")
    shape = (1, tokens, heads, dim) if by_token else (1, heads, tokens, dim)
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    if by_token:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    whole = stem_block_mask(q, k, v, StemConfig())
    for head in (0, heads - 1):
        alone = stem_block_mask(*(x[:, head : head + 1].contiguous() for x in (q, k, v)), StemConfig())
        for counts, indices in (
            ("kv_num_blocks", "kv_indices"),
            ("full_kv_num_blocks", "full_kv_indices"),
        ):
            count = getattr(alone, counts)[0, 0]
            assert torch.equal(getattr(whole, counts)[0, head], count)
            live = torch.arange(getattr(alone, indices).shape[-1], device="cuda") < count[:, None]
            differ = (getattr(whole, indices)[0, head] != getattr(alone, indices)[0, 0]) & live
            assert not differ.any()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_card_that_is_not_the_current_one(qkv, backend):
    tensors = qkv(1024)
    expected = stem_attention(*tensors, CONFIG, backend=backend)
    assert torch.cuda.current_device() == 0
    actual = stem_attention(*(x.to("cuda:1") for x in tensors), CONFIG, backend=backend)
    assert actual.get_device() == 1
    assert torch.equal(actual.to("cuda:0"), expected)
    dense = [stem_attention(*(x.to(card) for x in tensors), StemConfig()) for card in ("cuda:0", "cuda:1")]
    torch.testing.assert_close(dense[1].to("cuda:0"), dense[0])
