"""Questions about documents that ship with Python and its packages, in the manner of LongBench (arXiv 2308.14508).

==============  ==========================================================================  ================
kind            what is read, what is asked                                                  scored by
==============  ==========================================================================  ================
summary         source files of the standard library; what one of them is for (its own       ROUGE-L
                docstring, which is taken out)
completion      a source file up to some line; the next line                                 edit similarity
few_shot        docstrings, each with the package it comes from; the package of one more     exact match
answer          metadata and READMEs of the installed packages; what one of them is          F1
==============  ==========================================================================  ================

Every prompt takes exactly the tokens asked for: documents fill what the question leaves, the last one of them cut.
The packages are those of the running Python, so that `answer` differs between machines.
"""

from __future__ import annotations

import ast
import itertools
import random
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import numpy as np

from bench.tasks import Encode, Frame

PACKAGES = ("asyncio", "email", "multiprocessing", "tkinter", "unittest", "xml")  # the classes of few_shot
SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "__pycache__",
    "pydoc_data",
    "encodings",
}


@dataclass(frozen=True)
class Question:
    """A prompt of exact length, and what its answer is measured against.

    ids: int64 (length,). reference: the true answer. first_line: only the first line of an answer counts.
    """

    kind: str
    ids: np.ndarray
    reference: str
    first_line: bool = False


@dataclass(frozen=True)
class Module:
    """A source file: its dotted name, its docstring's first paragraph, the source without the docstring."""

    name: str
    said: str
    source: str


