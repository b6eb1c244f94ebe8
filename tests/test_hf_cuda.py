"""transformers models under ``attn_implementation="stem_flex"`` on CUDA: compiled kernels, lse, several cards."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")

import stem_flex.integrations.hf as stem_hf  # noqa: E402
from stem_flex import StemConfig, reference  # noqa: E402
from stem_flex.integrations import hf_attention  # noqa: E402
from stem_flex.plumbing.tables import block_classes  # noqa: E402
from tests.hf_models import (  # noqa: E402
    CASES,
    KEEP_ALL,
    SPARSE,
    TOKENS,
    dense_sparse_prefill,
    kept,
    own_attention,
    padded,
    prompt,
    tiny_model,
)

pytestmark = pytest.mark.gpu

# What each brings: softcap and windows, sinks (by the lse), chunks, a value head dim of its own.
WHAT = [
    ("llama", ("left padding", "packed", "static cache", "chunked generate")),
    ("gemma2", ("left padding", "static cache")),
    ("gpt_oss", ("left padding", "dynamic cache", "generate")),
    ("llama4_text", ("right padding",)),
    ("deepseek_v3", ("left padding",)),
]


@pytest.mark.parametrize(("family", "cases"), WHAT)
def test_keep_all_is_the_models_own_attention_on_the_card(family, cases):
    model = own_attention(tiny_model(family).cuda())
    with torch.no_grad():
        expected = {name: CASES[name](model) for name in cases}
        stem_hf.apply(model, KEEP_ALL, dense_layers=(), min_tokens=0)
        for name, logits in expected.items():
            with stem_hf.trace() as seen:
                actual = CASES[name](model)
            assert {"stem", "exact"} & set(seen.count()), name
            if actual.is_floating_point():
                torch.testing.assert_close(actual, logits, atol=1e-3, rtol=0, msg=lambda text, n=name: f"{n}: {text}")
            else:
                assert torch.equal(actual, logits), name


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_sparse_prefill_on_the_card_is_that_of_the_cpu(family):
    model = stem_hf.apply(tiny_model(family), SPARSE, dense_layers=(), min_tokens=0)
    mask = padded("left")
    with torch.no_grad():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hf_attention, "sparse_prefill", dense_sparse_prefill)
            expected = model(prompt(), attention_mask=mask, use_cache=False).logits
        actual = model.cuda()(prompt().cuda(), attention_mask=mask.cuda(), use_cache=False).logits.cpu()
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], atol=1e-3, rtol=0)


def test_dense_layers_and_stem_agree_in_half_precision():
    model = tiny_model("llama", hidden_size=256, num_attention_heads=4, head_dim=64, num_hidden_layers=3)
    model = stem_hf.apply(model.cuda().bfloat16(), StemConfig.operator(), dense_layers=(0,), min_tokens=2)
    ids = prompt(tokens=1000).cuda()
    with torch.no_grad(), stem_hf.trace() as seen:
        logits = model(ids).logits
        assert seen.layers("dense")[0] == 0
        assert not set(seen.count()) - {"dense", "stem"}
        model.set_attn_implementation("sdpa")
        assert (logits - model(ids).logits).norm() <= 0.05 * logits.norm()  # so short a prompt is kept whole


def off(out, q, k, v, mask, size, scale):
    """Largest error of each row against dense attention under the tables read as of blocks of ``size``; None: all."""
    tokens = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    if size is not None:
        blocks = block_classes(mask).cpu().repeat_interleave(size[0], 2).repeat_interleave(size[1], 3) > 0
        tokens = blocks[..., : q.shape[2], : k.shape[2]] & tokens
    expected, _ = reference.masked_attention(*(x.cpu() for x in (q, k, v)), tokens, scale=scale)
    return (out.cpu() - expected).abs().amax((0, 1, 3))


def told(out, again, q, k, v, mask, scale) -> str:
    """What a wrong output looks like: this was seen once in hundreds of runs, and was not explained."""
    errors = off(out, q, k, v, mask, mask.BLOCK_SIZE, scale)
    twice = tuple(2 * size for size in mask.BLOCK_SIZE)
    lines = [
        f"rows {(errors > 1e-4).nonzero().flatten().tolist()} are wrong, by {float(errors.max())}",
        f"from dense causal attention: {float(off(out, q, k, v, mask, None, scale).max())}",
        f"from the tables as of blocks of {twice}: {float(off(out, q, k, v, mask, twice, scale).max())}",
        f"tables {tuple(mask.kv_indices.shape)} with strides {mask.kv_indices.stride()}, blocks {mask.BLOCK_SIZE}",
        f"the same call again: {float(off(again(), q, k, v, mask, mask.BLOCK_SIZE, scale).max())}",
    ]
    torch._dynamo.reset()
    lines.append(f"compiled anew: {float(off(again(), q, k, v, mask, mask.BLOCK_SIZE, scale).max())}")
    return "\n".join(lines)


@pytest.fixture
def checked(monkeypatch):
    """Every layer's blocks and output against the reference; (blocks that differ, largest error) of each call."""
    found, build, run = [], hf_attention.stem_block_mask, hf_attention.sparse_prefill

    def checked_mask(q, k, v, config, **keywords):
        mask = build(q, k, v, config, **keywords)
        expected = reference.block_keep(*(x.cpu() for x in (q, k, v)), config)
        found.append([int((kept(mask).cpu() != expected).sum())])
        return mask

    def checked_run(q, k, v, mask, **keywords):
        out = run(q, k, v, mask, **keywords)
        error = off(out, q, k, v, mask, mask.BLOCK_SIZE, keywords["scale"]).max()
        found[-1].append(float(error))
        if error > 1e-4:
            pytest.fail(told(out, lambda: run(q, k, v, mask, **keywords), q, k, v, mask, keywords["scale"]))
        return out

    monkeypatch.setattr(hf_attention, "stem_block_mask", checked_mask)
    monkeypatch.setattr(hf_attention, "sparse_prefill", checked_run)
    return found


