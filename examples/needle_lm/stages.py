"""Stages of growing length: how long each takes, at which learning rate, and the loop that trains one."""

from __future__ import annotations

import math
import time
import traceback
from dataclasses import dataclass

import numpy as np
import torch
from data import Batches
from trainer import Trainer


@dataclass(frozen=True)
class Stage:
    """Sequences of `length` tokens for `share` of the training time, from learning rate `lr` down."""

    length: int
    share: float
    lr: float
    final: float = 0.4  # learning rate at the stage's end, as a share of `lr`
    longer: float = 0.0  # up to this share more of the stage's time while under 60 % of value tokens are right


FIRST_ROUND = (
    Stage(512, 0.28, 3e-3, longer=0.7),
    Stage(2048, 0.19, 2.5e-3),
    Stage(8192, 0.17, 2e-3),
    Stage(16384, 0.14, 1.5e-3),
    Stage(32768, 0.22, 1.2e-3, 0.03),
)
SECOND_ROUND = (
    Stage(1024, 0.2, 2e-3),
    Stage(4096, 0.2, 2e-3),
    Stage(16384, 0.25, 1.5e-3),
    Stage(32768, 0.35, 1.2e-3, 0.03),
)
TINY = (Stage(256, 0.5, 3e-3), Stage(512, 0.5, 1e-3, 0.1))


def first_step(trainer: Trainer, batch: tuple[np.ndarray, np.ndarray], lr: float) -> torch.Tensor:
    """A step that survives a failing kernel, compiler or allocation by the trainer's fallbacks."""
    while True:
        try:
            report = trainer.step(*batch, lr)
            report.tolist()
            return report
        except Exception:
            trainer.log("step failed:\n" + traceback.format_exc()[-3000:])
            if not trainer.fall_back():
                raise


def run_stage(
    trainer: Trainer,
    batches: Batches,
    index: int,
    stage: Stage,
    end: float,
    max_steps: int,
    stopping: list[bool],
) -> None:
    """Train `stage` until the clock says `end`."""
    batches.begin(index)
    log, cuda = trainer.log, trainer.device.type == "cuda"
    warmup = 40 if trainer.updates == 0 else 10
    begin = time.monotonic()
    report = first_step(trainer, batches.next(index), stage.lr / warmup)
    first = time.monotonic()
    log(f"length {stage.length}: first step {first - begin:.1f} s, {end - first:.0f} s to train")
    waited, steps, events, kept, accuracy = 0.0, 1, [], [report], 0.0
    last = end + stage.longer * (end - first)
    while steps < max_steps and not stopping and time.monotonic() < (end if accuracy > 0.6 else last):
        t = time.monotonic()
        batch = batches.next(index)
        waited += time.monotonic() - t
        progress = min(1.0, (time.monotonic() - first) / max(end - first, 1e-3))
        if max_steps < 10**6:
            progress = max(progress, steps / max_steps)
        lr = stage.lr * (stage.final + (1 - stage.final) * 0.5 * (1 + math.cos(math.pi * progress)))
        report = trainer.step(*batch, lr * min(1.0, (steps + 1) / warmup))
        steps += 1
        kept.append(report)
        if cuda:  # stay one step ahead of the GPU, no more: the clock must mean something
            events.append(torch.cuda.Event())
            events[-1].record()
            if len(events) > 1:
                events.pop(0).synchronize()
        if steps % 20 == 0:
            lm, answer, accuracy, norm = torch.stack(kept[-20:]).mean(0).tolist()
            speed = (steps - 1) * batch[0].size / (time.monotonic() - first)
            log(
                f"length {stage.length} step {steps} (all {trainer.updates}): text {lm:.3f} answer {answer:.3f} "
                f"value tokens right {accuracy:.3f} norm {norm:.2f} lr {lr:.1e} {speed / 1e3:.0f} ktok/s "
                f"wait {waited:.1f} s"
            )
            kept = kept[-1:]
    report.tolist()
    log(f"length {stage.length}: {steps} steps in {time.monotonic() - begin:.1f} s")
