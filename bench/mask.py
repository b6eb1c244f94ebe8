"""``python -m bench.mask``: how long choosing the blocks takes, against PyTorch and the memory floor.

Each length is checked before it is timed: sampled query blocks, chosen again by the PyTorch implementation
as one-block chunks of the same prompt, must keep the same blocks except at score ties within rounding.
The floor is one pass over q, k and v with nothing computed but a sum, measured in the same run.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import stem_flex

from . import check, plots, report

LENGTHS = "4K,8K,16K,32K,64K,128K,256K,512K,1M"


def read_once(tensors: tuple[torch.Tensor, ...]) -> Callable[[], Any]:
    """A call that reads every element once: a Triton sum on CUDA (one launch), torch.sum elsewhere."""
    if tensors[0].device.type != "cuda":
        return lambda: [tensor.sum() for tensor in tensors]
    from .read_kernel import reader

    return reader(tensors)


def check_rows(q, k, v, config, implementation: str, rows: int, tolerance: float) -> dict[str, Any]:
    """Compare sampled block rows of the whole-prompt mask with the PyTorch path's one-block chunks."""
    block = config.query_block
    total = -(-q.shape[2] // block)
    whole = stem_flex.stem_block_mask(q, k, v, config, impl=implementation)
    picks = sorted({total - 1, *(int(total * (i + 0.5) / rows) for i in range(rows))})
    worst = {"equal_counts": True, "differing": 0.0, "largest_gap": 0.0, "ok": True}
    for row in picks:
        start = row * block
        chunk = q[:, :, start : start + block]
        alone = stem_flex.stem_block_mask(chunk, k, v, config, q_offset=start, prompt_len=q.shape[2], impl="torch")
        scores = stem_flex.oam_scores(chunk, k, v, config, q_offset=start, impl="torch")
        found = check.same_selection(_row(whole, row), alone, scores, tolerance)
        worst = {
            "equal_counts": worst["equal_counts"] and found["equal_counts"],
            "differing": max(worst["differing"], found["differing"]),
            "largest_gap": max(worst["largest_gap"], found["largest_gap"]),
            "ok": worst["ok"] and found["ok"],
        }
    return worst


def _row(mask, row: int):
    """Block row ``row`` of ``mask`` as a mask of one block row (tables only)."""
    block = mask.BLOCK_SIZE[0]
    return type(mask).from_kv_blocks(
        *(table[:, :, row : row + 1] for table in (mask.kv_num_blocks, mask.kv_indices)),
        *(table[:, :, row : row + 1] for table in (mask.full_kv_num_blocks, mask.full_kv_indices)),
        BLOCK_SIZE=mask.BLOCK_SIZE,
        seq_lengths=(min(block, mask.seq_lengths[0] - row * block), mask.seq_lengths[1]),
        compute_q_blocks=False,
    )


def split(call: Callable[[], Any], calls: int = 3) -> dict[str, float]:
    """Milliseconds of each CUDA kernel of one ``call``, from the profiler, largest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    parts = {event.key: event.device_time_total / 1e3 / calls for event in trace.key_averages()}
    kept = {name[:60]: round(ms, 5) for name, ms in parts.items() if ms > 0}
    return dict(sorted(kept.items(), key=lambda item: -item[1]))


def host_time(call: Callable[[], Any], device: torch.device, calls: int = 20) -> float:
    """Median milliseconds that the host spends in one call with an idle device (launch overhead)."""
    samples = []
    for _ in range(calls):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1e3)
    return report.summarize(samples).median


def one_length(length: int, options: argparse.Namespace, config) -> dict[str, Any]:
    """Every figure of one prompt length."""
    device = torch.device(options.device)
    q, k, v = report.inputs(
        length,
        options.heads,
        options.kv_heads,
        options.dim,
        report.DTYPES[options.dtype],
        device,
        bshd=options.bshd,
    )
    cuda = device.type == "cuda"
    timed = functools.partial(report.measure, device=device, repeats=options.repeats, seconds=options.seconds)
    row: dict[str, Any] = {"tokens": length}

    def build(implementation: str) -> Callable[[], Any]:
        return lambda: stem_flex.stem_block_mask(q, k, v, config, impl=implementation)

    main = build("triton" if cuda else "torch")

    def floor() -> dict[str, Any]:
        call = read_once((q, k, v))
        call()
        call = report.graphed(call) if cuda else call
        timing = timed(call)
        gigabytes = sum(x.numel() * x.element_size() for x in (q, k, v)) / 1e9
        return {
            "ms": timing,
            "gb": round(gigabytes, 4),
            "gb_per_s": round(gigabytes / timing.median * 1e3, 1),
        }

    def stem() -> dict[str, Any]:
        mask = main()
        density = stem_flex.block_density(mask)
        del mask
        peak = report.peak_extra_bytes(main, device)
        cell = {"ms": timed(main), "host_ms": host_time(main, device), "density": round(density, 5)}
        return cell | {"peak_mib": None if peak is None else round(peak / report.MIB, 2)}

    def reference() -> dict[str, Any]:
        peak = report.peak_extra_bytes(build("torch"), device)
        cell: dict[str, Any] = {"ms": timed(build("torch"))}
        return cell | {"peak_mib": None if peak is None else round(peak / report.MIB, 2)}

    row["check"] = report.attempt(
        lambda: check_rows(q, k, v, config, "triton" if cuda else "torch", options.check_rows, options.tolerance)
    )
    row["floor"] = report.attempt(floor)
    row["stem"] = report.attempt(stem)
    if cuda:
        row["graph"] = report.attempt(lambda: {"ms": timed(report.graphed(main))})
        row["kernels"] = report.attempt(lambda: split(main))
    if cuda and length <= options.torch_up_to:
        row["torch"] = report.attempt(reference)
    return row


def _ms(cell: dict[str, Any] | None) -> str:
    if not cell:
        return ""
    return "error" if "error" in cell else f"{cell['ms'].median:.3f}"


def _cells(row: dict[str, Any]) -> list[str]:
    stem, floor = row["stem"], row["floor"]
    best = row["graph"] if "ms" in row.get("graph", {}) else stem
    ratio = f"{best['ms'].median / floor['ms'].median:.2f}x" if "ms" in best and "ms" in floor else ""
    verdict = row["check"]
    shown = "error" if "error" in verdict else ("ok" if verdict["ok"] else "WRONG")
    return [
        report.short(row["tokens"]),
        _ms(floor),
        _ms(stem),
        _ms(row.get("graph")),
        ratio,
        f"{stem['host_ms']:.3f}" if "host_ms" in stem else "",
        f"{stem['peak_mib']:.0f}" if stem.get("peak_mib") is not None else "",
        _ms(row.get("torch")),
        f"{row['torch']['peak_mib']:.0f}" if row.get("torch", {}).get("peak_mib") is not None else "",
        f"{stem['density']:.3f}" if "density" in stem else "",
        shown if "error" in verdict else f"{shown} ({verdict['differing']:.1%})",
    ]


def present(rows: list[dict[str, Any]], options: argparse.Namespace, header: dict[str, Any]) -> None:
    """Print the table, write JSON, CSV and the picture."""
    columns = [
        "tokens",
        "read q,k,v ms",
        "eager ms",
        "graph ms",
        "over floor",
        "host ms",
        "peak MiB",
        "PyTorch ms",
        "PyTorch MiB",
        "density",
        "check (differing)",
    ]
    notes = [
        f"{report.short(row['tokens'])} {name}: {cell['error']}"
        for row in rows
        for name, cell in row.items()
        if isinstance(cell, dict) and "error" in cell
    ]
    machine = header["environment"]["gpu"] or "CPU"
    title = f"Building the Stem mask, {machine}, {options.heads}/{options.kv_heads} heads of {options.dim}"
    report.show(f"{title}, {options.dtype} (medians)", columns, [_cells(row) for row in rows], notes)
    last = next((row for row in reversed(rows) if row.get("kernels") and "error" not in row["kernels"]), None)
    if last:
        parts = list(last["kernels"].items())[:8]
        report.show(
            f"Kernels at {report.short(last['tokens'])}",
            ["kernel", "ms"],
            [[n, f"{t:.4f}"] for n, t in parts],
        )
    path = report.write(options.out, "mask", rows, **header)
    picture = picture_of(rows, options.out / "mask.png", title)
    print(f"wrote {path}" + (f" and {picture}" if picture else ""))


def picture_of(rows: list[dict[str, Any]], path: Path, title: str) -> Path | None:
    """Times and memory by length."""

    def series(cell: str, key: str = "ms") -> list[tuple[int, float]]:
        found = [(row["tokens"], row[cell][key]) for row in rows if row.get(cell, {}).get(key) is not None]
        return [(n, x.median if isinstance(x, report.Timing) else x) for n, x in found]

    lines = {
        "read q, k, v once": series("floor"),
        "Stem, eager": series("stem"),
        "Stem, CUDA graph": series("graph"),
        "PyTorch": series("torch"),
    }
    memory = {"Stem, eager": series("stem", "peak_mib"), "PyTorch": series("torch", "peak_mib")}
    return plots.panels(
        path,
        title,
        [
            {
                "title": "time to build the mask",
                "ylabel": "ms",
                "log": True,
                "dashed": ("read q, k, v once",),
                "series": {name: points for name, points in lines.items() if points},
            },
            {
                "title": "peak extra memory, tables included",
                "ylabel": "MiB",
                "log": True,
                "series": {name: points for name, points in memory.items() if points},
            },
        ],
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.mask", description=(__doc__ or "").split("\n\n")[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--lengths", default=LENGTHS if cuda else "512,2K", type=report.parse_lengths)
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--dtype", default="bf16" if cuda else "fp32", choices=sorted(report.DTYPES))
    parser.add_argument("--bshd", action="store_true", help="q, k, v as views of (B, N, H, D) memory")
    parser.add_argument("--config", default="operator", choices=("operator", "paper", "default", "mass"))
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=0.5, help="most time for one cell's timed calls")
    parser.add_argument("--torch-up-to", type=int, default=131072, help="longest prompt for the PyTorch path")
    parser.add_argument("--check-rows", type=int, default=4, help="block rows checked before timing")
    parser.add_argument("--tolerance", type=float, default=2e-2, help="score gap allowed between swapped blocks")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    parser.add_argument("--report", action="store_true", help="measure nothing, draw from mask.json")
    return parser.parse_args(arguments)


def choose_config(name: str) -> stem_flex.StemConfig:
    """``operator``, ``paper``, ``mass``, ``coarse`` (a mass with a coarse sketch) or ``default`` as a StemConfig."""
    if name == "coarse":
        return stem_flex.StemConfig.mass(sketch=(8, 8, 4, 8), coarse=(4, 1))
    return stem_flex.StemConfig() if name == "default" else getattr(stem_flex.StemConfig, name)()


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Run, print, write; returns the rows."""
    options = parse(arguments)
    if options.report:
        header, rows = report.read(options.out / "mask.json")
        present(rows, argparse.Namespace(**header["options"] | {"out": options.out}), header)
        return rows
    config = choose_config(options.config)
    header = {"environment": report.environment(), "options": vars(options)}
    rows = []
    for length in options.lengths:
        start = time.perf_counter()
        rows.append(
            {"tokens": length, "stem": {}, "floor": {}, "check": {}}
            | report.attempt(functools.partial(one_length, length, options, config))
        )
        print(f"{report.short(length)}: {time.perf_counter() - start:.1f} s", flush=True)
    present(rows, options, header)
    return rows


if __name__ == "__main__":
    main()
