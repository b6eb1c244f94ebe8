"""transformers models under autocast, where positions make queries and keys float32 beside bfloat16 values."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")

import stem_flex.integrations.hf as stem_hf  # noqa: E402
from stem_flex import StemConfig, layout, stem_block_mask  # noqa: E402
from stem_flex.integrations import hf_attention  # noqa: E402
from tests.hf_models import KEEP_ALL, SPARSE, padded, prompt, tiny_model  # noqa: E402


def test_a_float32_model_under_autocast_is_its_sdpa(exactly, selections):
    own = tiny_model("llama").float()
    model = stem_hf.apply(tiny_model("llama").float(), KEEP_ALL, dense_layers=(), min_tokens=0)
    model.load_state_dict(own.state_dict())
    own.set_attn_implementation("sdpa")
    given, real = {"input_ids": prompt(), "attention_mask": padded("left"), "use_cache": False}, padded("left").bool()
    with torch.no_grad():
        exact = own(**given).logits[real]
        with torch.autocast("cpu", torch.bfloat16):
            got, expected = (x(**given).logits[real] for x in (model, own))
    assert got.dtype == expected.dtype
    assert (got - exact).abs().max() <= 2 * (expected - exact).abs().max()
    assert {x.dtype for q, k, v, _, _ in selections for x in (q, k, v)} == {torch.bfloat16}


@pytest.mark.parametrize("dense", [True, False])
def test_mixed_queries_keys_and_values_are_cast_as_sdpa_casts_them(exactly, dense):
    model = stem_hf.apply(tiny_model("llama"), SPARSE, dense_layers=(0,) if dense else (), min_tokens=0)
    seen = []
    forward = hf_attention.stem_attention_forward

    class Stop(Exception):  # noqa: N818
        pass

    def spy(module, query, key, value, mask, *args, **kwargs):
        mixed = query.float(), key.float(), value.bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            seen.append(forward(module, *mixed, mask, *args, **kwargs)[0])
        seen.append(forward(module, *(x.bfloat16() for x in mixed), mask, *args, **kwargs)[0])
        raise Stop

    transformers.AttentionInterface.register("stem_flex", spy)
    try:
        with pytest.raises(Stop), torch.no_grad():
            model(prompt(), use_cache=False)
    finally:
        transformers.AttentionInterface.register("stem_flex", forward)
    assert seen[0].dtype == torch.bfloat16
    assert torch.equal(*seen)


def test_sink_rows_under_autocast_are_those_outside_it(make_qkv):
    q, k, v = make_qkv(Lq=100)
    config = StemConfig(block_size=16, schedule="fixed", k_start=2, sink_blocks=1, local_blocks=1)
    mask = stem_block_mask(q, k, v, config, layout=layout.padding([100, 71]))
    given = (q, k, v, mask, None, 5.0, torch.randn(4))
    outside = hf_attention._sink_attention_rows(*given)
    with torch.autocast("cpu", torch.bfloat16):
        inside = hf_attention._sink_attention_rows(*given)
    with torch.device("meta"):
        elsewhere = hf_attention._sink_attention_rows(*given)
    assert torch.equal(inside, outside)
    assert torch.equal(elsewhere, outside)
