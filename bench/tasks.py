"""Long-context tasks after RULER (arXiv 2404.06654), written anew from the paper's description.

A `Task` is text: statements to hide, a question, and an answer whose pieces say whether they are scored.
`assemble` hides the statements in a haystack of real text and returns tokens of an exact length, so that
the same task can be scored by generation, or by teacher forcing (`Example.scored` marks the answer tokens).

Families (`FAMILIES`):
    single_number, single_word, single_uuid   one needle; the value is a number, a word pair, a UUID
    multi_key, multi_key_uuid                 one question among needles with other, partly similar keys
    multi_value                               one key with several values, listed in order of appearance
    multi_query                               several keys asked at once
    variable_tracking                         a chain of assignments, among chains of other values
    common_words, frequent_words              aggregation over a list of words
Perplexity on real held-out text has no question: see `text_windows`.
"""

from __future__ import annotations

import itertools
import random
import string
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.words import ADJECTIVES, KINDS, NOUNS, PLURALS, distinct, number, similar_keys, word_pair

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Task:
    """One question about hidden statements.

    lines: statements without newline (each is put on its own line), in the order in which they must appear.
    answer: (text, scored) pieces; their concatenation is the expected continuation of `question`.
    """

    family: str
    intro: str
    lines: tuple[str, ...]
    question: str
    answer: tuple[tuple[str, bool], ...]
    haystack: bool = True

    @property
    def values(self) -> tuple[str, ...]:
        """The scored strings, stripped."""
        return tuple(text.strip() for text, scored in self.answer if scored)


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


class AnswerTooLongError(ValueError):
    """An answer takes more tokens than it was given."""


# ---- needles -----------------------------------------------------------------------------------------------------


def _needle(kind: str, key: str, value: str) -> str:
    return f"One of the special magic {PLURALS[kind]} for {key} is: {value}."


def _intro(kind: str) -> str:
    plural = PLURALS[kind]
    return (
        f"Some special magic {plural} are hidden in the following text. You will be asked for the {plural} later.\n\n"
    )


def _single_question(kind: str, key: str) -> str:
    return (
        f"\n\nQuestion: What is the special magic {kind} for {key} in the text above?\n"
        f"Answer: The special magic {kind} for {key} is:"
    )


