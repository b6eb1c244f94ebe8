"""The needle LM's training code: equal to transformers, every path runs, generated answers are in the text."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "needle_lm"))
from data import JOINT, VALUE, Sequences
from model import ModelConfig, NeedleLM, load_weights, save_pretrained

from bench import families, tasks, words

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "needle_lm"
SMALL = ModelConfig(
    vocab_size=300,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    head_dim=16,
    intermediate_size=80,
)


@pytest.fixture(scope="module")
def tokenizer():
    """The shipped tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    return tokenizers.Tokenizer.from_file(str(EXAMPLE / "tokenizer.json"))


@pytest.fixture(scope="module")
def document(tokenizer) -> np.ndarray:
    """Tokens of the shipped document."""
    text = (EXAMPLE / "document.txt").read_text(encoding="utf-8")
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.uint16)


def test_training_forward_equals_qwen3(tmp_path: Path) -> None:
    """The same weights give the same logits in transformers, and survive saving and loading."""
    transformers = pytest.importorskip("transformers")
    model = NeedleLM(SMALL)
    model.reset_parameters(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    save_pretrained(model, tmp_path, "{}")
    load_weights(model, tmp_path)  # rounded to bfloat16
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(other).__name__ == "Qwen3ForCausalLM"
    ids = torch.randint(0, SMALL.vocab_size, (2, 77), generator=generator)
    with torch.no_grad():
        expected = other(ids).logits
        torch.testing.assert_close(model.logits(ids), expected, atol=1e-4, rtol=1e-4)
        model.repeat_kv = True
        torch.testing.assert_close(model.logits(ids), expected, atol=1e-4, rtol=1e-4)
        targets = ids.roll(-1, 1)
        loss, correct = model.losses(ids, targets, torch.float32, chunk=50)
    reference = torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(loss, reference, atol=1e-4, rtol=1e-4)
    assert torch.equal(correct, (expected.argmax(-1) == targets).flatten())


def test_shards_fit_the_limits(tmp_path: Path) -> None:
    """bf16 shards of the shipped sizes stay below 16 MB each and 32 MB together."""
    save_pretrained(NeedleLM(ModelConfig()), tmp_path, "{}")
    sizes = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    assert max(sizes) <= 16_000_000
    assert sum(sizes) <= 32_000_000


@pytest.mark.parametrize("length", [256, 512, 4096])
def test_sequences_hold_their_answers(length: int, tokenizer, document: np.ndarray) -> None:
    """A sequence has exactly its length, and answers stand in the text before the questions."""
    breaks = tasks.break_table(tokenizer.decode, tokenizer.get_vocab_size())
    sequences = Sequences(document, tokenizer, [*words.ADJECTIVES, *words.NOUNS], breaks)
    rng = random.Random(0)
    for _ in range(20):
        ids, marks = sequences.build(rng, length)
        assert ids.shape == marks.shape == (length,)
        assert set(np.unique(marks)) <= {0, VALUE, JOINT}
        assert (marks > 0).any()
        assert marks[0] == 0
        runs = np.flatnonzero(np.diff(np.concatenate(([0], (marks == VALUE).astype(int), [0]))))
        for start, end in zip(runs[::2], runs[1::2], strict=True):
            answer = tokenizer.decode(ids[start:end].tolist()).strip()
            assert answer.split()[0] in tokenizer.decode(ids[:start].tolist())


def test_document_is_long_enough(document: np.ndarray) -> None:
    """The shipped document has at least 16K tokens."""
    assert len(document) >= 16384


@pytest.mark.slow
def test_tiny_run_trains_saves_and_resumes(tmp_path: Path) -> None:
    """`train.py --tiny` runs every stage on a CPU, writes a loadable model and scores, and resumes."""
    command = [
        sys.executable,
        str(EXAMPLE / "train.py"),
        "--out",
        str(tmp_path),
        "--tiny",
        "--pack",
        str(tmp_path / "p"),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for extra in ([], ["--resume"]):
        done = subprocess.run([*command, *extra], capture_output=True, text=True, env=env, timeout=170, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["updates"] == 16
    assert set(scores["accuracy"]) == set(families.FAMILIES)
    assert {path.suffix for path in (tmp_path / "p").iterdir()} == {".safetensors", ".tar"}
