"""OAM scores against the literal (N / stride)^2 definition."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from stem_flex import StemConfig, layout, oam_scores, reference, testing


def relative_error(got, expected):
    assert torch.equal(got.isneginf(), expected.isneginf())
    finite = ~expected.isneginf()
    scale = expected[finite].abs().max().clamp(min=1e-30)  # one token of another phase scores 0
    return ((got - expected)[finite].abs().max() / scale).item()


@pytest.mark.parametrize("metric", ["zscore", "log"])
@pytest.mark.parametrize("stride", [4, 8, 16, 32])
@pytest.mark.parametrize("group", [1, 4, 7])
def test_scores_are_the_literal_definition(make_qkv, metric, stride, group):
    # batch 3 with different rows, a ragged tail, blocks of 128
    q, k, v = make_qkv(B=3, Hq=group, Hkv=1, Lq=3 * 128 - 77)
    config = StemConfig(stride=stride, metric=metric)
    got, expected = oam_scores(q, k, v, config), reference.oam_scores(q, k, v, config)
    assert got.dtype == torch.float32
    assert got.shape == (3, group, 3, 3)
    assert relative_error(got, expected) <= 1e-5
    double = [x.double() for x in (q, k, v)]
    assert relative_error(oam_scores(*double, config), reference.oam_scores(*double, config)) <= 1e-12


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 96])
@pytest.mark.parametrize("block_size", [16, (32, 16), (16, 32), (64, 32)])
def test_scores_of_odd_lengths_and_block_sizes(make_qkv, length, block_size):
    q, k, v = make_qkv(Lq=length)
    for stride, metric in product((1, 4, 16), ("zscore", "log")):
        config = StemConfig(block_size=block_size, stride=stride, metric=metric)
        assert relative_error(oam_scores(q, k, v, config), reference.oam_scores(q, k, v, config)) <= 1e-5


@given(st.data())
def test_scores_under_any_layout(data):
    q, k, v = data.draw(testing.qkv(past=(0, 70), ties=False))
    config = data.draw(testing.stem_configs())
    offset = data.draw(st.integers(0, k.shape[2] - q.shape[2]))
    structure = data.draw(testing.layouts(q, k, mask_mod=False))
    kv_len = data.draw(st.none() | st.integers(1, k.shape[2]))
    options = {"layout": structure, "q_offset": offset, "kv_len": kv_len}
    got, expected = (f(q, k, v, config, **options) for f in (oam_scores, reference.oam_scores))
    finite = ~expected.isneginf()
    assert torch.equal(~got.isneginf(), finite)
    scale = max(1.0, expected[finite].abs().max().item()) if finite.any() else 1.0
    assert ((got - expected)[finite].abs() <= 1e-5 * scale).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_inputs_are_summed_in_float32(make_qkv, dtype):
    q, k, v = make_qkv(Lq=300, dtype=dtype)
    config = StemConfig(block_size=64)
    got = oam_scores(q, k, v, config)
    assert got.dtype == torch.float32
    assert relative_error(got, reference.oam_scores(q, k, v, config)) <= 1e-5


def test_head_dim_of_values_may_differ(make_qkv):
    q, k, v = make_qkv(D=24, Dv=16)
    config = StemConfig(block_size=32)
    assert relative_error(oam_scores(q, k, v, config), reference.oam_scores(q, k, v, config)) <= 1e-5


def test_strided_inputs_score_the_same(make_qkv):
    q, k, v = make_qkv()
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert not strided[0].is_contiguous()
    config = StemConfig(block_size=32)
    torch.testing.assert_close(oam_scores(*strided, config), oam_scores(q, k, v, config))


def test_future_blocks_score_minus_infinity_and_no_others(make_qkv):
    scores = oam_scores(*make_qkv(Lq=300), StemConfig(block_size=64))
    future = torch.ones(5, 5, dtype=torch.bool).triu(1)
    assert torch.equal(scores.isneginf(), future.expand_as(scores))
    assert not scores.isnan().any()


def test_zscore_ignores_the_scale_of_v_and_log_does_not(make_qkv):
    q, k, v = make_qkv(dtype=torch.float64)
    for metric, same in (("zscore", True), ("log", False)):
        config = StemConfig(block_size=32, metric=metric)
        one, scaled = (oam_scores(q, k, x, config) for x in (v, 100 * v))
        assert torch.allclose(one, scaled, atol=1e-4) is same


def test_statistics_take_complete_groups_only(make_qkv):
    # 100 keys in groups of 8: the last group has 4 keys, scored, but its size stays out of mean and deviation
    q, k, v = make_qkv(Lq=100, dtype=torch.float64)
    config = StemConfig(block_size=32)
    loud = v.clone()
    loud[:, :, 96:] *= 1000
    quiet_scores, loud_scores = oam_scores(q, k, v, config), oam_scores(q, k, loud, config)
    assert torch.equal(quiet_scores[..., :3], loud_scores[..., :3])
    assert (loud_scores[..., 3:4, 3] > quiet_scores[..., 3:4, 3]).all()


def test_few_or_equal_values_have_no_magnitude(make_qkv):
    q, k, v = make_qkv(Lq=15)
    routing = oam_scores(q, k, v, StemConfig(block_size=16, value_weight=0.0))
    assert torch.equal(oam_scores(q, k, v, StemConfig(block_size=16)), routing)  # one complete group
    q, k, v = make_qkv(Lq=64, dtype=torch.float64)
    routing = oam_scores(q, k, v, StemConfig(block_size=16, value_weight=0.0))
    flat = oam_scores(q, k, torch.ones_like(v), StemConfig(block_size=16))
    torch.testing.assert_close(flat, routing, atol=1e-8, rtol=0)
    zero = oam_scores(q, k, torch.zeros_like(v), StemConfig(block_size=16, metric="log"))
    assert torch.equal(zero, routing)


def test_value_weight_0_does_not_read_v(make_qkv):
    q, k, v = make_qkv()
    config = StemConfig(block_size=32, value_weight=0.0)
    assert torch.equal(oam_scores(q, k, v, config), oam_scores(q, k, torch.full_like(v, math.nan), config))


def test_padding_never_reaches_a_score(make_qkv):
    q, k, v = make_qkv(Lq=160)
    structure = layout.padding(torch.tensor([160, 71]), side="left")
    dirty = [x.clone() for x in (q, k, v)]
    for x in dirty:
        x[1, :, : 160 - 71] = math.nan
    for metric in ("zscore", "log"):
        config = StemConfig(block_size=32, metric=metric)
        clean_scores = oam_scores(q, k, v, config, layout=structure)
        assert torch.equal(oam_scores(*dirty, config, layout=structure), clean_scores)


def test_keys_past_kv_len_never_reach_a_score(make_qkv):
    q, k, v = make_qkv(Lq=64, Lk=200)
    dirty_k, dirty_v = k.clone(), v.clone()
    dirty_k[:, :, 130:], dirty_v[:, :, 130:] = math.nan, math.inf
    options = {"q_offset": 66, "kv_len": 130}
    for metric in ("zscore", "log"):
        config = StemConfig(block_size=32, metric=metric)
        assert torch.equal(oam_scores(q, dirty_k, dirty_v, config, **options), oam_scores(q, k, v, config, **options))


@pytest.mark.parametrize("change", [{"stride": 4}, {"metric": "log"}, {"value_weight": 0.5}, {"block_size": (64, 32)}])
def test_every_field_of_the_score_changes_it(make_qkv, change):
    base = {"block_size": 32, "stride": 8}
    q, k, v = make_qkv()
    one, other = (oam_scores(q, k, v, StemConfig(**options)) for options in (base, base | change))
    assert one.shape != other.shape or not torch.allclose(one, other)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor any operator made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_memory_is_that_of_the_inputs_and_the_block_scores():
    B, H, N, D = 1, 2, 16384, 8
    q, k, v = (torch.randn(B, H, N, D) for _ in range(3))
    with LargestTensor() as largest:
        oam_scores(q, k, v, StemConfig())
    assert largest.numel <= B * H * (N * D + (N // 128) ** 2)  # (N / stride)^2 would be 8.4 million


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda q, k, v: (q[0], k, v), ValueError, r"q must have shape \(B, H, L, D\), got \(4, 200, 16\)"),
        (lambda q, k, v: (q, k[..., :8], v), ValueError, "k must have q's head dim 16, got 8"),
        (lambda q, k, v: (q, k, v[:, :, :-1]), ValueError, "v must have k's shape"),
        (lambda q, k, v: (q[:, :3], k, v), ValueError, "multiple of k's 2 heads, got 3"),
        (lambda q, k, v: (q, k[:1], v[:1]), ValueError, "k must have q's batch size 2, got 1"),
        (lambda q, k, v: (q, k.double(), v), TypeError, "k must have q's dtype torch.float32, got torch.float64"),
        (lambda q, k, v: (q.long(), k, v), TypeError, "q must be float16, bfloat16, float32 or float64"),
        (lambda q, k, v: (q.numpy(), k, v), TypeError, "q must be a tensor, got ndarray"),
        (lambda q, k, v: (q, k.to("meta"), v), ValueError, "k must be on q's device cpu, got meta"),
        (lambda q, k, v: (q[:, :, :0], k, v), ValueError, "q must not be empty"),
    ],
)
def test_wrong_inputs_are_refused(make_qkv, change, error, match):
    with pytest.raises(error, match=match):
        oam_scores(*change(*make_qkv()), StemConfig(block_size=32))


def test_impl_is_never_a_silent_fallback(make_qkv, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k, v = make_qkv()
    with pytest.raises(ValueError, match="impl must be 'auto', 'triton' or 'torch', got 'cuda'"):
        oam_scores(q, k, v, impl="cuda")
    with pytest.raises(ValueError, match="impl='triton' needs CUDA tensors, got cpu"):
        oam_scores(q, k, v, impl="triton")


def test_a_layout_must_be_a_layout(make_qkv):
    with pytest.raises(TypeError, match=r"layout must come from stem_flex\.layout, got function"):
        oam_scores(*make_qkv(), layout=lambda b, h, i, j: i >= j)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_equal_magnitudes_say_nothing(make_qkv, impl):
    if impl == "triton" and not torch.cuda.is_available():
        pytest.importorskip("stem_flex.kernels.pool", reason="Triton is not installed")
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    q, k, v = make_qkv(B=1, Hq=2, Hkv=1, Lq=700, device=device)
    v = torch.full_like(v, 0.3)
    routing = oam_scores(q, k, v, StemConfig(value_weight=0.0), impl=impl)
    assert torch.equal(oam_scores(q, k, v, impl=impl), routing)


@pytest.mark.gpu
@pytest.mark.parametrize("metric", ["zscore", "log"])
@pytest.mark.parametrize("stride", [4, 8, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_scores_are_the_reference_scores(make_qkv, metric, stride, dtype):
    q, k, v = make_qkv(B=3, Hq=8, Hkv=2, Lq=1000, D=64, dtype=dtype, device="cuda")
    config = StemConfig(stride=stride, metric=metric)
    got = oam_scores(q, k, v, config, impl="triton").cpu()
    # 16-bit inputs keep their phase means in 16 bits: half a unit in the last place of bfloat16 on each side
    bound = 1e-5 if dtype == torch.float32 else 2 * 2**-9
    assert relative_error(got, reference.oam_scores(q, k, v, config)) <= bound


@pytest.mark.parametrize("metric", ["zscore", "log"])
def test_nan_values_have_no_magnitude(make_qkv, metric):
    q, k, v = make_qkv(B=1, Hq=2, Hkv=1, Lq=200)
    config = StemConfig(block_size=16, stride=4, metric=metric)
    zeroed = v.clone()
    zeroed[:, :, 70] = 0.0
    v[:, :, 70, 3] = math.nan
    got = oam_scores(q, k, v, config)
    assert torch.equal(got, oam_scores(q, k, zeroed, config))
    assert relative_error(got, reference.oam_scores(q, k, v, config)) <= 1e-5
