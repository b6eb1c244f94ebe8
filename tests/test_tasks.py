"""The RULER-style tasks: exact lengths, seeds, answers where they should be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench import families, tasks

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "needle_lm"


@pytest.fixture(scope="module")
def tokenizer():
    """The shipped tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    return tokenizers.Tokenizer.from_file(str(EXAMPLE / "tokenizer.json"))


@pytest.fixture(scope="module")
def text(tokenizer) -> np.ndarray:
    """Tokens of the shipped document."""
    document = (EXAMPLE / "document.txt").read_text(encoding="utf-8")
    return np.array(tokenizer.encode(document, add_special_tokens=False).ids)


def _assemble(family: str, seed: int, length: int, tokenizer, text: np.ndarray) -> tasks.Example:
    breaks = tasks.break_table(tokenizer.decode, tokenizer.get_vocab_size())
    return tasks.assemble(
        family,
        seed,
        length,
        lambda s: tokenizer.encode(s, add_special_tokens=False).ids,
        text,
        breaks,
        frame=tasks.Frame((0,)),
    )


@pytest.mark.parametrize("family", families.ALL)
def test_examples_have_the_length_and_hold_the_answer(family: str, tokenizer, text: np.ndarray) -> None:
    """Prompt and answer take `length` tokens; the scored tokens spell the values; the prompt contains them."""
    example = _assemble(family, 3, 4096, tokenizer, text)
    assert len(example.ids) == 4096
    assert len(example.scored) == 4096 - example.answer_start
    answer = tokenizer.decode(example.ids[example.answer_start :].tolist())
    prompt = tokenizer.decode(example.ids[: example.answer_start].tolist())
    assert tasks.score(answer, example.values) == 1.0
    assert all(value in prompt for value in example.values)
    spelled = tokenizer.decode(example.ids[example.answer_start :][example.scored].tolist())
    assert spelled.split() == [word for value in example.values for word in value.split()]


@pytest.mark.parametrize("family", ["multi_key", "multi_value", "frequent_words"])
def test_seeds_decide(family: str, tokenizer, text: np.ndarray) -> None:
    """The same seed gives the same tokens, another seed others."""
    first = _assemble(family, 1, 3000, tokenizer, text)
    assert np.array_equal(first.ids, _assemble(family, 1, 3000, tokenizer, text).ids)
    assert not np.array_equal(first.ids, _assemble(family, 2, 3000, tokenizer, text).ids)


@pytest.mark.parametrize("family", families.ALL)
def test_answer_room_ends_the_prompt(family: str, tokenizer, text: np.ndarray) -> None:
    """With an answer room the prompt has its own exact length; a room too small is named."""
    breaks = tasks.break_table(tokenizer.decode, tokenizer.get_vocab_size())

    def assemble(room: int) -> tasks.Example:
        return tasks.assemble(family, 4, 4096, lambda s: tokenizer.encode(s, add_special_tokens=False).ids, text,
                              breaks, frame=tasks.Frame((0,)), answer_room=room)  # fmt: skip

    example = assemble(512)
    assert example.answer_start == 4096 - 512
    assert len(example.ids) == example.answer_start + len(example.scored)
    assert tasks.score(tokenizer.decode(example.ids[example.answer_start :].tolist()), example.values) == 1.0
    with pytest.raises(
        tasks.AnswerTooLongError, match=rf"answer_room must be at least \d+ for this {family} task, got 1"
    ):
        assemble(1)


@pytest.mark.parametrize("family", ["single_number", "multi_value", "variable_tracking"])
def test_asked_statements_hold_the_values(family: str, tokenizer, text: np.ndarray) -> None:
    """`asked` spans are whole statements, each with a scored value, and together hold every one."""
    example = _assemble(family, 2, 4096, tokenizer, text)
    said = [tokenizer.decode(example.ids[first:last].tolist()) for first, last in example.asked]
    assert all(any(value in line for value in example.values) for line in said)
    assert all(any(value in line for line in said) for value in example.values)
    assert {first for first, _ in example.asked} <= set(example.needles)


def test_multi_value_lists_in_order_of_appearance(tokenizer, text: np.ndarray) -> None:
    """The values are listed as they appear in the prompt."""
    example = _assemble("multi_value", 5, 4096, tokenizer, text)
    prompt = tokenizer.decode(example.ids[: example.answer_start].tolist())
    places = [prompt.index(value) for value in example.values]
    assert len(places) == 4
    assert places == sorted(places)


def test_multi_key_has_similar_distractors() -> None:
    """Some distractor shares a half of the asked key."""
    task = families.make_task("multi_key", 0)
    key = task.question.split(" for ")[1].split(" in the text")[0]
    adjective, noun = key.split("-")
    others = [line for line in task.lines if key not in line]
    assert len(task.lines) == 16
    assert any(f" {adjective}-" in line or f"-{noun} " in line for line in others)


def test_variable_chain_is_traceable() -> None:
    """Following the assignments from the value gives exactly the answer."""
    task = families.make_task("variable_tracking", 7)
    value = task.question.split("value ")[1].split(",")[0]
    held: dict[str, str] = {}
    for line in task.lines:
        name, source = line.removeprefix("VAR ").split(" = ")
        held[name] = held[source.removeprefix("VAR ")] if source.startswith("VAR ") else source
    assert {name for name, v in held.items() if v == value} == set(task.values)


def test_score_counts_contained_values() -> None:
    """Half of the values found scores a half."""
    assert tasks.score("12, 34", ["12", "56"]) == 0.5


def test_unknown_family_and_short_length_are_named(tokenizer, text: np.ndarray) -> None:
    """Errors name the argument."""
    with pytest.raises(ValueError, match="family must be one of"):
        families.make_task("nothing", 0)
    with pytest.raises(ValueError, match="length must be at least"):
        _assemble("multi_key", 0, 128, tokenizer, text)
    with pytest.raises(ValueError, match="haystack must hold"):
        _assemble("single_number", 0, 40000, tokenizer, text[:100])
