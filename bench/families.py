"""The questions of the long-context tasks, as text: statements to hide, what is asked, and the answer.

After RULER (arXiv 2404.06654), written anew from the paper's description:

    single_number, single_word, single_uuid   one needle; the value is a number, a word pair, a UUID
    multi_key, multi_key_uuid                 one question among needles with other, partly similar keys
    multi_value                               one key with several values, listed in order of appearance
    multi_query                               several keys asked at once
    variable_tracking                         a chain of assignments, among chains of other values
    common_words, frequent_words              aggregation over a list of words

Short forms of the same for instruct models of 0.1 B parameters, with keys and values of few tokens:

    fact_place, _color, _day, _fruit, _animal, _price    one statement about a noun
    fact_numbers                              a number, among three other statements of its kind
    short_tracking                            the place at the beginning of a chain, asked from its end
    top_word                                  the one word of a list that occurs most

The facts were chosen from twenty by what SmolLM2-135M-Instruct answers densely at 4K tokens, 48 prompts each: 88 to
100 % of these; 44 to 90 % of digits, names, months, materials; 35 to 70 points less beside three more statements.
"""

from __future__ import annotations

import itertools
import random
import string
from collections.abc import Callable
from dataclasses import dataclass

from bench.words import ADJECTIVES, KINDS, NOUNS, PLURALS, distinct, number, similar_keys, word_pair


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


# ---- short forms, for small instruct models ----------------------------------------------------------------------

PLACES = """Paris London Berlin Madrid Rome Vienna Dublin Lisbon Warsaw Prague Oslo Athens Cairo Delhi Tokyo Sydney
Boston Chicago Denver Seattle""".split()
COLORS = "red blue green yellow black white orange purple silver golden".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
FRUITS = "apple banana cherry grape lemon mango orange peach pear plum".split()
ANIMALS = "tiger rabbit eagle dolphin camel otter panther falcon lizard pelican".split()
_FACTS = (
    "Some facts are hidden in the following text. Find them and memorize them. You will be asked about them later.\n\n"
)


def fact(
    rng: random.Random, family: str, value: Callable[[random.Random], str], said: str, asked: str, *, others: int = 0
) -> Task:
    """A statement ``said`` about a noun, asked back, among ``others`` of its kind about other nouns.

    Args:
        value: draws a value.
        said: the statement, of ``{key}`` and, at its end, ``{value}``; the answer begins with it.
        asked: the question, of ``{key}``.
    """
    keys = distinct(lambda r: r.choice(NOUNS), 1 + others, rng)
    values = distinct(value, 1 + others, rng)
    lines = [f"{said.format(key=k)} {v}." for k, v in zip(keys, values, strict=True)]
    rng.shuffle(lines)
    question = f"\n\nQuestion: {asked.format(key=keys[0])}\nAnswer: {said.format(key=keys[0])}"
    return Task(family, _FACTS, tuple(lines), question, ((f" {values[0]}", True), (".\n", False)))


def _digits(count: int) -> Callable[[random.Random], str]:
    return lambda rng: number(rng, count)


def _of(words: list[str]) -> Callable[[random.Random], str]:
    return lambda rng: rng.choice(words)


_KINDS: dict[str, tuple[Callable[[random.Random], str], str, str]] = {
    "place": (_of(PLACES), "The {key} is hidden in", "Where is the {key} hidden?"),
    "color": (_of(COLORS), "The secret color of the {key} is", "What is the secret color of the {key}?"),
    "day": (_of(DAYS), "The {key} is delivered on", "When is the {key} delivered?"),
    "fruit": (_of(FRUITS), "The favorite fruit of the {key} is the", "What is the favorite fruit of the {key}?"),
    "animal": (_of(ANIMALS), "The {key} is guarded by a", "Who guards the {key}?"),
    "price": (_digits(3), "The price of the {key} is", "What is the price of the {key}?"),
}
_NUMBER = _digits(4), "The special magic number for {key} is:", "What is the special magic number for {key}?"


def short_tracking(rng: random.Random, *, hops: int = 1, chains: int = 2) -> Task:
    """Chains 'The lemon is hidden in Oslo.', 'The pebble is at the same place as the lemon.'; asked for the place of
    the last, with the first named."""
    names = distinct(lambda r: r.choice(NOUNS), chains * (hops + 1), rng)
    values = distinct(_of(PLACES), chains, rng)
    lines, last = [], names[hops]
    for c, value in enumerate(values):
        chain = names[c * (hops + 1) : (c + 1) * (hops + 1)]
        links = [f"The {new} is at the same place as the {old}." for old, new in itertools.pairwise(chain)]
        lines += [f"The {chain[0]} is hidden in {value}.", *links]
    question = (
        f"\n\nQuestion: Where is the {last} hidden?\n"
        f"Answer: The {last} is at the same place as the {names[0]}, which is hidden in"
    )
    return Task("short_tracking", _FACTS, tuple(lines), question, ((f" {values[0]}", True), (".\n", False)))


def top_word(rng: random.Random, *, items: int, share: float = 0.2) -> Task:
    """A list of `items` nouns, of which one is every fifth word; it is asked for."""
    top, *rare = distinct(lambda r: r.choice(NOUNS), 40, rng)
    often = int(items * share)
    words = [top] * often + [rng.choice(rare) for _ in range(items - often)]
    rng.shuffle(words)
    question = (
        "\n\nQuestion: Which word is the most common one in the list?\nAnswer: The most common word in the list is"
    )
    return _word_list("top_word", words, [top], question)


# ---- the registry ------------------------------------------------------------------------------------------------

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
SHORT: dict[str, Callable[[random.Random], Task]] = {
    **{f"fact_{kind}": lambda rng, kind=kind: fact(rng, f"fact_{kind}", *_KINDS[kind]) for kind in _KINDS},
    "fact_numbers": lambda rng: fact(rng, "fact_numbers", *_NUMBER, others=3),
    "short_tracking": short_tracking,
    "top_word": lambda rng: top_word(rng, items=600),
}
ALL = {**FAMILIES, **SHORT}
WORD_LISTS = {"common_words": common_words, "frequent_words": frequent_words, "top_word": top_word}
SINGLE = ("single_number", "single_word", "single_uuid")
HARDER = ("fact_numbers", "short_tracking", "top_word")  # what a model of 0.1 B parameters need not do well
FACTS = tuple(f"fact_{kind}" for kind in _KINDS)
MULTI = ("multi_key", "multi_key_uuid", "multi_value", "multi_query")


def make_task(family: str, seed: int) -> Task:
    """The task number `seed` of `family`.

    Raises:
        ValueError: unknown family.
    """
    if family not in ALL:
        raise ValueError(f"family must be one of {sorted(ALL)}, got {family!r}; choose one of them")
    return ALL[family](random.Random(f"{family}/{seed}"))
