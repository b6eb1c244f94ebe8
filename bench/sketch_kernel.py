"""``python -m bench.sketch_kernel``: which tiles the sketch's kernels should take, and what each kernel costs.

Each variant is a whole mask build by a mass budget, after the kernels were compared with the PyTorch path on the same
card: on random q and k, since the time does not depend on what they hold, and with a coarse sketch, where it does, on
those of the shipped model, repeated past 128K tokens. The parts are the kernels of one profiled call:
``keys`` and ``queries`` make proxies, ``plain`` and ``edge`` sum tiles, ``read`` makes scores and counts, ``fine``
looks at what a coarse sketch proposed, ``select`` chooses.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from stem_flex import StemConfig, layout
from stem_flex.budget import Mass
from stem_flex.kernels import launch, sketch_chunks, sketch_fine, sketch_mass, sketch_proxies, sketch_sums
from stem_flex.kernels.sketch_sums import Tile
from stem_flex.selectors import sketch

from . import activations, report

TILES = (
    Tile(128, 64, 128, 4, 8, 3),
    Tile(128, 64, 128, 4, 8, 2),
    Tile(128, 64, 128, 4, 4, 3),
    Tile(128, 64, 128, 4, 4, 2),
    Tile(128, 128, 128, 4, 8, 2),
    Tile(128, 128, 128, 4, 8, 3),
    Tile(256, 64, 128, 4, 8, 2),
    Tile(64, 128, 128, 4, 4, 2),
    Tile(64, 64, 128, 4, 4, 3),
)
SKETCHES = ((16, 8, 4, 8), (8, 8, 4, 8), (0, 8, 0, 16), (0, 16, 0, 16))
PARTS = ("keys", "queries", "plain", "edge", "read", "fine", "select")
COARSE = ((4, 1), (8, 1))
MODEL_TOKENS = 131072  # of the shipped model's activations


def parts(call: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of each part of one call, from the profiler."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    found = dict.fromkeys(PARTS, 0.0)
    events = [event for event in trace.events() if event.device_type == DeviceType.CUDA]
    seen = dict.fromkeys(("_proxies_kernel", "_sums_kernel"), 0)
    for event in sorted(events, key=lambda event: event.time_range.start):
        milliseconds = event.time_range.elapsed_us() / 1e3
        if event.name == "_proxies_kernel":  # the keys' are made first
            found["queries" if seen[event.name] else "keys"] += milliseconds
        elif event.name == "_sums_kernel":  # launched in turns
            found["edge" if seen[event.name] % 2 else "plain"] += milliseconds
        elif event.name in ("_read_kernel", "_fine_kernel", "_select_kernel"):
            found[event.name.strip("_").removesuffix("_kernel")] += milliseconds
        if event.name in seen:
            seen[event.name] += 1
    return {name: round(ms, 4) for name, ms in found.items()}


def forget() -> None:
    """Drop what launches remember, after tuning constants changed."""
    launch._plans.clear()
    for remembered in (
        sketch_proxies._proxies_meta, sketch_sums._sums_meta, sketch_mass._read_meta, sketch_fine._fine_meta,
    ):  # fmt: skip
        remembered.cache_clear()


def builder(q: torch.Tensor, k: torch.Tensor, config: StemConfig) -> Callable[[], Any]:
    """A call that makes the tables of q and k by the config's mass budget."""
    sizes = {"block_size": (config.query_block, config.key_block), "device": q.device}
    bound = layout.causal().bind(q.shape[0], q.shape[1], q.shape[2], k.shape[2], **sizes)
    rule = Mass(config.threshold, config.floor, config.cap)
    return lambda: sketch.tables(q, k, k, bound, config, rule)


