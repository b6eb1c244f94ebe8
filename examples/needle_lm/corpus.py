"""Real text for training: documentation and source of the running Python installation, split by file path."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import sysconfig
import zlib
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt")
BOS = "<|endoftext|>"
VOCABULARY = 4096
HELD_OUT_PERCENT = 5


def text_files(limit_bytes: int, roots: list[str] | None = None) -> tuple[list[str], list[str]]:
    """Paths to train on and held out: a fixed hash of the path inside site-packages decides.

    Tests, generated tables and this project's own files are left out. Documentation comes first, then source in
    hash order, until `limit_bytes`.
    """
    found: list[tuple[int, int, str, int]] = []
    for root in roots or sorted({sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"], *_extra_roots()}):
        for folder, folders, names in os.walk(root):
            folders[:] = [f for f in folders if f not in {"__pycache__", "tests", "test"} and "stem_flex" not in f]
            for name in names:
                if not name.endswith(SUFFIXES):
                    continue
                path = os.path.join(folder, name)
                try:
                    size = os.path.getsize(path)
                except OSError:
                    continue
                if 1_500 <= size <= 300_000:
                    code = zlib.crc32(os.path.relpath(path, root).encode())
                    found.append((0 if name.endswith((".md", ".rst", ".txt")) else 1, code, path, size))
    found.sort()
    train: list[str] = []
    held: list[str] = []
    total = 0
    for _, code, path, size in found:
        if total >= limit_bytes:
            break
        total += size
        (held if code % 100 < HELD_OUT_PERCENT else train).append(path)
    return train, held


def _extra_roots() -> list[str]:
    """Where torch lies, if not in this interpreter's site-packages, and Debian's dist-packages."""
    spec = importlib.util.find_spec("torch")
    roots = [str(Path(spec.origin).parents[1])] if spec and spec.origin else []
    return [*roots, *(p for p in ("/usr/lib/python3/dist-packages",) if os.path.isdir(p))]


def read_text(path: str) -> str:
    """The file's text, tabs as four spaces, unprintable leftovers replaced."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return text.replace("\r\n", "\n").replace("\t", "    ")


def train_tokenizer(paths: list[str], vocabulary: int = VOCABULARY, sample_bytes: int = 24_000_000) -> Tokenizer:
    """Byte-level BPE with single digits; every text encodes, and a sequence starts with `BOS`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def sample():
        total = 0
        for path in paths:
            text = read_text(path)
            total += len(text)
            yield text
            if total >= sample_bytes:
                return

    tokenizer.train_from_iterator(sample(), trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]
    )
    return tokenizer


_TOKENIZER: Tokenizer | None = None


def _start(path: str) -> None:
    global _TOKENIZER
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _TOKENIZER = Tokenizer.from_file(path)


def _tokenize(paths: list[str]) -> np.ndarray:
    assert _TOKENIZER is not None
    parts = []
    for path in paths:
        text = read_text(path)
        if text.count("�") > 3:
            continue
        parts.append(np.array(_TOKENIZER.encode(text).ids, dtype=np.uint16))
    return np.concatenate(parts) if parts else np.zeros(0, np.uint16)


def tokenize_files(paths: list[str], tokenizer_file: str, processes: int) -> np.ndarray:
    """uint16 tokens of all files, each starting with `BOS`; files are dealt out to `processes` workers."""
    pieces = [paths[i : i + 64] for i in range(0, len(paths), 64)]
    if processes <= 1:
        _start(tokenizer_file)
        return np.concatenate([_tokenize(piece) for piece in pieces] or [np.zeros(0, np.uint16)])
    context = multiprocessing.get_context("fork")  # before any CUDA call: the children only read and tokenise
    with context.Pool(processes, _start, (tokenizer_file,)) as pool:
        return np.concatenate(pool.map(_tokenize, pieces, chunksize=1))
