"""Generated retrieval tasks for training, in many more phrasings than `bench.tasks` evaluates.

A group is a list of statements to hide (order kept) and questions about them. A question is its text and the
answer as (text, is_value) pieces; connecting pieces (separators, repeated keys) are learned but not scored.
"""

from __future__ import annotations

import itertools
import random
import string
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Pieces = tuple[tuple[str, bool], ...]


@dataclass
class Group:
    """Statements (one line each) and questions (text, answer pieces) about them."""

    lines: list[str]
    questions: list[tuple[str, Pieces]]


STATEMENTS = (
    ("One of the special magic {p} for {k} is: {v}.", 8),
    ("The special magic {n} for {k} is: {v}.", 4),
    ("The {n} for {k} is: {v}.", 4),
    ("The {n} of {k} is {v}.", 3),
    ("{k}: {v}", 2),
    ("{k} = {v}", 2),
    ("{k} -> {v}", 1),
    ('"{k}": "{v}",', 2),
    ("({k!r}, {v!r}),", 1),
    ("Remember that {k} has the {n} {v}.", 2),
    ("Note: for {k}, use the {n} {v}.", 2),
    ("# {k} => {v}", 1),
    ("Whoever asks for {k} gets {v}.", 1),
    ("    {k}  {v}", 1),
    ("{v} is the {n} of {k}.", 1),
)
# (question, text after the value)
QUESTIONS = (
    (
        "Question: What is the special magic {n} for {k} in the text above?\n"
        "Answer: The special magic {n} for {k} is: ",
        ".\n",
        8,
    ),
    ("Question: What is the {n} for {k}?\nAnswer: The {n} for {k} is: ", ".\n", 4),
    ("Question: What is the {n} of {k}?\nAnswer: ", "\n", 4),
    ("Q: Which {n} belongs to {k}?\nA: ", "\n", 2),
    ("The {n} for {k} is: ", ".\n", 4),
    ("The {n} of {k} mentioned above is ", ".\n", 2),
    ("{k}: ", "\n", 2),
    ("{k} = ", "\n", 2),
    ('>>> lookup("{k}")\n"', '"\n', 1),
    ("What was said about {k}? Its {n} is ", ".\n", 1),
)
LISTS = (
    (
        "Question: What are all the special magic {p} for {k} in the text above, in order of appearance?\n"
        "Answer: The special magic {p} for {k} are: ",
        ", ",
        ".\n",
        8,
    ),
    ("Question: What are all the {p} for {k}, in order?\nAnswer: ", ", ", "\n", 3),
    ("All {p} of {k}: ", "; ", ".\n", 2),
    ("The {p} for {k}, first to last, are ", ", ", ".\n", 2),
    (">>> find_all({k!r})\n[", ", ", "]\n", 1),
)
# (question, before each key, between key and value, between pairs, end)
QUERIES = (
    (
        "Question: What are the special magic {p} for {l} in the text above?\nAnswer: ",
        "The special magic {n} for ",
        "; for ",
        " is: ",
        ".\n",
        8,
    ),
    ("Question: What are the {p} for {l}?\nAnswer: ", "The {n} for ", "; for ", " is: ", ".\n", 3),
    ("Question: Give the {p} of {l}.\nAnswer: ", "", ", ", " = ", ".\n", 3),
    ("Look up {l}.\n", "", "\n", ": ", "\n", 2),
    ("The {p} of {l}: ", "", "; ", " ", ".\n", 1),
)
NOUNS = (
    ("number", "numbers"), ("word", "words"), ("uuid", "uuids"), ("pass code", "pass codes"),
    ("access code", "access codes"), ("secret", "secrets"), ("serial number", "serial numbers"),
    ("label", "labels"), ("reference", "references"), ("ticket", "tickets"), ("value", "values"), ("tag", "tags"),
)  # fmt: skip


def _weighted(rng: random.Random, table: Sequence[tuple]) -> tuple:
    return rng.choices(table, [row[-1] for row in table])[0]


