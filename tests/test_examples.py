"""The main job, on a prompt short enough for every run."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("transformers", reason="the example needs transformers")
pytest.importorskip("matplotlib", reason="the example draws with matplotlib")


def load(path: Path):
    spec = importlib.util.spec_from_file_location("example_" + path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example():
    return load(ROOT / "examples" / "prefill.py")


@pytest.fixture
def random_model(example, monkeypatch, tmp_path):
    """Without the shipped model, whatever is in the checkout."""
    monkeypatch.setattr(example, "MODEL", tmp_path / "none")


def test_random_model(example, random_model, tmp_path, capsys):
    picture = tmp_path / "blocks.png"
    result = example.main(["--length", "2048", "--keep", "0.3", "--answer", "3", "--picture", str(picture)])
    stem, dense = result["stem"], result["dense"]
    assert picture.stat().st_size > 1000
    assert not result["trained"]
    assert len(stem.densities) == stem.layers == dense.layers == 4
    assert all(0.3 < density < 1 for density in stem.densities)
    assert len(stem.attention_ms) == 4
    assert 0 < result["error"] < 2
    printed = capsys.readouterr().out
    for word in ("tokens", "2,048", "blocks computed", "building masks", "attention", "last logits", "answer"):
        assert word in printed


def test_keeping_everything_is_dense(example, random_model, tmp_path):
    result = example.main(["--length", "1024", "--keep", "1.0", "--answer", "3", "--picture", str(tmp_path / "a.png")])
    assert result["error"] < 1e-4
    assert result["stem"].answer == result["dense"].answer
    assert set(result["stem"].densities) == {1.0}


def test_prompt_holds_the_sentence_and_has_the_length(example):
    tokenizer = example.ByteTokenizer()
    text = example.DOCUMENT.read_text()
    ids = example.prompt_ids(tokenizer, text, 5000, None, 0.5)
    read = tokenizer.decode(ids)
    assert len(ids) == 5000
    assert example.NEEDLE in read
    assert read.endswith(example.QUESTION)
    asked = tokenizer.decode(example.prompt_ids(tokenizer, text, 5000, "Who?", 0.5))
    assert example.VALUE not in asked
    assert asked.endswith("Question: Who?\nAnswer:")


def test_errors(example, tmp_path):
    with pytest.raises(SystemExit):
        example.main([str(tmp_path / "missing.txt")])
    with pytest.raises(SystemExit, match="--length must be more than"):
        example.prompt_ids(example.ByteTokenizer(), "text", 10, "Who?", 0.5)


def test_dense_runs_do_not_change_the_model(example, random_model):
    model, _, _ = example.load(None, torch.device("cpu"))
    assert model.config._attn_implementation == "sdpa"
