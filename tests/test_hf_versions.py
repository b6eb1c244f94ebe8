"""The adapter to releases of transformers: what it reads, and what it says where something is gone."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")

from transformers import DynamicCache, LlamaForCausalLM, masking_utils  # noqa: E402

from stem_flex.integrations import hf, hf_versions  # noqa: E402
from tests.hf_models import prompt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
IDS = torch.tensor([[0, 0, 1]])
PIECES = {
    "and": (hf_versions.causal, hf_versions.causal),
    "or": (hf_versions.causal,),
    "window": (7,),
    "chunk": (5, torch.tensor([2])),
    "packed": (IDS,),
    "blockwise": (IDS,),
    "remapped": (hf_versions.causal, IDS),
}


@pytest.mark.parametrize("name", PIECES)
def test_a_piece_of_a_mask_is_read_as_it_was_made(name):
    since = hf_versions.SINCE.get(name, hf_versions.OLDEST)
    if hf_versions.release() < since:
        assert not hf_versions.has_piece(name)
        with pytest.raises(ImportError, match="has no masking_utils"):
            hf_versions.make(name, *PIECES[name])
        pytest.skip(f"transformers before {since} has no such piece")
    assert hf_versions.has_piece(name), f"{name!r} is made otherwise here: such prompts would be exact, not sparse"
    found, inside = hf_versions.piece(hf_versions.make(name, *PIECES[name]))
    assert found == name
    inside = inside[0] if name in ("and", "or") else inside
    assert all(have is given for have, given in zip(inside, PIECES[name], strict=True))


def test_other_functions_are_no_pieces():
    assert hf_versions.piece(hf_versions.causal) == ("causal", ())
    for other in (lambda b, h, q, kv: kv <= q, masking_utils.padding_mask_function(IDS), torch.add):
        assert hf_versions.piece(other) == ("", ())


def test_what_is_gone_is_named(monkeypatch):
    for read, name in (
        (hf_versions.has_interface, "PreTrainedModel._can_set_attn_implementation"),
        (hf_versions.supports_sdpa, "PreTrainedModel._supports_sdpa"),
        (hf_versions.implementation, "PreTrainedConfig._attn_implementation"),
    ):
        with pytest.raises(ImportError, match=rf"transformers .* has no {name}, which stem_flex needs of it; install"):
            read(object())
    monkeypatch.delattr(masking_utils, "sliding_window_overlay")
    with pytest.raises(ImportError, match=r"has no masking_utils\.sliding_window_overlay"):
        hf_versions.make("window", 1)
    monkeypatch.delattr(masking_utils, "causal_mask_function")
    with pytest.raises(ImportError, match=r"has no masking_utils\.causal_mask_function"):
        hf.register()


def test_a_piece_made_otherwise_is_not_misread(monkeypatch):
    def sliding_window_overlay(size):
        return lambda b, h, q, kv: kv > q - size

    monkeypatch.setattr(masking_utils, "sliding_window_overlay", sliding_window_overlay)
    monkeypatch.setattr(hf_versions, "_codes", hf_versions._read_makers())
    assert not hf_versions.has_piece("window")
    assert hf_versions.piece(hf_versions.make("window", 1)) == ("", ())


def test_releases_are_read_and_old_ones_refused(monkeypatch):
    for name, release in (("5.24.0", (5, 24)), ("5.25.0.dev0", (5, 25)), ("6.0rc1", (6, 0))):
        monkeypatch.setattr(hf_versions, "version", lambda name=name: name)
        assert hf_versions.release() == release
        hf_versions.check_release()
    monkeypatch.setattr(hf_versions, "version", lambda: "unknown")
    with pytest.raises(ImportError, match=r"must have a version such as .* got 'unknown'"):
        hf_versions.release()


def test_caches_go_in_and_come_out_under_the_releases_name(llama):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        cache = DynamicCache(config=llama.config)
        out = llama(prompt(), **hf_versions.with_cache(llama, cache))
        assert hf_versions.cache_of(out) is cache
        assert cache.get_seq_length() == 100
    assert hf_versions.with_cache(LlamaForCausalLM.forward, 1) in ({"cache": 1}, {"past_key_values": 1})


def test_nothing_private_of_transformers_is_used_elsewhere():
    private = re.compile(
        r"_attn_implementation\b(?<!set_attn_implementation)|_can_set_attn|\._supports_|masking_utils\."
    )
    files = [*ROOT.glob("stem_flex/**/*.py"), *ROOT.glob("tests/test_hf*.py"), ROOT / "tests" / "hf_models.py"]
    files += [*ROOT.glob("bench/*.py"), *ROOT.glob("examples/*.py"), ROOT / "README.md"]
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files
        if path.name not in ("hf_versions.py", "test_hf_versions.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if private.search(line)
    ]
    assert not found
