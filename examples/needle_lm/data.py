"""Training batches: real text with generated statements hidden in it and questions at the end."""

from __future__ import annotations

import multiprocessing
import os
import queue
import random
import re
import traceback
from collections import Counter
from multiprocessing.synchronize import Event
from typing import Any

import numpy as np
from phrases import Phrases
from tokenizers import Tokenizer

VALUE, JOINT = 1, 2  # marks of answer tokens: scored values, and the learned text between them


def common_words(tokens: np.ndarray, tokenizer: Tokenizer, limit: int = 8_000) -> list[str]:
    """Lower-case words that occur twice or more in samples of the corpus, the most common first."""
    counts: Counter[str] = Counter()
    step = max(1, len(tokens) // 60)
    for start in range(0, len(tokens), step):
        counts.update(re.findall(r"\b[a-z]{3,10}\b", tokenizer.decode(tokens[start : start + 30_000].tolist())))
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [word for word, count in ranked if count > 1][:limit]


class Sequences:
    """Builds single sequences; one object per worker."""

    def __init__(self, tokens: np.ndarray, tokenizer: Tokenizer, words: list[str], breaks: np.ndarray) -> None:
        self.tokens = tokens
        self.tokenizer = tokenizer
        self.phrases = Phrases(words)
        self.breaks = breaks

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def build(self, rng: random.Random, length: int) -> tuple[np.ndarray, np.ndarray]:
        """uint16 tokens (length,) and uint8 answer marks (length,)."""
        if length <= 2048 and rng.random() < 0.06:
            return self._repeat(rng, length)
        self.phrases.begin()
        most = min(32, max(4, length // 36))
        total = round(np.exp(rng.uniform(0, np.log(most)))) if rng.random() < 0.4 else rng.randint(most // 2, most)
        asked = min(24, max(10, length // 128))
        groups = []
        while total > 0:
            count = total if rng.random() < 0.5 else rng.randint(1, total)
            total -= count
            groups.append(self.phrases.draw(rng, count, asked if rng.random() < 0.7 else rng.randint(1, asked)))
            asked = max(1, asked - len(groups[-1].questions))
        texts: list[str] = []
        for group in groups:
            texts += ["\n" + line for line in group.lines]
        n_lines = len(texts)
        questions = [q for group in groups for q in group.questions]
        rng.shuffle(questions)
        for text, pieces in questions:
            texts.append("\n\n" + text if rng.random() < 0.7 else "\n" + text)
            texts += [piece for piece, _ in pieces]
        ids = self._encode(texts)
        return self._lay_out(rng, length, groups, ids, n_lines, questions)

    def _repeat(self, rng: random.Random, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Random tokens said twice: the plainest case of looking back, which lets it appear early in training."""
        span = rng.randint(length // 8, (length - 1) // 2)
        draw = np.random.default_rng(rng.getrandbits(64))
        start = rng.randrange(len(self.tokens) - length)
        ids = self.tokens[start : start + length].astype(np.int64)
        ids[0] = 0
        ids[-2 * span :] = np.tile(draw.integers(1, len(self.breaks), span), 2)
        flags = np.zeros(length, np.uint8)
        flags[-span + 1 :] = JOINT
        return ids.astype(np.uint16), flags

    def _lay_out(self, rng, length, groups, ids, n_lines, questions) -> tuple[np.ndarray, np.ndarray]:
        lines_total = sum(map(len, ids[:n_lines]))
        if lines_total > 0.7 * length:  # too many statements for a short sequence: draw again
            return self.build(rng, length)
        tail: list[int] = []
        marks: list[int] = []
        limit = min(length // 2, length - lines_total - 16)
        at = n_lines
        for _, pieces in questions:
            n = 1 + len(pieces)
            parts = ids[at : at + n]
            at += n
            if len(tail) + sum(map(len, parts)) > limit:
                continue
            tail += parts[0]
            marks += [0] * len(parts[0])
            for (_, flag), part in zip(pieces, parts[1:], strict=True):
                tail += part
                marks += [VALUE if flag else JOINT] * len(part)
        if not tail:
            return self.build(rng, length)
        room = length - 1 - len(tail) - lines_total
        start = rng.randrange(max(1, len(self.tokens) - room))
        text = self.tokens[start : start + room].astype(np.int64)
        places = self._places(rng, text, [len(group.lines) for group in groups])
        out = np.empty(length, np.int64)
        out[0] = 0
        fill, last = 1, 0
        for place, i in sorted(places):
            out[fill : fill + place - last] = text[last:place]
            fill += place - last
            out[fill : fill + len(ids[i])] = ids[i]
            fill += len(ids[i])
            last = place
        out[fill : fill + room - last] = text[last:]
        out[length - len(tail) :] = tail
        flags = np.zeros(length, np.uint8)
        flags[length - len(tail) :] = marks
        return out.astype(np.uint16), flags

    def _places(self, rng: random.Random, text: np.ndarray, counts: list[int]) -> list[tuple[int, int]]:
        """(position in text, statement) pairs; a group's statements keep their order, mostly at line breaks."""
        ends = np.flatnonzero(self.breaks[text]) if rng.random() < 0.85 else np.arange(len(text))
        ends = np.append(ends, len(text))
        places = []
        first = 0
        for count in counts:
            if rng.random() < 0.1:  # a contiguous list
                wanted = [rng.randrange(len(text) + 1)] * count
            else:
                wanted = sorted(rng.randrange(len(text) + 1) for _ in range(count))
            wanted = ends[np.searchsorted(ends, wanted)].tolist()
            places += [(place, first + i) for i, place in enumerate(wanted)]
            first += count
        return places


def _work(seed, stage, lengths, tokens_per_step, sequences, queues, stop) -> None:
    """Fill the queue of the current stage until `stop`."""
    os.nice(5)  # the process that feeds the GPU comes first
    for q in queues:
        q.cancel_join_thread()  # batches that nobody reads must not hold up the exit
    rng = random.Random(seed)
    while not stop.is_set():
        current = stage.value
        length = lengths[current]
        try:
            rows = [sequences.build(rng, length) for _ in range(tokens_per_step // length)]
            batch: Any = (length, np.stack([r[0] for r in rows]), np.stack([r[1] for r in rows]))
        except Exception:
            batch = traceback.format_exc()
        while not stop.is_set() and stage.value == current:
            try:
                queues[current].put(batch, timeout=0.2)
                break
            except queue.Full:
                continue


class Batches:
    """Background processes that build batches of the current stage's length. Start before CUDA is initialised."""

    def __init__(self, sequences: Sequences, lengths: list[int], tokens_per_step: int, workers: int, seed: int) -> None:
        context = multiprocessing.get_context("fork")
        self.lengths = lengths
        self._stage = context.Value("i", 0)
        self._stop: Event = context.Event()
        self._queues = [context.Queue(maxsize=12 * workers) for _ in lengths]
        args = (self._stage, lengths, tokens_per_step, sequences, self._queues, self._stop)
        self._workers = [
            context.Process(target=_work, args=(seed * 1000 + i, *args), daemon=True) for i in range(workers)
        ]
        for worker in self._workers:
            worker.start()

    def begin(self, stage: int) -> None:
        """Let the workers build for `stage`."""
        self._stage.value = stage

    def next(self, stage: int, timeout: float = 90.0) -> tuple[np.ndarray, np.ndarray]:
        """uint16 tokens (B, L) and uint8 marks (B, L) of `stage`."""
        batch = self._queues[stage].get(timeout=timeout)
        if isinstance(batch, str):
            raise RuntimeError(f"a data worker failed:\n{batch}")
        return batch[1], batch[2]

    def close(self) -> None:
        """End the workers."""
        self._stop.set()
        for worker in self._workers:
            worker.terminate()
