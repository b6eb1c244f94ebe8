"""Whatever PyTorch is switched to around a call, blocks, scores and measures are what they are without."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import stem_flex
from stem_flex import (
    StemConfig,
    compose,
    diagnostics,
    layout,
    oam_scores,
    reference,
    selectors,
    stem_attention,
    stem_block_mask,
    tpd_budget,
)
from stem_flex.attention import sparse_prefill
from stem_flex.budget import causal_density
from stem_flex.mask import layout_block_mask
from stem_flex.plumbing.ambient import cast_as_sdpa
from stem_flex.plumbing.tables import block_classes
from stem_flex.select import select_blocks

CONFIG = StemConfig(block_size=16, schedule="fixed", k_start=2, sink_blocks=1, local_blocks=1)
PACKAGE = Path(stem_flex.__file__).parent


@contextlib.contextmanager
def switched(switch: Callable, on: object, off: object) -> Iterator[None]:
    switch(on)
    try:
        yield
    finally:
        switch(off)


class Watched(TorchFunctionMode):
    def __torch_function__(self, f, types, args=(), kwargs=None):
        return f(*args, **(kwargs or {}))


def _deterministic(value: str | bool) -> None:
    torch.use_deterministic_algorithms(bool(value), warn_only=value == "warn")


STATES = {
    "autocast to bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16),
    "default device": lambda: switched(torch.set_default_device, "meta", None),
    "device context": lambda: torch.device("meta"),
    "default float64": lambda: switched(torch.set_default_dtype, torch.float64, torch.float32),
    "default float16": lambda: switched(torch.set_default_dtype, torch.float16, torch.float32),
    "default bfloat16": lambda: switched(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "deterministic": lambda: switched(_deterministic, "strict", False),
    "deterministic, warnings": lambda: switched(_deterministic, "warn", False),
    "float32 products in bfloat16": lambda: switched(torch.set_float32_matmul_precision, "medium", "highest"),
    "anomaly mode": torch.autograd.detect_anomaly,
    "saved tensor hooks": lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x),
    "no saved tensor hooks": lambda: torch.autograd.graph.disable_saved_tensors_hooks("none here"),
    "warn always": lambda: switched(torch.set_warn_always, True, False),
    "flush denormal": lambda: switched(torch.set_flush_denormal, True, False),
    "another thread count": lambda: switched(torch.set_num_threads, 1, torch.get_num_threads()),
    "torch function mode": Watched,
    "dispatch mode": Dispatched if (Dispatched := type("Dispatched", (TorchDispatchMode,), {
        "__torch_dispatch__": lambda self, f, types, args=(), kwargs=None: f(*args, **(kwargs or {}))
    })) else None,
    "profiler": lambda: torch.autograd.profiler.profile(),
    "forward mode": torch.autograd.forward_ad.dual_level,
}  # fmt: skip


def _lists(mask, tokens: bool = False) -> list[Tensor]:
    """What a BlockMask says: the blocks that it lists, and what its mask_mod says of their tokens."""
    batch, heads = mask.kv_num_blocks.shape[:2]
    sizes = (batch, heads, *mask.seq_lengths)
    return [block_classes(mask), *([create_mask(mask.mask_mod, *sizes, device="cpu")] if tokens else [])]


def results(given: dict) -> dict[str, object]:
    """Every stage on the same inputs; ``given`` holds the caller's tensors, made where nothing is switched."""
    causal_density.cache_clear()
    q, k, v = given["qkv"]
    structures = {
        "causal": None,
        "padding": layout.padding(given["lengths"]) & layout.sliding_window(50),
        "host padding": layout.padding([100, 71]),
        "documents": layout.documents([0, 30, 100]),
        "ids": layout.documents(ids=given["ids"]),
        "prefix": layout.prefix(given["lengths"] // 3),
        "full": layout.full(),
        "mask_mod": layout.from_mask_mod(given["mask_mod"], None, None, 100, 100),
    }
    found: dict[str, object] = {"budget": tpd_budget(200), "density of budget": causal_density(200, StemConfig())}
    for name, structure in structures.items():
        mask = stem_block_mask(q, k, v, CONFIG, layout=structure, budget=given["budget"])
        found |= {f"{name} {i}": x for i, x in enumerate(_lists(mask, tokens=name in ("padding", "ids")))}
        found[f"{name} density"] = stem_flex.block_density(mask)
    found["scores"] = oam_scores(q, k, v, CONFIG)
    found["log scores"] = oam_scores(q, k, v, StemConfig(block_size=16, metric="log"))
    mask = stem_block_mask(q, k, v, CONFIG, q_offset=given["offset"], kv_len=given["lengths"], compute_q_blocks=True)
    found |= {f"offset {i}": x for i, x in enumerate([*_lists(mask, tokens=True), mask.q_num_blocks])}
    found |= {f"exact {i}": x for i, x in enumerate(_lists(stem_block_mask(q, k, v, CONFIG, mask_mod="exact")))}
    for name in selectors.names():
        found |= {f"{name} {i}": x for i, x in enumerate(_lists(stem_block_mask(q, k, v, CONFIG, selector=name)))}
    tables = select_blocks(given["scores"], layout.causal().bind(2, 4, 100, 100, block_size=(16, 16)), CONFIG)
    found["selected"] = tables.counts
    found |= {f"whole {i}": x for i, x in enumerate(_lists(layout_block_mask(layout.causal(), 1, 1, 100, 100)))}
    for name, other in (("mod", given["mask_mod"]), ("layout", layout.sliding_window(33)), ("mask", given["mask"])):
        found |= {f"composed with a {name} {i}": x for i, x in enumerate(_lists(compose(mask, other)))}
    found["recall"] = diagnostics.recall(q, k, given["mask"])
    found["error"] = diagnostics.output_error(q, k, v, given["mask"])
    found["reference scores"] = reference.oam_scores(q, k, v, CONFIG)
    found["reference keep"] = reference.block_keep(q, k, v, CONFIG, layout=structures["documents"])
    found["reference attention"] = reference.stem_attention(q, k, v, CONFIG)
    return found


@pytest.fixture(scope="module")
def known() -> dict:
    return {}


def _given(make_qkv) -> dict:
    ids = torch.arange(100) // 37
    scores = torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(1))
    q, k, v = make_qkv(Lq=100)
    return {
        "qkv": (q, k, v), "lengths": torch.tensor([100, 71]), "ids": ids, "offset": torch.tensor([0, 0]),
        "budget": torch.tensor([1, 2, 1, 3, 2, 1, 2]), "scores": scores, "mask": stem_block_mask(q, k, v, CONFIG),
        "mask_mod": lambda b, h, i, j: (i >= j) & (ids[i] == ids[j]),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("state", STATES)
def test_nothing_switched_around_a_call_reaches_what_it_computes(make_qkv, known, state):
    given = _given(make_qkv)
    if not known:
        known.update(results(given))
    with STATES[state]():
        got = results(given)
    assert got.keys() == known.keys()
    for name, expected in known.items():
        found = got[name]
        if isinstance(expected, Tensor):
            assert isinstance(found, Tensor)
            assert found.dtype == expected.dtype, name
            assert found.device == expected.device, name
            assert torch.equal(found.nan_to_num(), expected.nan_to_num()), name
        else:
            assert found == expected, name


FACTORIES = {
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand",
    "randint", "randn", "randperm", "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip


def test_every_tensor_that_is_made_says_its_device_and_dtype():
    wanting = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"):
                continue
            needs = {"device"} if node.func.attr in ("arange", "as_tensor", "randint") else {"device", "dtype"}
            if node.func.attr in FACTORIES and needs - {keyword.arg for keyword in node.keywords}:
                wanting.append(f"{path.relative_to(PACKAGE)}:{node.lineno} torch.{node.func.attr}")
    assert not wanting


class Products(TorchDispatchMode):
    """Dtypes of all matrix products."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        if f.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.baddbmm, torch.ops.aten.addmm):
            self.dtypes.add(args[-1].dtype)
        return f(*args, **(kwargs or {}))


def test_no_switch_for_float32_products_reaches_scores_and_measures(make_qkv):
    q, k, v = make_qkv(Lq=100)
    mask = stem_block_mask(q, k, v, CONFIG)
    with Products() as products:
        oam_scores(q, k, v, CONFIG)
        stem_block_mask(q, k, v, CONFIG)
        diagnostics.recall(q, k, mask)
        diagnostics.output_error(q, k, v, mask)
        reference.stem_attention(q, k, v, CONFIG)
    assert products.dtypes == {torch.float64}


def test_autocast_casts_what_sdpa_casts(make_qkv):
    dtype = torch.bfloat16
    q, k, v = make_qkv(B=1, Lq=100, D=32)
    mixed = (q, k, v.to(dtype))
    cast = [x.to(dtype) for x in (q, k, v)]
    with torch.autocast("cpu", dtype):
        dense = F.scaled_dot_product_attention(*mixed, is_causal=True, enable_gqa=True)
        for given in (mixed, (q, k, v), (q.to(dtype), k, v)):
            out = stem_attention(*given, CONFIG, budget=7)
            assert out.dtype == dense.dtype == dtype
            torch.testing.assert_close(out, dense, atol=2e-2, rtol=2e-2)
        chosen = stem_attention(*mixed, CONFIG)
        mask = stem_block_mask(*mixed, CONFIG)
        by_hand = sparse_prefill(*mixed, mask)
        scores = oam_scores(*mixed, CONFIG)
        error = diagnostics.output_error(*mixed, chosen)
    assert torch.equal(chosen, stem_attention(*cast, CONFIG))
    assert torch.equal(by_hand, chosen)
    assert torch.equal(scores, oam_scores(*cast, CONFIG))
    assert torch.equal(error, diagnostics.output_error(*cast, chosen))
    with pytest.raises(TypeError, match="v must have q's dtype"):
        stem_attention(*mixed, CONFIG)


def test_autocast_leaves_float64_and_gradients_through_its_cast(make_qkv):
    q, k, v = make_qkv(B=1, Lq=50, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(oam_scores(q, k, v, CONFIG), oam_scores(q, k, v, CONFIG))
        assert oam_scores(q, k, v, CONFIG).dtype == torch.float64
        assert cast_as_sdpa(q, k, v) == (q, k, v)
        weight = torch.randn(2, 3, requires_grad=True)
        assert cast_as_sdpa(weight, weight, weight)[0].requires_grad


SOME = ("default device", "default float16", "inference_mode", "deterministic")


@pytest.mark.filterwarnings("ignore")
def test_attention_is_the_same_inside_whatever_is_switched(make_qkv):
    q, k, v = make_qkv(Lq=100)
    lengths = torch.tensor([100, 71])
    expected = stem_attention(q, k, v, CONFIG, layout=layout.padding(lengths))
    for state in SOME:
        with STATES[state]():
            out = stem_attention(q, k, v, CONFIG, layout=layout.padding(lengths))
        assert torch.equal(out, expected), state
