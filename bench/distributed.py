"""``torchrun --nproc-per-node 2 -m bench.distributed``: Stem on several cards against one of them.

Tensor parallel: the heads spread over the cards, each calls ``stem_attention`` on its own. Context parallel: the rows
spread, by ``stem_flex.distributed.context_prefill``. One card: ``stem_attention`` on everything, on every card at
once, of which the fastest counts. Times are the slowest rank's, host clocks around a synchronised call. A context
parallel length is timed only if its outputs are one card's within rounding; rows whose block lists are not are counted.
"""

from __future__ import annotations

import os

os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # before NCCL starts: no NVLink multicast, which nothing here needs

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.attention.flex_attention import BlockMask

import stem_flex
from stem_flex.distributed import Split, balanced, context_prefill, zigzag
from stem_flex.distributed.agreement import Meeting
from stem_flex.distributed.exchange import exchange, group_of, placed
from stem_flex.plumbing.slices import rows_of

from . import check, report
from .mask import choose_config

REQUIRED = {("tensor", 131072): 1.85, ("context", 524288): 1.8}  # times faster on two cards than on one
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Ranks:
    """This process among the others, and their clock."""

    def __init__(self, options: argparse.Namespace):
        self.device = torch.device("cuda", torch.cuda.current_device()) if options.cuda else torch.device("cpu")
        self.rank, self.world, self.options = dist.get_rank(), dist.get_world_size(), options

    def all(self, value: Any) -> list[Any]:
        """``value`` of every rank."""
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def times(self, call: Callable[[], Any]) -> dict[str, Any]:
        """Milliseconds of ``call`` on all ranks, started together: the slowest's, and the median of each."""
        for _ in range(2):  # the first compiles for this length, the second for any
            call()
        samples: list[list[float]] = []
        while len(samples) < min(3, self.options.repeats) or (
            len(samples) < self.options.repeats and sum(map(max, samples)) < 1e3 * self.options.seconds
        ):
            self.wait()
            dist.barrier()
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            samples.append(self.all((time.perf_counter() - start) * 1e3))
        ranks = [round(statistics.median(own), 3) for own in zip(*samples, strict=True)]
        return {"ms": report.summarize([max(sample) for sample in samples]), "ranks_ms": ranks}


def one_card(ranks: Ranks, tensors: Tensors, config: stem_flex.StemConfig) -> dict[str, Any]:
    """``stem_attention`` on everything, on every card at once."""
    call = functools.partial(stem_flex.stem_attention, *tensors, config, backend=ranks.options.backend)
    cell = ranks.times(call)
    return cell | {"fastest_ms": min(cell["ranks_ms"])}


def tensor_parallel(ranks: Ranks, tensors: Tensors, config: stem_flex.StemConfig) -> dict[str, Any]:
    """Each rank's heads by ``stem_attention``."""
    own = tuple(x.chunk(ranks.world, dim=1)[ranks.rank].contiguous() for x in tensors)
    whole = stem_flex.stem_attention(*tensors, config, backend=ranks.options.backend)
    part = stem_flex.stem_attention(*own, config, backend=ranks.options.backend)
    far = relative(part, whole.chunk(ranks.world, dim=1)[ranks.rank])
    del whole, part
    call = functools.partial(stem_flex.stem_attention, *own, config, backend=ranks.options.backend)
    return {**ranks.times(call), "difference_from_one_card": max(ranks.all(far))}


def context_parallel(ranks: Ranks, tensors: Tensors, config: stem_flex.StemConfig, split: Split) -> dict[str, Any]:
    """Each rank's rows by ``context_prefill``: the whole, the exchange alone, and what the ranks say to each other."""
    own = tuple(split.shard(x, ranks.rank).contiguous() for x in tensors)
    call = functools.partial(context_prefill, *own, config, split=split, backend=ranks.options.backend)
    facts = right(ranks, tensors, own, config, split, call)
    group = group_of(None)

    def travel() -> None:
        exchange([placed(x, split, ranks.rank) for x in own[1:]], split, group)

    def agree() -> None:
        for _ in range(2):
            Meeting.of(group).agree("bench", 60.0, dict, lambda _: {})

    whole, sent, said = ranks.times(call), ranks.times(travel), ranks.times(agree)
    received = sum(x[:, :, :1].numel() * x.element_size() for x in own[1:]) * (split.tokens - split.rows(ranks.rank))
    return {
        **whole,
        "exchange": sent,
        "agreement": said,
        "share_of_communication": round(sent["ms"].median / whole["ms"].median, 4),
        "received_gib": round(received / 2**30, 3),
        "gib_a_second": round(received / 2**30 / sent["ms"].median * 1e3, 1),
        "rows": [split.rows(rank) for rank in range(ranks.world)],
        "ranges": split.ranges,
        **facts,
    }


