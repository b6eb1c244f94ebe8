"""Questions on documents of Python and its packages: exact lengths, answers not given away, scores, greedy decoding."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import attend, documents, reading, tasks

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "needle_lm"
FRAME = tasks.Frame((1, 2), (3, 4, 5))


@pytest.fixture(scope="module")
def tokenizer():
    """The shipped tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    return tokenizers.Tokenizer.from_file(str(EXAMPLE / "tokenizer.json"))


@pytest.fixture(scope="module")
def encode(tokenizer):
    """Text to tokens, without special ones."""
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module", autouse=True)
def fewer_modules():
    """A few packages of the standard library are enough, and sooner read."""
    with pytest.MonkeyPatch.context() as patch:
        others = {path.stem for path in Path(random.__file__).parent.iterdir()} - {"email", "unittest", "json"}
        patch.setattr(documents, "SKIPPED", documents.SKIPPED | others)
        yield
    documents.modules.cache_clear()
    documents.docstrings.cache_clear()


@pytest.mark.parametrize("kind", documents.KINDS)
def test_questions_have_the_length_and_hide_the_answer(kind, encode, tokenizer):
    """Exactly so many tokens, by seed; the prompt does not end with its answer, and reads what it is asked about."""
    question = documents.make_question(kind, 5, 1536, encode, FRAME)
    assert question.ids.shape == (1536,)
    assert np.array_equal(question.ids, documents.make_question(kind, 5, 1536, encode, FRAME).ids)
    others = [documents.make_question(kind, seed, 1536, encode, FRAME).ids for seed in range(6, 10)]
    assert not all(np.array_equal(question.ids, ids) for ids in others)
    text = tokenizer.decode(question.ids.tolist(), skip_special_tokens=False)
    assert question.reference
    assert not text.rstrip().endswith(question.reference)
    if kind == "answer":
        assert f"Summary: {question.reference}" in text
        assert question.ids[:2].tolist() == [1, 2]
    if kind == "few_shot":
        assert text.count("Package: ") > 5
        assert text.endswith("\nPackage:")


def test_a_summary_is_not_in_its_source():
    """Docstrings of modules are taken out of what is read."""
    said = [m for m in documents.modules() if len(m.said) > 60]
    assert len(said) > 5
    assert sum(module.said[:60] in " ".join(module.source.split()) for module in said) <= len(said) // 10


def test_fill_takes_all_of_the_asked_document():
    """Exactly the room; the document asked for is whole where it fits, and cut where not."""

    def encode(text):
        return [int(x) for x in text.split()]

    rng = random.Random(0)
    ids = documents.fill("1 2 3", iter(["4 5", "6 7 8 9"]), encode, 8, rng)
    assert sorted(ids) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert ids[:3] == [6, 7, 8]
    assert documents.fill("1 2 3", iter(()), encode, 2, rng) == [1, 2]
    with pytest.raises(ValueError, match="the documents must hold 9 tokens, 4 are missing"):
        documents.fill("1 2 3", iter(["4 5"]), encode, 9, rng)


def test_unknown_kind(encode):
    with pytest.raises(ValueError, match="kind must be one of"):
        documents.make_question("poem", 0, 1024, encode, FRAME)


@pytest.mark.parametrize(
    ("kind", "reference", "said", "value"),
    [
        ("answer", "a fast array library", "The fast library.", 0.8),  # articles and case don't count
        ("summary", "read and write files", "write files and read", 0.5),  # two of four words in order, both ways
        ("completion", "return x", "\nreturn x\nmore", 1.0),
        ("few_shot", "email", " email\n", 1.0),
        ("few_shot", "email", " unittest", 0.0),
    ],
)
def test_scores(kind, reference, said, value):
    """Published metrics on worked examples."""
    pytest.importorskip("torchmetrics", reason="F1 and ROUGE-L are of torchmetrics: the extra models")
    pytest.importorskip("rapidfuzz", reason="edit similarity is of rapidfuzz: the extra models")
    first = kind != "summary"
    assert documents.score(documents.Question(kind, np.zeros(1), reference, first), said) == pytest.approx(value)


def test_greedy_is_generate():
    """Prefill and decoding under a policy is the model's own greedy generation, for rows of different ends."""
    transformers = pytest.importorskip("transformers", reason="the benchmark runs transformers models")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, initializer_range=0.3, bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    prompts = torch.randint(0, 64, (3, 40))
    seen = torch.ones_like(prompts)
    expected = model.generate(prompts, attention_mask=seen, max_new_tokens=12, do_sample=False)[:, 40:].tolist()
    end = {expected[0][5]}
    cut = [row[: next((i for i, token in enumerate(row) if token in end), 12)] for row in expected]
    assert reading.greedy(attend.prepare(model), prompts, attend.Dense(), 12, end) == cut
