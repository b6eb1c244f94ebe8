"""What a run leaves behind after every stage, and how the next one goes on from it."""

from __future__ import annotations

import shutil
import tarfile
from argparse import Namespace
from pathlib import Path

import torch
from model import load_weights, save_pretrained
from stages import FIRST_ROUND, SECOND_ROUND, TINY, Stage
from trainer import Trainer


def pack(folder: Path, target: Path) -> None:
    """Copy the weight shards and put the small files into one tar: at most a handful of files of < 16 MB."""
    target.mkdir(parents=True, exist_ok=True)
    with tarfile.open(target / "needle_lm_small_files.tar", "w") as archive:
        for path in sorted(folder.iterdir()):
            if path.suffix == ".safetensors":
                shutil.copyfile(path, target / path.name)
            elif path.suffix in (".json", ".log"):
                archive.add(path, arcname=path.name)


def save(trainer: Trainer, args: Namespace, stages_done: int) -> None:
    """Hugging Face directory, training state, and the packed copy."""
    save_pretrained(trainer.model, args.out, (args.out / "tokenizer.json").read_text(encoding="utf-8"))
    state = {"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()}
    state |= {"stages_done": stages_done, "updates": trainer.updates}
    torch.save(state, args.out / "state.pt.new")
    (args.out / "state.pt.new").replace(args.out / "state.pt")
    if args.pack:
        pack(args.out, args.pack)


def plan(args: Namespace) -> tuple[dict | None, int, tuple[Stage, ...]]:
    """The saved state if resuming, the finished stages, and the stages to run now."""
    first, second = (TINY, TINY) if args.tiny else (FIRST_ROUND, SECOND_ROUND)
    if not args.resume:
        return None, 0, first
    path = args.out / "state.pt"
    state = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
    done = len(first) if state is None else state["stages_done"]
    return state, done, first[done:] or second


def restore(trainer: Trainer, args: Namespace, state: dict | None) -> None:
    """Load a state, or the saved weights where only those are left."""
    if state is None:
        load_weights(trainer.model, args.out)
        trainer.updates = 1
        trainer.log("resume: weights only")
        return
    trainer.model.load_state_dict(state["model"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.updates = state["updates"]
    trainer.log(f"resume: {state['stages_done']} stages and {trainer.updates} updates done")