def needles(
    rng: random.Random,
    family: str,
    *,
    key_kind: str = "word",
    value_kind: str = "number",
    distractors: int = 0,
) -> Task:
    """One needle asked for among `distractors` others; a quarter of them have keys similar to the asked one."""
    keys = distinct(KINDS[key_kind], 1 + distractors, rng)
    if key_kind == "word" and distractors:
        close = similar_keys(keys[0], max(1, distractors // 4), rng)
        keys = list(dict.fromkeys([keys[0], *close, *keys[1:]]))[: 1 + distractors]
    values = distinct(KINDS[value_kind], len(keys), rng)
    lines = [_needle(value_kind, key, value) for key, value in zip(keys, values, strict=True)]
    rng.shuffle(lines)
    answer = ((f" {values[0]}", True), (".\n", False))
    return Task(family, _intro(value_kind), tuple(lines), _single_question(value_kind, keys[0]), answer)


def multi_value(rng: random.Random, *, values_per_key: int = 4, distractors: int = 4) -> Task:
    """One key with several numbers; the answer lists them in order of appearance."""
    keys = distinct(word_pair, 1 + distractors, rng)
    numbers = distinct(number, values_per_key + distractors, rng)
    pairs = [(keys[0], value) for value in numbers[:values_per_key]]
    pairs += list(zip(keys[1:], numbers[values_per_key:], strict=True))
    rng.shuffle(pairs)
    wanted = [value for key, value in pairs if key == keys[0]]
    question = (
        f"\n\nQuestion: What are all the special magic numbers for {keys[0]} in the text above, "
        f"in order of appearance?\nAnswer: The special magic numbers for {keys[0]} are:"
    )
    answer: list[tuple[str, bool]] = []
    for i, value in enumerate(wanted):
        answer += [(f" {value}", True), (".\n" if i == len(wanted) - 1 else ",", False)]
    lines = tuple(_needle("number", key, value) for key, value in pairs)
    return Task("multi_value", _intro("number"), lines, question, tuple(answer))


def multi_query(rng: random.Random, *, queries: int = 4, distractors: int = 4) -> Task:
    """Several keys in one question; the answer repeats each key before its number."""
    keys = distinct(word_pair, queries + distractors, rng)
    numbers = distinct(number, len(keys), rng)
    asked = list(zip(keys[:queries], numbers[:queries], strict=True))
    lines = [_needle("number", key, value) for key, value in zip(keys, numbers, strict=True)]
    rng.shuffle(lines)
    listed = ", ".join(key for key, _ in asked[:-1]) + f" and {asked[-1][0]}"
    question = (
        f"\n\nQuestion: What are the special magic numbers for {listed} in the text above?\n"
        f"Answer: The special magic number for {asked[0][0]} is:"
    )
    answer: list[tuple[str, bool]] = []
    for i, (key, value) in enumerate(asked):
        if i:
            answer.append((f"; for {key} is:", False))
        answer.append((f" {value}", True))
    answer.append((".\n", False))
    return Task("multi_query", _intro("number"), tuple(lines), question, tuple(answer))


# ---- tracing and aggregation -------------------------------------------------------------------------------------


def variable_tracking(rng: random.Random, *, hops: int = 4, chains: int = 2) -> Task:
    """`chains` chains 'VAR A = 12345', 'VAR B = VAR A', ...; the question asks for all names of one value."""

    def name(r: random.Random) -> str:
        return "".join(r.choice(string.ascii_uppercase) for _ in range(5))

    names = distinct(name, chains * (hops + 1), rng)
    values = distinct(lambda r: number(r, 5), chains, rng)
    queues = []
    for c, value in enumerate(values):
        chain = names[c * (hops + 1) : (c + 1) * (hops + 1)]
        links = [f"VAR {new} = VAR {old}" for old, new in itertools.pairwise(chain)]
        queues.append([f"VAR {chain[0]} = {value}", *links])
    lines = []
    while any(queues):
        lines.append(rng.choice([queue for queue in queues if queue]).pop(0))
    question = (
        f"\n\nQuestion: Which variables hold the value {values[0]}, directly or through other variables?\n"
        f"Answer: The variables that hold {values[0]} are:"
    )
    answer: list[tuple[str, bool]] = []
    for i, variable in enumerate(names[: hops + 1]):
        answer += [(f" {variable}", True), (".\n" if i == hops else ",", False)]
    intro = "Track the chains of variable assignments hidden in the following text.\n\n"
    return Task("variable_tracking", intro, tuple(lines), question, tuple(answer))


def _word_list(family: str, items: list[str], top: list[str], question: str) -> Task:
    lines = tuple(" ".join(items[i : i + 12]) for i in range(0, len(items), 12))
    answer: list[tuple[str, bool]] = []
    for i, word in enumerate(top):
        answer += [(f" {word}", True), (".\n" if i == len(top) - 1 else ",", False)]
    return Task(family, "Below is a list of words. Some occur more often.\n\n", lines, question, tuple(answer), False)


def common_words(rng: random.Random, *, items: int, common: int = 10, ratio: int = 10) -> Task:
    """A list of about `items` words; `common` of them occur `ratio` times as often as every other one."""
    rare_count = max(common, items * 2 // 3 // 3)
    pool = distinct(lambda r: r.choice(ADJECTIVES) if r.random() < 0.5 else r.choice(NOUNS), common, rng)
    rare = distinct(lambda r: r.choice(ADJECTIVES)[:4] + r.choice(NOUNS)[-4:], rare_count, rng)
    each = max(3, items // rare_count // 3)
    words = [w for w in pool for _ in range(each * ratio)] + [w for w in rare for _ in range(each)]
    rng.shuffle(words)
    words = words[:items] if len(words) > items else words
    top = sorted(pool, key=lambda w: (-words.count(w), w))
    question = f"\n\nQuestion: What are the {common} most common words in the list?\nAnswer: The most common words are:"
    return _word_list("common_words", words, top, question)


def frequent_words(rng: random.Random, *, items: int, top: int = 3, alpha: float = 2.0) -> Task:
    """A list of `items` coined words drawn from a zeta distribution; the `top` most frequent are asked, in order."""

    def coined(r: random.Random) -> str:
        return "".join(r.choice("bdfgklmnprstvz") + r.choice("aeiou") for _ in range(3))

    vocabulary = distinct(coined, 400, rng)
    weights = [(rank + 1) ** -alpha for rank in range(len(vocabulary))]
    words = rng.choices(vocabulary, weights, k=items)
    ranked = sorted(vocabulary, key=lambda w: (-words.count(w), vocabulary.index(w)))[:top]
    question = (
        f"\n\nQuestion: What are the {top} most frequent words in the list, most frequent first?\n"
        f"Answer: The most frequent words are:"
    )
    return _word_list("frequent_words", words, ranked, question)


# ---- the registry and the assembly -------------------------------------------------------------------------------

FAMILIES: dict[str, Callable[[random.Random], Task]] = {
    "single_number": lambda rng: needles(rng, "single_number"),
    "single_word": lambda rng: needles(rng, "single_word", value_kind="word"),
    "single_uuid": lambda rng: needles(rng, "single_uuid", value_kind="uuid"),
    "multi_key": lambda rng: needles(rng, "multi_key", distractors=15),
    "multi_key_uuid": lambda rng: needles(rng, "multi_key_uuid", key_kind="uuid", value_kind="uuid", distractors=7),
    "multi_value": multi_value,
    "multi_query": multi_query,
    "variable_tracking": variable_tracking,
    "common_words": lambda rng: common_words(rng, items=600),
    "frequent_words": lambda rng: frequent_words(rng, items=600),
}
SINGLE = ("single_number", "single_word", "single_uuid")
MULTI = ("multi_key", "multi_key_uuid", "multi_value", "multi_query")


def make_task(family: str, seed: int) -> Task:
    """The task number `seed` of `family`.

    Raises:
        ValueError: unknown family.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {sorted(FAMILIES)}, got {family!r}; choose one of them")
    return FAMILIES[family](random.Random(f"{family}/{seed}"))


def _fit_word_list(task_seed: int, family: str, encode: Encode, room: int) -> Task:
    """The longest word-list task of `family` whose lines take at most `room` tokens."""
    make = common_words if family == "common_words" else frequent_words
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
    bos: int | None = None,
    answer_room: int | None = None,
) -> Example:
    """Hide task `seed` of `family` in real text; prompt and answer together take exactly `length` tokens.

    With `answer_room` the prompt takes exactly `length - answer_room` tokens, wherever the answer ends.
    The word-list families have no haystack: they fill what the list leaves with text in front of it.

    Args:
        encode: text to token ids, without special tokens.
        haystack: int (tokens,), at least `length` tokens of real text.
        breaks: bool (vocabulary,), tokens before which a line may be put; see `break_table`.
        bos: token put first, if any.

    Raises:
        ValueError: `length` too short for the task, or haystack shorter than `length`.
    """
    rng = random.Random(f"{family}/{seed}/{length}")
    task = make_task(family, seed)
    if not task.haystack:
        task = _fit_word_list(seed, family, encode, length - 160 - (answer_room or 0))
    head = ([] if bos is None else [bos]) + encode(task.intro)
    lines = [encode("\n" + line) for line in task.lines]
    pieces = [encode(text) for text, _ in task.answer]
    answer_tokens = sum(map(len, pieces))
    if answer_room is not None and answer_tokens > answer_room:
        raise AnswerTooLongError(
            f"answer_room must be at least {answer_tokens} for this {family} task, got {answer_room}"
        )
    question = encode(task.question)
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


def text_windows(tokens: np.ndarray, length: int, count: int, seed: int = 0) -> np.ndarray:
    """int64 (count, length): windows of real text for perplexity, spread over `tokens`."""
    if len(tokens) < length:
        raise ValueError(
            f"tokens must hold at least {length} tokens, got {len(tokens)}; give more text or a shorter length"
        )
    starts = np.random.default_rng(seed).integers(0, len(tokens) - length + 1, count)
    return np.stack([tokens[s : s + length] for s in starts]).astype(np.int64)