def test_a_compiled_model_prefills_and_generates(checked):
    model = stem_hf.apply(tiny_model("llama").cuda(), SPARSE, dense_layers=(), min_tokens=0)
    ids = prompt().cuda()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        compiled = torch.compile(model)
        with stem_hf.trace() as seen:
            actual = compiled(ids, use_cache=False).logits
        assert seen.count() == {"stem": 2}
        assert [blocks for blocks, _ in checked] == [0, 0, 0, 0]
        assert max(error for _, error in checked) <= 1e-4
        torch.testing.assert_close(actual, expected, atol=1e-3, rtol=0)
        tokens = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        static = {"cache_implementation": "static", "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(compiled.generate(ids, **static), tokens)


def move(module, args, kwargs):
    """A pre-hook that brings what a layer is called with to the layer's card, as accelerate's does."""
    card = next(module.parameters()).device

    def to(x):
        if isinstance(x, tuple):
            return tuple(map(to, x))
        return x.to(card) if hasattr(x, "to") else x

    return tuple(map(to, args)), {key: to(value) for key, value in kwargs.items()}


def spread(model):
    """The second half of the model's layers on the second card."""
    layers = model.model.layers
    layers[len(layers) // 2 :].to("cuda:1")
    for module in (*layers, model.model.norm, model.lm_head):
        module.register_forward_pre_hook(move, with_kwargs=True)
    return model


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", ["left padding", "packed", "static cache", "chunked generate"])
def test_layers_may_lie_on_two_cards(name):
    model = tiny_model("llama", num_hidden_layers=4).cuda()
    stem_hf.apply(model, SPARSE, dense_layers=(), min_tokens=0)
    with torch.no_grad():
        expected = CASES[name](model)
        with stem_hf.trace() as seen:
            actual = CASES[name](spread(model))
    assert seen.layers("stem") == [0, 1, 2, 3]
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_half_precision_on_the_second_card_alone():
    sizes = dict(hidden_size=256, num_attention_heads=4, head_dim=64, num_hidden_layers=3)
    model = tiny_model("llama", **sizes).bfloat16().cuda()
    stem_hf.apply(model, StemConfig(), dense_layers=(0,), min_tokens=0)
    ids = prompt(tokens=12 * TOKENS).cuda()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        actual = model.to("cuda:1")(ids.to("cuda:1"), use_cache=False).logits  # cuda:0 stays the current one
    torch.testing.assert_close(actual.to(expected.device), expected)
