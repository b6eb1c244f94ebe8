"""A few processes, started once, that run checks together and say what each of them found."""

from __future__ import annotations

import json
import multiprocessing
import os
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

MOST_SECONDS = 240


def agreed(world: int, checks: str, folder: Path, cuda: bool = False) -> list[str]:
    """Run every function ``check_*(rank, world)`` of the module ``checks`` on ``world`` ranks of a gloo group.

    With ``cuda`` each has a card of its own, and NCCL without NVLink multicast.

    The environment of a rank tells it ``RANKS_FOLDER``, the folder, among what torchrun sets.

    Returns:
        The checks, none of which failed on any rank.
    """
    found = _start(world, checks, folder, cuda)
    failed = {name: texts for name, texts in found.items() if any(texts)}
    lines = [f"{name}, rank {rank}: {x}" for name, texts in failed.items() for rank, x in enumerate(texts) if x]
    assert not failed, "\n".join([f"{len(failed)} of {len(found)} checks failed", *lines])
    return list(found)


def _start(world: int, checks: str, folder: Path, cuda: bool) -> dict[str, list[str | None]]:
    """For each check what failed on each rank, None where nothing did."""
    if cuda:
        context = multiprocessing.get_context("spawn")  # who asks for cards may not fork
    else:
        context = multiprocessing.get_context("forkserver")  # torch is imported once, by a process without threads
        context.set_forkserver_preload([__name__, checks, "torch._inductor.compile_fx"])
    processes = [context.Process(target=_rank, args=(rank, world, checks, str(folder), cuda)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(MOST_SECONDS)
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
    found = [_read(folder / f"{rank}.json") for rank in range(world)]
    names = list(dict.fromkeys(name for rank in found for name in rank))
    return {name: [rank.get(name, "it never ended") for rank in found] for name in names}


def _read(path: Path) -> dict[str, str | None]:
    return json.loads(path.read_text()) if path.exists() else {}


def _rank(rank: int, world: int, checks: str, folder: str, cuda: bool) -> None:
    import importlib

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "RANKS_FOLDER": folder}
    store = dist.FileStore(f"{folder}/store", world)
    options = {"store": store, "rank": rank, "world_size": world, "timeout": timedelta(seconds=MOST_SECONDS)}
    if cuda:
        os.environ["NCCL_NVLS_ENABLE"] = "0"
        torch.cuda.set_device(rank)
        options["device_id"] = torch.device("cuda", rank)
    dist.init_process_group("nccl" if cuda else "gloo", **options)
    module = importlib.import_module(checks)
    found: dict[str, str | None] = {}
    for name in [name for name in vars(module) if name.startswith("check_")]:
        found[name] = "it never ended"
        Path(folder, f"{rank}.json").write_text(json.dumps(found))
        torch.manual_seed(0)
        try:
            getattr(module, name)(rank, world)
            found[name] = None
        except BaseException:
            found[name] = traceback.format_exc(limit=-6)
        Path(folder, f"{rank}.json").write_text(json.dumps(found))
        dist.barrier()
    dist.destroy_process_group()
