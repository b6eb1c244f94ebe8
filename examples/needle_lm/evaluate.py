"""Dense accuracy of the model in training: teacher-forced greedy exact match on the families of `bench.tasks`."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from model import NeedleLM, rms_norm
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench import families, tasks

Row = tuple[np.ndarray, int, np.ndarray]


def _build(family: str, lengths: list[int], samples: int, tokenizer: Tokenizer, text: np.ndarray, folder: Path) -> None:
    """Write the examples of one family; a length that does not fit the family is left out."""
    os.nice(10)
    breaks = tasks.break_table(tokenizer.decode, tokenizer.get_vocab_size())
    count = min(samples, 8) if family in ("common_words", "frequent_words") else samples
    for length in lengths:
        rows: list[Row] = []
        for seed in range(10_000, 10_000 + count):
            try:
                e = tasks.assemble(family, seed, length, lambda s: tokenizer.encode(s, add_special_tokens=False).ids,
                                   text, breaks, frame=tasks.Frame((0,)))  # fmt: skip
            except ValueError:
                traceback.print_exc()
                break
            rows.append((e.ids.astype(np.int32), e.answer_start, e.scored))
        if rows:
            arrays: dict[str, Any] = {"ids": np.stack([r[0] for r in rows])}
            arrays["start"] = np.array([r[1] for r in rows])
            arrays |= {f"scored{i}": r[2] for i, r in enumerate(rows)}
            temporary = folder / f"writing-{family}-{length}.npz"
            np.savez(temporary, **arrays)
            temporary.rename(folder / f"{family}-{length}.npz")


def start_building(lengths: list[int], samples: int, tokenizer: Tokenizer, text: np.ndarray, folder: Path) -> list:
    """Build the examples in one background process per family; returns the processes."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.npz"):
        old.unlink()
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_build, args=(family, lengths, samples, tokenizer, text, folder), daemon=True)
        for family in families.FAMILIES
    ]
    for process in processes:
        process.start()
    return processes


@torch.no_grad()
def _exact(model: NeedleLM, ids: torch.Tensor, rows: list[Row], dtype: torch.dtype) -> list[tuple[bool, bool]]:
    """Per row: every scored answer token is the argmax; every answer token is."""
    hidden = model.hidden(ids, dtype)
    out = []
    for i, (_, start, scored) in enumerate(rows):
        x = rms_norm(hidden[i, start - 1 : -1], model.model.norm.weight, model.config.rms_norm_eps)
        guess = F.linear(x, model.model.embed_tokens.weight.to(dtype)).argmax(-1)
        right = (guess == ids[i, start:]).cpu().numpy()
        out.append((bool(right[scored].all()), bool(right.all())))
    return out


def evaluate(
    model: NeedleLM, lengths: list[int], folder: Path, processes: list, device: torch.device, deadline: float,
    tokens_at_once: int = 131072,
) -> dict[str, dict[str, dict[str, float]]]:  # fmt: skip
    """Scores by family and length: 'exact' (scored tokens), 'whole' (all answer tokens), 'n'. Ends by `deadline`."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layer, model.layer = model.layer, getattr(model, "eager_layer", model.layer)
    for process in processes:
        process.join(timeout=max(0.1, min(15.0, deadline - time.monotonic() - 15)))
    result: dict[str, dict[str, dict[str, float]]] = {}
    for length in lengths:
        for family in families.FAMILIES:
            path = folder / f"{family}-{length}.npz"
            if not path.exists() or time.monotonic() > deadline:
                continue
            data = np.load(path)
            rows = [
                (ids, int(s), data[f"scored{i}"])
                for i, (ids, s) in enumerate(zip(data["ids"], data["start"], strict=True))
            ]
            hits: list[tuple[bool, bool]] = []
            step = max(1, tokens_at_once // length)
            for first in range(0, len(rows), step):
                part = rows[first : first + step]
                ids = torch.from_numpy(np.stack([r[0] for r in part]).astype(np.int64)).to(device)
                hits += _exact(model, ids, part, dtype)
            result.setdefault(family, {})[str(length)] = {
                "exact": float(np.mean([h[0] for h in hits])),
                "whole": float(np.mean([h[1] for h in hits])),
                "n": len(hits),
            }
    model.layer = layer
    return result


@torch.no_grad()
def text_loss(model: NeedleLM, text: np.ndarray, length: int, count: int, device: torch.device) -> float:
    """Mean next-token loss (nats) on held-out windows."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layer, model.layer = model.layer, getattr(model, "eager_layer", model.layer)
    total = 0.0
    for window in tasks.text_windows(text, length, count, seed=1):
        ids = torch.from_numpy(window)[None].to(device)
        x = rms_norm(model.hidden(ids, dtype)[0], model.model.norm.weight, model.config.rms_norm_eps)
        logits = F.linear(x, model.model.embed_tokens.weight.to(dtype))[:-1].float()
        total += F.cross_entropy(logits, ids[0, 1:]).item()
    model.layer = layer
    return total / count