@cache
def modules() -> tuple[Module, ...]:
    """The standard library's modules of at least 2,000 characters, by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py"), key=lambda p: str(p.relative_to(root))):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED & set(parts) or not 2_000 < path.stat().st_size < 200_000:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        tree = ast.parse(text)
        first = tree.body[0] if tree.body else None
        said = ast.get_docstring(tree) or ""
        if said and isinstance(first, ast.Expr):
            lines = text.splitlines(keepends=True)
            text = "".join(lines[: first.lineno - 1] + lines[first.end_lineno :])
        paragraph = " ".join(said.split("\n\n")[0].split())
        found.append(Module(".".join(p for p in parts if p != "__init__"), paragraph, text.strip()))
    return tuple(found)


@cache
def docstrings() -> tuple[tuple[str, str], ...]:
    """(first paragraph, package) of the docstrings of `PACKAGES`, 40 to 300 characters long, names of packages out."""
    found = []
    for module in modules():
        package = module.name.split(".")[0]
        if package in PACKAGES:
            for node in ast.walk(ast.parse(module.source)):
                if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    said = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                    if 40 <= len(said) <= 300 and package not in said.lower():
                        found.append((said, package))
    return tuple(dict.fromkeys(found))


@cache
def packages() -> tuple[tuple[str, str, str], ...]:
    """(name, summary, document) of the installed packages that say in four words or more what they are."""
    found = {}
    for package in metadata.distributions():
        about = package.metadata
        name, summary = about["Name"], about["Summary"] or ""
        if name and len(summary.split()) >= 4:
            described = re.sub(r"\s*\n\s*", "\n", about.get_payload() or "").strip()  # type: ignore[attr-defined]
            license_ = (about["License-Expression"] or about["License"] or "not said").splitlines()[0][:80]
            head = f"Package: {name}\nVersion: {package.version}\nLicence: {license_}\nSummary: {summary}\n"
            found[name.lower()] = (name, summary, f"{head}{described[:800]}\n\n")
    return tuple(found[key] for key in sorted(found))


def fill(asked: str, others: Iterator[str], encode: Encode, room: int, rng: random.Random) -> list[int]:
    """Exactly ``room`` tokens: the document ``asked``, cut to fit, among ``others``.

    Raises:
        ValueError: all documents together are too short.
    """
    own = encode(asked)[:room]
    pieces, left = [own], room - len(own)
    while left > 0:
        text = next(others, None)
        if text is None:
            raise ValueError(f"the documents must hold {room} tokens, {left} are missing; choose a shorter length")
        piece = encode(text)[:left]
        pieces.append(piece)
        left -= len(piece)
    last = pieces.pop()  # the one that was cut goes first, where its end does not show
    rng.shuffle(pieces)
    return [*last, *itertools.chain.from_iterable(pieces)]


def _shuffled(texts: list[str], rng: random.Random) -> Iterator[str]:
    rng.shuffle(texts)
    return iter(texts)


def summary(rng: random.Random, length: int, encode: Encode, frame: Frame) -> Question:
    """What a module is for."""
    chosen = rng.choice([m for m in modules() if 6 <= len(m.said.split()) <= 60])
    others = [f"# File {m.name}.py\n{m.source}\n\n" for m in modules() if m is not chosen and len(m.source) < 8_000]
    head = [*frame.before, *encode("Read the source of some Python modules.\n\n")]
    tail = frame.tail(f"\n\nQuestion: What is the module {chosen.name} for? Say it in one sentence.\nAnswer: ", encode)
    own = f"# File {chosen.name}.py\n{chosen.source}\n\n"
    body = fill(own, _shuffled(others, rng), encode, length - len(head) - len(tail), rng)
    return Question("summary", np.asarray(head + body + tail), chosen.said)


def completion(rng: random.Random, length: int, encode: Encode, frame: Frame) -> Question:
    """The next line of a source file; no chat, as LongBench does. The prompt ends before the line break."""
    chosen = rng.choice([m for m in modules() if len(m.source) > 6_000])
    lines = chosen.source.splitlines(keepends=True)
    wanted = [i for i, line in enumerate(lines) if i > len(lines) // 2 and 20 <= len(line.strip()) <= 100]
    at = rng.choice([i for i in wanted if not lines[i].lstrip().startswith(("#", '"'))] or wanted)
    head = encode("Please complete the code given below.\n")
    before = encode(f"# File {chosen.name}.py\n" + "".join(lines[:at]).rstrip("\n"))
    room = length - len(head)
    others = [f"# File {m.name}.py\n{m.source}\n\n" for m in modules() if m is not chosen and len(m.source) < 8_000]
    rng.shuffle(others)
    body = before[-room:]
    filler: list[int] = []
    for text in others:
        if len(filler) >= room - len(body):
            break
        filler = encode(text) + filler
    missing = room - len(body)
    body = (filler[-missing:] if missing else []) + body
    return Question("completion", np.asarray(head + body), lines[at].strip(), first_line=True)


def few_shot(rng: random.Random, length: int, encode: Encode, frame: Frame) -> Question:
    """The package of a docstring, after many examples; no chat, as LongBench does."""
    by_package: dict[str, list[str]] = {}
    for said, package in docstrings():
        by_package.setdefault(package, []).append(said)
    names = sorted(by_package)
    wanted = rng.choice(names)
    asked = rng.choice(by_package[wanted])
    head = encode(f"Say which of the packages {', '.join(names)} a text about code comes from. Examples:\n\n")
    tail = encode(f"Text: {asked}\nPackage:")

    def shown() -> Iterator[str]:
        while True:  # short lengths see no text twice, long ones may
            package = rng.choice(names)
            said = rng.choice(by_package[package])
            if said != asked:
                yield f"Text: {said}\nPackage: {package}\n\n"

    examples = shown()
    body = fill(next(examples), examples, encode, length - len(head) - len(tail), rng)
    return Question("few_shot", np.asarray(head + body + tail), wanted, first_line=True)


def answer(rng: random.Random, length: int, encode: Encode, frame: Frame) -> Question:
    """What a package is, by its metadata."""
    name, said, document = rng.choice(packages())
    others = [text for other, _, text in packages() if other != name]
    head = [*frame.before, *encode("Read the descriptions of some Python packages.\n\n")]
    asked = f"Question: What is the summary of the package {name}?\nAnswer: The summary of the package {name} is:"
    tail = frame.tail(f"\n\n{asked}", encode)
    body = fill(document, _shuffled(others, rng), encode, length - len(head) - len(tail), rng)
    return Question("answer", np.asarray(head + body + tail), said, first_line=True)


KINDS: dict[str, Callable[[random.Random, int, Encode, Frame], Question]] = {
    "summary": summary, "completion": completion, "few_shot": few_shot, "answer": answer
}  # fmt: skip
METRICS = {"summary": "ROUGE-L", "completion": "edit similarity", "few_shot": "exact match", "answer": "F1"}


def make_question(kind: str, seed: int, length: int, encode: Encode, frame: Frame) -> Question:
    """Question number ``seed`` of ``kind``, of exactly ``length`` tokens.

    Raises:
        ValueError: unknown kind, or documents too short.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {sorted(KINDS)}, got {kind!r}; choose one of them")
    return KINDS[kind](random.Random(f"{kind}/{seed}/{length}"), length, encode, frame)


def score(question: Question, said: str) -> float:
    """The published metric of the question's kind, 0 to 1, of an answer."""
    lines = said.strip().splitlines()
    text = (lines[0] if lines else "").strip() if question.first_line else said.strip()
    if question.kind == "few_shot":
        return float(text.split()[:1] == [question.reference])
    if question.kind == "completion":
        from rapidfuzz import fuzz

        return fuzz.ratio(text, question.reference) / 100
    from torchmetrics.functional.text import rouge_score, squad

    if question.kind == "summary":
        return float(rouge_score(text, question.reference, rouge_keys="rougeL")["rougeL_fmeasure"])
    true = {"answers": {"answer_start": [0], "text": [question.reference]}, "id": "0"}
    return float(squad([{"prediction_text": text, "id": "0"}], [true])["f1"]) / 100