def right(
    ranks: Ranks, tensors: Tensors, own: Tensors, config: stem_flex.StemConfig, split: Split, call: Callable[[], Any]
) -> dict[str, Any]:
    """Whether the rank's rows are one card's: block lists, outputs, and sampled rows against a float32 gather."""
    _, k, v = tensors
    out = call()
    whole = stem_flex.stem_attention(*tensors, config, backend=ranks.options.backend)
    far = relative(out, split.shard(whole, ranks.rank))
    del whole
    gathered = [placed(x, split, ranks.rank) for x in own[1:]]
    exchange(gathered, split, group_of(None))
    k_all, v_all = (x.movedim(0, 2) for x in gathered)
    mask = stem_flex.stem_block_mask(*tensors, config)
    differing, sampled, done = 0, 0.0, 0
    for start, end in split.ranges[ranks.rank]:
        first, last = start // config.query_block, -(-end // config.query_block)
        rows = slice(done, done + end - start)
        bound = rows_of(mask.structure, first, last)
        part = stem_flex.stem_block_mask(own[0][:, :, rows], k_all, v_all, config, layout=bound)
        differing += differing_rows(part, mask, first, last)
        sampled = max(sampled, check.sampled_error(out[:, :, rows], own[0][:, :, rows], k, v, part, count=8))
        done += end - start
    found = {"rows_with_other_blocks": differing, "difference_from_one_card": far, "sampled_error": sampled}
    worst = [max(values) for values in zip(*ranks.all([*found.values()]), strict=True)]
    everyone = dict(zip(found, worst, strict=True))
    if not max(everyone["difference_from_one_card"], everyone["sampled_error"]) <= ranks.options.tolerance:
        raise AssertionError(f"context parallel is not one card's prefill: {everyone}")
    return everyone


def differing_rows(part: BlockMask, whole: BlockMask, first: int, last: int) -> int:
    """Rows of ``part`` whose block lists are not those of the rows [first, last) of ``whole``."""
    count = 0
    for name in ("kv", "full_kv"):
        counts, indices = (getattr(part, f"{name}_{kind}") for kind in ("num_blocks", "indices"))
        other_counts, other = (getattr(whole, f"{name}_{kind}")[:, :, first:last] for kind in ("num_blocks", "indices"))
        width = int(counts.max())
        column = torch.arange(width, device=counts.device)
        for head in range(counts.shape[1]):  # a head at a time: tables of a million tokens take gigabytes
            listed = column < counts[:, head, :, None]
            same = torch.where(listed, indices[:, head, :, :width] == other[:, head, :, :width], True).all(-1)
            count += int((~(same & (counts[:, head] == other_counts[:, head]))).sum())
    return count


