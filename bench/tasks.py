"""Long-context tasks: the questions of bench.families hidden in real text, as tokens of an exact length.

`assemble` hides the statements of a task in a haystack of real text and returns tokens of an exact length, so that
the same task can be scored by generation, or by teacher forcing (`Example.scored` marks the answer tokens).
Perplexity on real held-out text has no question: see `text_windows`.
"""

from __future__ import annotations

import ast
import importlib.util
import itertools
import random
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.families import WORD_LISTS, Task, make_task

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Example:
    """A task as tokens.

    scored: bool, of ids[answer_start + i]. needles: the first token of every statement.
    asked: [first, last) tokens of the statements that hold a scored value.
    """

    family: str
    ids: np.ndarray
    answer_start: int
    scored: np.ndarray
    values: tuple[str, ...]
    needles: tuple[int, ...]
    asked: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Frame:
    """The tokens around a prompt: a beginning of text, or an instruct model's chat.

    before: put first. between: where a chat's question ends and the model's answer begins, in place of the line break
    and "Answer:" of a question; None where there is no chat.
    """

    before: tuple[int, ...] = ()
    between: tuple[int, ...] | None = None

    def tail(self, question: str, encode: Encode) -> list[int]:
        """The tokens of a question and of the beginning of its answer."""
        if self.between is None:
            return encode(question)
        asked, _, begun = question.partition("\nAnswer:")
        return [*encode(asked), *self.between, *encode(begun.lstrip(" "))]


def chat_frame(tokenizer: Any) -> Frame:
    """The frame of one user message and the model's answer, by the tokenizer's chat template."""
    mark = "\u2042"
    said = [{"role": "user", "content": mark}]
    text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    before, found, between = text.partition(mark)
    if not found:
        raise ValueError("tokenizer's chat template must hold the user's message as it is; use a frame without chat")
    return Frame(*(tuple(tokenizer.encode(part, add_special_tokens=False)) for part in (before, between)))


class AnswerTooLongError(ValueError):
    """An answer takes more tokens than it was given."""


# ---- the assembly ------------------------------------------------------------------------------------------------


