"""What traces, transforms or replaces tensors: served, or refused by name."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.flop_counter import FlopCounterMode

from stem_flex import (
    StemConfig,
    block_density,
    compose,
    diagnostics,
    explain,
    layout,
    oam_scores,
    reference,
    stem_attention,
    stem_block_mask,
)
from stem_flex.attention import sparse_prefill

CONFIG = StemConfig(block_size=16, schedule="fixed", k_start=2, sink_blocks=1, local_blocks=1)


def test_attention_compiles_around_masks_that_read_tensors(make_qkv):
    q, k, v = make_qkv(Lq=60, Hq=2, Hkv=1)
    structure = layout.padding([60, 41], side="right") & layout.documents([0, 30, 60])
    lengths = {"q_offset": torch.tensor([0, 0]), "kv_len": torch.tensor([60, 43])}

    def attend(q, k, v, lengths):
        return stem_attention(q, k, v, CONFIG, layout=structure, **lengths)

    got = torch.compile(attend, fullgraph=True)(q, k, v, lengths)
    expected = reference.stem_attention(q, k, v, CONFIG, layout=structure, **lengths)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


class Calls(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, *args):
        return self.f(*args)


def listed(q, k, v):
    mask = stem_block_mask(q, k, v, CONFIG, layout=layout.sliding_window(40))
    return mask.kv_num_blocks, mask.full_kv_num_blocks


@pytest.mark.parametrize("strict", [False, True])
def test_scores_and_lists_export_and_attention_does_not(make_qkv, strict):
    given = make_qkv(Lq=100)
    for f in (lambda q, k, v: (oam_scores(q, k, v, CONFIG),), listed):
        if strict:  # slow, and tells nothing more of these
            continue
        exported = torch.export.export(Calls(f), given, strict=strict)
        assert all(map(torch.equal, exported.module()(*given), f(*given)))
    with pytest.raises((ValueError, RuntimeError), match="can't be exported"):
        torch.export.export(Calls(lambda q, k, v: stem_attention(q, k, v, CONFIG)), given, strict=strict)


@pytest.mark.parametrize("f", [oam_scores, lambda *x: stem_block_mask(*x).kv_num_blocks, stem_attention])
@pytest.mark.parametrize("mapped", [(0, 0, 0), (None, None, 0), (0, None, None)])
def test_vmap_is_refused(make_qkv, f, mapped):
    given = [x if dim is None else torch.stack([x, x]) for x, dim in zip(make_qkv(Lq=50), mapped, strict=True)]
    with pytest.raises(ValueError, match=r"must not be batched by torch\.vmap"):
        torch.vmap(f, in_dims=mapped)(*given)


def test_other_transforms_of_attention_are_refused(make_qkv):
    q, k, v = make_qkv(Lq=50)

    def attend(x):
        return stem_attention(x, k, v, CONFIG)

    with pytest.raises(ValueError, match="inside a transform"):
        torch.vmap(lambda x: x + attend(q).sum())(torch.ones(2))
    with pytest.raises(ValueError, match="inside a transform"):
        torch.func.functionalize(attend)(q)
    with pytest.raises(ValueError, match="inside a transform"):
        torch.func.jvp(attend, (q,), (q,))
    with pytest.raises(ValueError, match="must not need gradients"):
        torch.func.grad(lambda x: attend(x).sum())(q)
    with forward_ad.dual_level(), pytest.raises(ValueError, match="must not be dual tensors"):
        attend(forward_ad.make_dual(q, q))
    assert torch.equal(torch.func.functionalize(lambda x: oam_scores(x, k, v, CONFIG))(q), oam_scores(q, k, v, CONFIG))


def test_dispatch_modes_are_refused_and_spoil_nothing(make_qkv):
    qkv = make_qkv(Lq=50)
    with FlopCounterMode(display=False), pytest.raises(ValueError, match="must not run inside a TorchDispatchMode"):
        stem_attention(*qkv, CONFIG)
    assert stem_attention(*qkv, CONFIG).isfinite().all()


@pytest.mark.parametrize("f", [oam_scores, stem_block_mask, stem_attention, explain])
def test_nested_and_sparse_tensors_are_refused(make_qkv, f):
    rows = [torch.randn(60, 2, 16), torch.randn(40, 2, 16)]
    jagged = torch.nested.nested_tensor(rows, layout=torch.jagged).transpose(1, 2)
    strided = torch.nested.nested_tensor([x.transpose(0, 1).contiguous() for x in rows])
    for nested in (jagged, strided):
        with pytest.raises(ValueError, match=r"q must be one dense tensor, got a nested one.*layout\.documents"):
            f(nested, nested, nested)
    q, k, v = make_qkv(Lq=50)
    with pytest.raises(ValueError, match=r"v must be a dense tensor, got torch\.sparse_coo"):
        f(q, k, v.to_sparse())


def slope_of(parameter):
    return lambda score, b, h, i, j: score - parameter * (i - j)


def slopes_of(parameter):
    return lambda score, b, h, i, j: score - parameter[h] * (i - j)


def bias_of(parameter):
    class Bias:
        def __init__(self):
            self.table = {"slope": [parameter]}

        def __call__(self, score, b, h, i, j):
            return score + self.table["slope"][0]

    return Bias()


@pytest.mark.parametrize("make", [slope_of, bias_of])
def test_a_trainable_score_mod_needs_gradients(make_qkv, make):
    q, k, v = make_qkv(Lq=50)
    score_mod = make(nn.Parameter(torch.tensor(0.1)))
    for call in (stem_attention, lambda *x, **mods: sparse_prefill(*x[:3], stem_block_mask(*x), **mods)):
        with pytest.raises(ValueError, match="what score_mod reads must not need gradients on the CPU"):
            call(q, k, v, CONFIG, score_mod=score_mod)
    with torch.no_grad():
        assert explain(q, k, v, CONFIG, score_mod=score_mod).backend == "cpu"


@pytest.mark.gpu
def test_a_parameter_of_a_score_mod_gets_its_gradient(make_qkv):
    q, k, v = make_qkv(Lq=300, D=32, device="cuda")
    config = StemConfig(block_size=128, schedule="fixed", k_start=1, sink_blocks=1, local_blocks=1)
    slope = nn.Parameter(torch.full((4,), 0.1, device="cuda"))  # PyTorch 2.11 has a gradient for what is indexed
    stem_attention(q, k, v, config, score_mod=slopes_of(slope)).square().sum().backward()
    exact = nn.Parameter(torch.full((4,), 0.1, dtype=torch.float64))
    mask = reference.dense_mask(stem_block_mask(q, k, v, config))
    out, _ = reference.masked_attention(*(x.cpu() for x in (q, k, v)), mask, score_mod=slopes_of(exact))
    out.square().sum().backward()
    torch.testing.assert_close(slope.grad.double().cpu(), exact.grad, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("own", [True, False])
def test_slices_of_masks_are_refused(make_qkv, own):
    q, k, v = make_qkv(Lq=100)
    mask = create_block_mask(lambda b, h, i, j: i >= j, 2, 4, 100, 100, device="cpu", BLOCK_SIZE=16)
    mask = stem_block_mask(q, k, v, CONFIG) if own else mask
    rows = mask[:, :, 1:3]
    calls = {
        "prefill": lambda part: sparse_prefill(q, k, v, part),
        "prefill of the rows": lambda part: sparse_prefill(q[:, :, 16:48], k, v, part),
        "compose": lambda part: compose(part, layout.sliding_window(9)),
        "compose with": lambda part: compose(stem_block_mask(q, k, v, CONFIG), part),
        "layout": layout.from_block_mask,
        "density": block_density,
        "recall": lambda part: diagnostics.recall(q, k, part),
        "error": lambda part: diagnostics.output_error(q, k, v, part),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match="a slice keeps the lengths of the whole"):
            print(name, call(rows))
    if mask[:1].mask_mod is not mask.mask_mod:  # PyTorch takes it away
        with pytest.raises(ValueError, match="a slice of a BlockMask, which has none"):
            sparse_prefill(q[:1], k[:1], v[:1], mask[:1])
    part = mask[:1]
    part.mask_mod = mask.mask_mod
    assert torch.equal(reference.dense_mask(part), reference.dense_mask(mask)[:1])
    assert block_density(part) < 1.0 or not own