def check(device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int, int], length: int) -> dict[str, float]:
    """Largest and 99.9 % quantile of the kernels' distance from the PyTorch path, in scores (0 to 2)."""
    q, k, v = report.inputs(length, 8, 2, 128, dtype, device, bshd=True)
    q = q * 2  # masses that differ
    options = {"layout": layout.sliding_window(length // 2 + 77), "sketch": sizes}
    got = sketch.scores(q, k, v, impl="triton", **options)
    expected = sketch.scores(q, k, v, impl="torch", **options)
    same = torch.equal(got == -torch.inf, expected == -torch.inf)
    off = (got - expected)[expected > -torch.inf].abs().float()
    return {"largest": float(off.max()), "q999": float(off.quantile(0.999)), "same_structure": same}


@functools.lru_cache(maxsize=1)
def model_like(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k of the shipped model, repeated past 128K: what a coarse sketch proposes depends on them."""
    q, k, _ = activations.model_inputs(min(length, MODEL_TOKENS), torch.device("cuda"))
    times = -(-length // MODEL_TOKENS)
    return tuple(x.repeat(1, 1, times, 1)[:, :, :length] for x in (q, k))  # type: ignore[return-value]


def cell(length: int, sizes: tuple[int, ...], coarse: tuple[int, int] | None, options: Any) -> dict[str, Any]:
    """One length and sketch with the tuning constants as they are."""
    device = torch.device("cuda")
    if coarse is None:
        q, k, _ = report.inputs(length, 32, 8, 128, torch.bfloat16, device, bshd=options.bshd)
    else:
        q, k = model_like(length)
    config = replace(StemConfig.mass(), sketch=sizes, coarse=coarse)
    build = builder(q, k, config)
    build()
    timing = report.measure(build, device, repeats=options.repeats, seconds=options.seconds)
    peak = report.peak_extra_bytes(build, device)
    return {"ms": round(timing.median, 4), **parts(build), "peak_mib": round((peak or 0) / report.MIB, 1)}


def run(
    name: str, length: int, sizes: tuple[int, ...], options: argparse.Namespace, coarse: tuple[int, int] | None = None
) -> dict[str, Any]:
    """One line of the table, printed as soon as it is there."""
    forget()
    found = report.attempt(lambda: cell(length, sizes, coarse, options))
    row = {"variant": name, "tokens": length, "sketch": list(sizes), "coarse": coarse, **found}
    shown = found.get("error") or "  ".join(f"{key} {found[key]}" for key in ("ms", *PARTS, "peak_mib"))
    print(f"{name:34s} {report.short(length):>5s} {sizes!s:15s} {coarse!s:7s} {shown}", flush=True)
    return row


def main(arguments: list[str] | None = None) -> None:
    """Check, tune, time; print a table and write ``sketch_kernel.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="32K,128K,512K", type=report.parse_lengths)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--bshd", action="store_true", help="q and k as projections leave them")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    options = parser.parse_args(arguments)
    lengths = options.lengths
    device = torch.device("cuda")
    found: dict[str, Any] = {"environment": report.environment(), "checks": [], "rows": []}
    for dtype, length in ((torch.bfloat16, 16384), (torch.float16, 5000), (torch.float32, 5000)):
        for sizes in SKETCHES[:1] + SKETCHES[-1:]:
            measured = report.attempt(lambda d=dtype, s=sizes, n=length: check(device, d, s, n))
            found["checks"].append({"dtype": str(dtype), "tokens": length, "sketch": list(sizes), **measured})
            print("check", found["checks"][-1], flush=True)

    def save() -> None:
        (options.out / "sketch_kernel.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    save()
    rows = found["rows"]
    middle = lengths[len(lengths) // 2]
    for tile in TILES:
        sketch_sums.HALF_TILE = tile
        rows.append({"tile": list(tile), **run(f"tile {tuple(tile)}", middle, SKETCHES[0], options)})
    save()
    timed = [row for row in rows if "ms" in row]
    best = Tile(*min(timed, key=lambda row: row["ms"])["tile"]) if timed else TILES[0]
    sketch_sums.HALF_TILE = best
    for span in (1, 2, 8):
        sketch_sums.HALF_TILE = best._replace(span=span)
        rows.append(run(f"best tile, span {span}", middle, SKETCHES[0], options))
    sketch_sums.HALF_TILE = best
    workspace = sketch_chunks.WORKSPACE_BYTES
    for module, name, values in (
        (sketch_proxies, "BYTES_PER_THREAD", (128, 512)),
        (sketch_mass, "KEY_BLOCKS_PER_WARP", (16, 32)),
        (sketch_chunks, "ROWS", (16, 32, 128, 192)),
    ):
        default = getattr(module, name)
        if name == "ROWS":
            sketch_chunks.WORKSPACE_BYTES = 1
        for value in values:
            setattr(module, name, value)
            rows.append(run(f"{name} {value}", middle, SKETCHES[0], options))
        setattr(module, name, default)
    sketch_chunks.WORKSPACE_BYTES = workspace
    save()
    for name, values in (("TILE", (16, 64)), ("SCAN", (256, 1024)), ("WARPS", (2, 8)), ("STAGES", (2, 4))):
        default = getattr(sketch_fine, name)
        for value in values:
            setattr(sketch_fine, name, value)
            rows.append(run(f"fine {name} {value}", middle, SKETCHES[0], options, COARSE[0]))
        setattr(sketch_fine, name, default)
    save()
    for length in lengths:
        for sizes in SKETCHES:
            rows.append(run("best tile", length, sizes, options))
        for sizes in SKETCHES[:2]:
            for coarse in COARSE:
                rows.append(run("best tile", length, sizes, options, coarse))
        save()


if __name__ == "__main__":
    main()