def _fit_word_list(task_seed: int, family: str, encode: Encode, room: int) -> Task:
    """The longest word-list task of `family` whose lines take at most `room` tokens."""
    make = WORD_LISTS[family]
    items = max(60, room // 3)
    while True:
        task = make(random.Random(f"{family}/{task_seed}"), items=items)
        used = sum(len(encode("\n" + line)) for line in task.lines)
        if used <= room or items <= 60:
            return task
        items = max(60, min(items - 12, int(items * room / used)))


def assemble(
    family: str,
    seed: int,
    length: int,
    encode: Encode,
    haystack: np.ndarray,
    breaks: np.ndarray,
    *,
    frame: Frame | None = None,
    answer_room: int | None = None,
) -> Example:
    """Hide task `seed` of `family` in real text; prompt and answer together take exactly `length` tokens.

    With `answer_room` the prompt takes exactly `length - answer_room` tokens, wherever the answer ends.
    The word-list families have no haystack: they fill what the list leaves with text in front of it.

    Args:
        encode: text to token ids, without special tokens.
        haystack: int (tokens,), at least `length` tokens of real text.
        breaks: bool (vocabulary,), tokens before which a line may be put; see `break_table`.
        frame: tokens around the prompt; None puts none.

    Raises:
        ValueError: `length` too short for the task, or haystack shorter than `length`.
    """
    rng = random.Random(f"{family}/{seed}/{length}")
    task = make_task(family, seed)
    if not task.haystack:
        task = _fit_word_list(seed, family, encode, length - 160 - (answer_room or 0))
    frame = frame or Frame()
    head = [*frame.before, *encode(task.intro)]
    lines = [encode("\n" + line) for line in task.lines]
    pieces = [encode(text) for text, _ in task.answer]
    answer_tokens = sum(map(len, pieces))
    if answer_room is not None and answer_tokens > answer_room:
        raise AnswerTooLongError(
            f"answer_room must be at least {answer_tokens} for this {family} task, got {answer_room}"
        )
    question = frame.tail(task.question, encode)
    room = length - len(head) - len(question) - sum(map(len, lines))
    room -= answer_tokens if answer_room is None else answer_room
    if room < 0:
        raise ValueError(
            f"length must be at least {length - room} tokens for this {family} task, got {length}; raise it"
        )
    text = _excerpt(haystack, room, rng)
    places = _places(text, breaks, len(lines), rng) if task.haystack else [room] * len(lines)
    hidden, needles_at = _hide(text, lines, places)
    needles_at = [len(head) + at for at in needles_at]
    asked = [
        (at, at + len(line))
        for at, line, said in zip(needles_at, lines, task.lines, strict=True)
        if any(value in said for value in task.values)
    ]
    prompt = head + hidden + question
    scored = [flag for piece, (_, flag) in zip(pieces, task.answer, strict=True) for _ in piece]
    ids = np.asarray([*prompt, *itertools.chain(*pieces)], np.int64)
    return Example(family, ids, len(prompt), np.asarray(scored, bool), task.values, tuple(needles_at), tuple(asked))


def _excerpt(haystack: np.ndarray, length: int, rng: random.Random) -> np.ndarray:
    """`length` tokens from anywhere in `haystack`."""
    if len(haystack) < max(length, 1):
        raise ValueError(f"haystack must hold at least {length} tokens, got {len(haystack)}; give more text")
    start = rng.randrange(len(haystack) - length + 1)
    return np.asarray(haystack[start : start + length], dtype=np.int64)


def _hide(text: np.ndarray, lines: list[list[int]], places: list[int]) -> tuple[list[int], list[int]]:
    """`text` with each line put in at its place (ascending), and where each line then begins."""
    ids: list[int] = []
    begins: list[int] = []
    last = 0
    for place, line in zip(places, lines, strict=True):
        ids += text[last:place].tolist()
        begins.append(len(ids))
        ids += line
        last = place
    return ids + text[last:].tolist(), begins


def _places(text: np.ndarray, breaks: np.ndarray, count: int, rng: random.Random) -> list[int]:
    """`count` insertion points at line breaks of `text`, ascending, spread uniformly."""
    wanted = sorted(rng.randrange(len(text) + 1) for _ in range(count))
    ends = np.append(np.flatnonzero(breaks[text]), len(text))
    return ends[np.searchsorted(ends, wanted)].tolist()


def score(output: str, values: Sequence[str]) -> float:
    """RULER's measure: the share of `values` contained in `output`; exact match is score == 1."""
    return sum(value in output for value in values) / len(values)


# ---- real text ---------------------------------------------------------------------------------------------------


def break_table(decode: Callable[[list[int]], str], vocabulary: int) -> np.ndarray:
    """bool (vocabulary,): tokens whose text begins with a newline; a statement goes before it on its own line."""
    return np.array([decode([token]).startswith("\n") for token in range(vocabulary)])


def library_texts(limit_bytes: int = 4_000_000) -> Iterator[str]:
    """Source files of the running Python's standard library, in a fixed order; the shipped model never saw them."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    total = 0
    for path in sorted(root.rglob("*.py"), key=lambda p: str(p.relative_to(root))):
        if skip & set(path.relative_to(root).parts) or not 4_000 < path.stat().st_size < 200_000:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        total += len(text)
        yield text
        if total >= limit_bytes:
            return


def prose_texts(limit_bytes: int = 4_000_000) -> Iterator[str]:
    """English about Python: the topics that pydoc has of the reference manual, and the library's long docstrings."""
    total = 0
    topics = importlib.import_module("pydoc_data.topics").topics if importlib.util.find_spec("pydoc_data") else {}
    manual = (topics[name] for name in sorted(topics))
    documented = (ast.walk(ast.parse(text)) for text in library_texts(10 * limit_bytes))
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    said = (ast.get_docstring(node) or "" for nodes in documented for node in nodes if isinstance(node, kinds))
    for text in itertools.chain(manual, said):
        if len(text) > 300:
            total += len(text)
            yield text + "\n\n"
        if total >= limit_bytes:
            return


def text_windows(tokens: np.ndarray, length: int, count: int, seed: int = 0) -> np.ndarray:
    """int64 (count, length): windows of real text for perplexity, spread over `tokens`."""
    if len(tokens) < length:
        raise ValueError(
            f"tokens must hold at least {length} tokens, got {len(tokens)}; give more text or a shorter length"
        )
    starts = np.random.default_rng(seed).integers(0, len(tokens) - length + 1, count)
    return np.stack([tokens[s : s + length] for s in starts]).astype(np.int64)