def relative(x: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest difference by largest value, some heads at a time."""
    pairs = [(a - b).abs().max() / b.abs().max() for a, b in zip(x.unbind(1), exact.unbind(1), strict=True)]
    return float(torch.stack(pairs).max())


def failures(ranks: Ranks, config: stem_flex.StemConfig) -> dict[str, Any]:
    """What every rank gets, and how soon, where the last one passes a row too few."""
    tensors = report.inputs(16384, 4, 2, 64, torch.bfloat16, ranks.device, bshd=False)
    split = zigzag(16384, ranks.world, config.query_block)
    own = [split.shard(x, ranks.rank) for x in tensors]
    if ranks.rank == ranks.world - 1:
        own[0] = own[0][:, :, 1:]
    start = time.perf_counter()
    try:
        context_prefill(*own, config, split=split, timeout=60)
        said = "nothing"
    except (ValueError, RuntimeError) as error:
        said = f"{type(error).__name__}: {error}"
    return {"seconds": round(max(ranks.all(time.perf_counter() - start)), 3), "errors": ranks.all(said)}


def row_of(ranks: Ranks, mode: str, length: int, config: stem_flex.StemConfig) -> dict[str, Any]:
    """One length on one card and on all."""
    options = ranks.options
    tensors = report.inputs(
        length, options.heads, options.kv_heads, options.dim, report.DTYPES[options.dtype], ranks.device, bshd=False
    )
    row: dict[str, Any] = {"mode": mode, "tokens": length, "ranks": ranks.world}
    row["one_card"] = one_card(ranks, tensors, config)
    if mode == "tensor":
        row["parallel"] = tensor_parallel(ranks, tensors, config)
    else:
        row["parallel"] = context_parallel(ranks, tensors, config, balanced(length, ranks.world, config))
        if options.plain_zigzag:
            split = zigzag(length, ranks.world, config.query_block)
            row["plain_zigzag"] = context_parallel(ranks, tensors, config, split)
    row["speed_up"] = round(row["one_card"]["fastest_ms"] / row["parallel"]["ms"].median, 3)
    required = REQUIRED.get((mode, length)) if ranks.world == 2 and ranks.device.type == "cuda" else None
    if required is not None:
        row |= {"required": required, "holds": row["speed_up"] >= required}
    return row


def present(rows: list[dict[str, Any]], header: dict[str, Any], out: Path) -> None:
    """Print the table, write JSON and CSV."""
    body = []
    for row in rows:
        name = [row["mode"], report.short(row["tokens"])]
        if "error" in row:
            body.append([*name, row["error"], *[""] * 5])
            continue
        parallel = row["parallel"]
        share = f"{parallel['share_of_communication']:.1%}" if "share_of_communication" in parallel else "-"
        verdict = {None: "-", True: "holds", False: "FAILS"}[row.get("holds")]
        rows_off = str(parallel.get("rows_with_other_blocks", "-"))
        times = [f"{row['one_card']['fastest_ms']:.2f}", f"{parallel['ms'].median:.2f}", f"{row['speed_up']:.2f}x"]
        body.append([*name, *times, share, rows_off, verdict])
    report.show(
        f"Stem on {header['ranks']} cards against one, {header['environment']['gpu'] or 'CPU'}",
        [
            "parallel",
            "tokens",
            "one card, ms",
            "all cards, ms",
            "times faster",
            "communication",
            "other rows",
            "required",
        ],
        body,
    )
    print(f"wrote {report.write(out, 'distributed', rows, **header)}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.distributed", description=(__doc__ or "").split("\n\n")[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--cuda", action=argparse.BooleanOptionalAction, default=cuda, help="cards and NCCL, or gloo")
    parser.add_argument("--tensor", default="128K" if cuda else "512", type=report.parse_lengths)
    parser.add_argument("--context", default="128K,256K,512K,1M" if cuda else "640", type=report.parse_lengths)
    parser.add_argument("--modes", nargs="+", default=["tensor", "context"], choices=("tensor", "context"))
    parser.add_argument("--heads", type=int, default=32 if cuda else 4)
    parser.add_argument("--kv-heads", type=int, default=8 if cuda else 2)
    parser.add_argument("--dim", type=int, default=128 if cuda else 16)
    parser.add_argument("--dtype", default="bf16" if cuda else "fp32", choices=sorted(report.DTYPES))
    parser.add_argument("--config", default="operator", choices=("operator", "paper", "default"))
    parser.add_argument("--backend", default="auto", choices=("auto", "triton", "flash", "cpu"))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=8.0, help="most time for one cell's timed calls")
    parser.add_argument("--tolerance", type=float, default=2e-2, help="relative difference from one card allowed")
    parser.add_argument("--plain-zigzag", action="store_true", help="time the split into equal chunks too")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Run, print, write on rank 0; returns the rows. Takes a process group as it finds it, or starts one."""
    options = parse(arguments)
    started = not dist.is_initialized()
    if started:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if options.cuda else None
        if device is not None:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if options.cuda else "gloo", device_id=device)
    ranks = Ranks(options)
    config = choose_config(options.config)
    rows: list[dict[str, Any]] = []
    environment = report.environment()
    launcher = f"torchrun --nproc-per-node {ranks.world} -m"
    environment["command"] = environment["command"].replace("python -m", launcher, 1)
    header = {"environment": environment, "options": vars(options), "ranks": ranks.world}
    with torch.no_grad():
        for mode in options.modes:
            for length in getattr(options, mode):
                start = time.perf_counter()
                cell = functools.partial(row_of, ranks, mode, length, config)
                row = {"mode": mode, "tokens": length} | report.attempt(cell)
                errors = [f"rank {rank}: {e}" for rank, e in enumerate(ranks.all(row.get("error"))) if e is not None]
                rows.append(row if not errors else {"mode": mode, "tokens": length, "error": "; ".join(errors)})
                if ranks.rank == 0:
                    report.write(options.out, "distributed", rows, **header)  # kept if the run is cut short
                    print(f"{mode} {report.short(length)}: {time.perf_counter() - start:.1f} s", flush=True)
        failed = failures(ranks, config)
    if ranks.rank == 0:
        present(rows, header | {"a_rank_fails": failed}, options.out)
    if started:
        dist.destroy_process_group()
    return rows


if __name__ == "__main__":
    main()