class Phrases:
    """Generators over one word list; `used` keeps keys and values of a sequence apart."""

    def __init__(self, words: list[str]) -> None:
        self.words = words
        self.used: set[str] = set()

    def begin(self) -> None:
        """Forget the keys and values of the last sequence."""
        self.used.clear()

    def _fresh(self, make: Callable[[], str]) -> str:
        text = make()
        for _ in range(19):
            if text not in self.used:
                break
            text = make()
        self.used.add(text)
        return text

    def coined(self, rng: random.Random) -> str:
        """A made-up word of two to four syllables."""
        n = rng.randint(2, 4)
        return "".join(rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(n))

    def key_maker(self, rng: random.Random) -> Callable[[], str]:
        """One style of keys; pairs often share parts, so that half a match is not enough."""
        style = rng.choices(range(9), (10, 3, 2, 4, 2, 2, 3, 2, 1))[0]
        if style == 0 or style == 8:
            joint = "-" if style == 0 else "_"
            if rng.random() < 0.5:
                size = rng.randint(3, 8)
                left, right = rng.sample(self.words, size), rng.sample(self.words, size)
            else:
                left = right = self.words
            return lambda: f"{rng.choice(left)}{joint}{rng.choice(right)}"
        if style == 1:
            return lambda: rng.choice(self.words)
        if style == 2:
            return lambda: f"{rng.choice(self.words)} {rng.choice(self.words)}"
        if style == 3:
            return lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4))
        if style == 4:
            return lambda: self.coined(rng)
        if style == 5:
            digits = rng.randint(3, 8)
            return lambda: str(rng.randrange(10 ** (digits - 1), 10**digits))
        if style == 6:
            return lambda: f"{rng.choice(self.words)}{rng.choice('-_. ')}{rng.randrange(100)}"
        return lambda: rng.choice(self.words).capitalize() + rng.choice(self.words).capitalize()

    def value_maker(self, rng: random.Random, noun: str | None = None) -> Callable[[], str]:
        """One style of values; more than half are seven digits."""
        style = rng.choices(range(7), (12, 2, 3, 2, 3, 1, 1))[0]
        if style == 0:
            return lambda: str(rng.randrange(10**6, 10**7))
        if style == 1:
            digits = rng.randint(3, 10)
            return lambda: str(rng.randrange(10 ** (digits - 1), 10**digits))
        if style == 2:
            return lambda: f"{rng.choice(self.words)}-{rng.choice(self.words)}"
        if style == 3:
            return lambda: rng.choice(self.words)
        if style == 4:
            return lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4))
        if style == 5:
            return lambda: f"{rng.getrandbits(32):08x}"
        return lambda: self.coined(rng)

    # ---- groups --------------------------------------------------------------------------------------------------

    def _setting(self, rng: random.Random) -> tuple[dict[str, str], str, Callable[[], str], Callable[[], str]]:
        noun, plural = NOUNS[0] if rng.random() < 0.5 else rng.choice(NOUNS)
        key, value = self.key_maker(rng), self.value_maker(rng)
        return {"n": noun, "p": plural}, _weighted(rng, STATEMENTS)[0], key, value

    def single(self, rng: random.Random, count: int, asked: int) -> Group:
        """`count` needles of one phrasing, `asked` of them asked in one question each."""
        names, statement, key, value = self._setting(rng)
        pairs = [(self._fresh(key), self._fresh(value)) for _ in range(count)]
        questions = []
        same = rng.random() < 0.5
        form = _weighted(rng, QUESTIONS)
        for k, v in rng.sample(pairs, min(asked, count)):
            text, end, _ = form if same else _weighted(rng, QUESTIONS)
            questions.append(_question(text.format(k=k, **names), [(v, True), (end, False)]))
        return Group([statement.format(k=k, v=v, **names) for k, v in pairs], questions)

    def multi_value(self, rng: random.Random, count: int, asked: int) -> Group:
        """Keys with one to four values each; the answer lists a key's values in order of appearance."""
        names, statement, key, value = self._setting(rng)
        pairs: list[tuple[str, str]] = []
        keys = []
        while len(pairs) < count or not keys:
            n = rng.choice((2, 3, 4, 4))
            k = self._fresh(key)
            keys.append(k)
            pairs += [(k, self._fresh(value)) for _ in range(n)]
            if rng.random() < 0.5:
                pairs.append((self._fresh(key), self._fresh(value)))
        rng.shuffle(pairs)
        questions = []
        for k in rng.sample(keys, min(asked, len(keys))):
            text, joint, end, _ = _weighted(rng, LISTS)
            values = [v for other, v in pairs if other == k]
            pieces = []
            for i, v in enumerate(values):
                pieces += [(v, True), (end if i == len(values) - 1 else joint, False)]
            questions.append(_question(text.format(k=k, **names), pieces))
        return Group([statement.format(k=k, v=v, **names) for k, v in pairs], questions)

    def multi_query(self, rng: random.Random, count: int, asked: int) -> Group:
        """Needles of one phrasing; a question asks for two to five keys, the answer repeats each key."""
        names, statement, key, value = self._setting(rng)
        pairs = [(self._fresh(key), self._fresh(value)) for _ in range(max(count, 2))]
        questions = []
        rest = rng.sample(pairs, len(pairs))
        while len(rest) >= 2 and len(questions) < asked:
            n = min(len(rest), rng.choice((2, 3, 4, 4, 5)))
            chosen, rest = rest[:n], rest[n:]
            text, first, joint, between, end, _ = _weighted(rng, QUERIES)
            listed = ", ".join(k for k, _ in chosen[:-1]) + f" and {chosen[-1][0]}"
            text = text.format(l=listed, **names) + first.format(**names) + chosen[0][0] + between
            pieces = []
            for i, (k, v) in enumerate(chosen):
                if i:
                    pieces.append((f"{joint}{k}{between}", False))
                pieces.append((v, True))
            questions.append(_question(text, [*pieces, (end, False)]))
        return Group([statement.format(k=k, v=v, **names) for k, v in pairs], questions)

    def chain(self, rng: random.Random, count: int, asked: int) -> Group:
        """Chains of assignments; the answer lists the names that hold a value."""
        style = rng.randrange(3)
        form = ("VAR {a} = {b}", "{a} = {b}", "let {a} be {b}")[style]
        reference = "VAR {b}" if style == 0 else "{b}"

        def name() -> str:
            if style == 0:
                return "".join(rng.choice(string.ascii_uppercase) for _ in range(rng.choice((3, 5, 5))))
            return self.coined(rng) if style == 1 else rng.choice(self.words)

        chains = []
        while sum(len(c[1]) for c in chains) < count or not chains:
            value = self._fresh(lambda: str(rng.randrange(10**4, 10**5)))
            chains.append((value, [self._fresh(name) for _ in range(rng.randint(2, 5))]))
        queues = []
        for value, names in chains:
            links = [form.format(a=a, b=reference.format(b=b)) for b, a in itertools.pairwise(names)]
            queues.append([form.format(a=names[0], b=value), *links])
        lines = []
        while any(queues):
            lines.append(rng.choice([q for q in queues if q]).pop(0))
        questions = []
        for value, names in rng.sample(chains, min(asked, len(chains))):
            if rng.random() < 0.7:
                text = (
                    f"Question: Which variables hold the value {value}, directly or through other variables?\n"
                    f"Answer: The variables that hold {value} are: "
                )
            else:
                text = f"Variables equal to {value}: "
            pieces = []
            for i, n in enumerate(names):
                pieces += [(n, True), (".\n" if i == len(names) - 1 else ", ", False)]
            questions.append(_question(text, pieces))
        return Group(lines, questions)

    def lines_after(self, rng: random.Random, count: int, asked: int) -> Group:
        """Sentences of random words; the question gives a line and asks for the next, or for its continuation."""
        lines = [" ".join(rng.choice(self.words) for _ in range(rng.randint(4, 8))) for _ in range(max(2, count))]
        questions = []
        for i in rng.sample(range(len(lines)), min(asked, len(lines))):
            words = lines[i].split()
            cut = rng.randint(2, len(words) - 1)
            text = ("Continue the line: ", "The line goes: ")[rng.randrange(2)] + " ".join(words[:cut]) + " "
            questions.append(_question(text, [(" ".join(words[cut:]), True), ("\n", False)]))
        return Group(lines, questions)

    def words_list(self, rng: random.Random, count: int, asked: int) -> Group:
        """A list of words in which a few are common; the answer names them, the most frequent first or by name."""
        if rng.random() < 0.5:
            vocabulary = [self.coined(rng) for _ in range(60)]
            weights = [(i + 1) ** -2.0 for i in range(60)]
            words = rng.choices(vocabulary, weights, k=max(40, count * 8))
            ranked = sorted(dict.fromkeys(vocabulary), key=lambda w: -words.count(w))[:3]
            text = (
                "Question: What are the 3 most frequent words in the list, most frequent first?\n"
                "Answer: The most frequent words are: "
            )
        else:
            n = rng.choice((3, 5, 10))
            common = rng.sample(self.words, n)
            rare = rng.sample(self.words, max(10, count * 2))
            words = common * max(4, count * 8 // (2 * n)) + rare * 2
            rng.shuffle(words)
            ranked = sorted(common, key=lambda w: (-words.count(w), w))
            text = f"Question: What are the {n} most common words in the list?\nAnswer: The most common words are: "
        pieces = []
        for i, w in enumerate(ranked):
            pieces += [(w, True), (".\n" if i == len(ranked) - 1 else ", ", False)]
        return Group([" ".join(words[i : i + 12]) for i in range(0, len(words), 12)], [_question(text, pieces)])

    def draw(self, rng: random.Random, count: int, asked: int) -> Group:
        """A group of a random family, weighted to the needle families."""
        table = (
            self.single,
            self.multi_value,
            self.multi_query,
            self.chain,
            self.lines_after,
            self.words_list,
        )
        make = rng.choices(table, (34, 26, 22, 9, 5, 4))[0]
        return make(rng, count, asked)


def _question(text: str, pieces: list[tuple[str, bool]]) -> tuple[str, Pieces]:
    """Move the blank before an answer into the answer, where the tokenizer keeps it."""
    if text.endswith(" "):
        text = text[:-1]
        pieces = [(" " + pieces[0][0], pieces[0][1]), *pieces[1:]]
    fixed: list[tuple[str, bool]] = []
    for piece, flag in pieces:
        if fixed and fixed[-1][0].endswith(" ") and not fixed[-1][1]:
            fixed[-1] = (fixed[-1][0][:-1], fixed[-1][1])
            piece = " " + piece
        fixed.append((piece, flag))
    return text, tuple(fixed)
