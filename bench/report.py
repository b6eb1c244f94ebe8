"""What every benchmark shares: where it ran, medians from CUDA events, tables, JSON and CSV."""

from __future__ import annotations

import csv
import datetime
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

MIB = 1024**2
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median, 10 % and 90 % quantiles, and how many calls they come from."""

    median: float
    low: float
    high: float
    calls: int


def environment() -> dict[str, Any]:
    """Machine, versions, commit and command of this run, ready for JSON."""
    info: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": "python -m " + " ".join([_module_name(), *sys.argv[1:]]),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "changed_files": len((_git("status", "--porcelain", "--untracked-files=no") or "").splitlines()),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    for name in ("torch", "triton", "flash-attn-4", "stem-flex"):
        info[name] = _version(name)
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(torch.cuda.current_device())
        info |= {
            "gpu": card.name,
            "gpu_memory_gib": round(card.total_memory / 1024**3, 1),
            "multiprocessors": card.multi_processor_count,
            "capability": f"{card.major}.{card.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    else:
        info["gpu"] = None
    return info


def _module_name() -> str:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return spec.name if spec else Path(sys.argv[0]).stem


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        module = sys.modules.get(name.replace("-", "_"))
        return getattr(module, "__version__", None)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def timed(call: Callable[[], Any], device: torch.device, calls: int) -> list[float]:
    """Milliseconds of each of ``calls`` calls: CUDA events around each, or the host's clock on a CPU.

    On CUDA the calls are queued without a synchronisation between them, so a call whose launches take the
    host longer than the device takes shows the host's time.
    """
    if device.type != "cuda":
        marks = []
        for _ in range(calls):
            start = time.perf_counter()
            call()
            marks.append((time.perf_counter() - start) * 1e3)
        return marks
    pairs = [(_event(), _event()) for _ in range(calls)]
    for start, end in pairs:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in pairs]


def bootstrap(values: Sequence[float], resamples: int = 2000) -> list[float]:
    """The 95 % percentile bootstrap interval of the mean of ``values``, seeded."""
    import numpy as np

    drawn = np.random.default_rng(0).choice(np.asarray(values), (resamples, len(values)))
    return np.quantile(drawn.mean(1), (0.025, 0.975)).tolist()


def share(cell: dict[str, Any]) -> str:
    """A share of prompts with its interval."""
    return f"{cell['share']:.2f} [{cell['low']:.2f}, {cell['high']:.2f}]"


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def summarize(samples: Sequence[float]) -> Timing:
    """Median and outer deciles of milliseconds."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Timing(
        median=statistics.median(ordered),
        low=ordered[round(0.1 * last)],
        high=ordered[round(0.9 * last)],
        calls=len(ordered),
    )


def measure(
    call: Callable[[], Any], device: torch.device, *, repeats: int, seconds: float, warm: bool = False
) -> Timing:
    """Median time of ``call``: up to ``repeats`` calls, fewer where ``seconds`` would not hold them.

    The first call is a warm-up and does not count, unless ``warm`` says that the call has run before and it
    takes more than ``seconds``: then it is the one sample. Otherwise at least three calls count.
    """
    (first,) = timed(call, device, 1)
    if warm and first > seconds * 1e3:
        return summarize([first])
    (second,) = timed(call, device, 1)
    if second > seconds * 1e3:
        return summarize([second])
    calls = max(3, min(repeats, int(seconds * 1e3 / max(second, 1e-3))))
    return summarize(timed(call, device, calls))


def graphed(call: Callable[[], Any]) -> Callable[[], None]:
    """Capture ``call`` in a CUDA graph and return its replay (which keeps the graph and its memory alive)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay(kept: Any = kept) -> None:
        graph.replay()

    return replay


def peak_extra_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Most device memory one call held beyond what was held before, its result included; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak


def attempt(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run one cell of a benchmark; an exception becomes ``{"error": text}`` so that the others still run."""
    try:
        return call()
    except Exception as error:  # a failed cell is a result to be shown, whatever it was
        text = " ".join(str(error).split())
        return {"error": f"{type(error).__name__}: {text[:300]}"}
    finally:
        release()


def release() -> None:
    """Give cached memory back, so that one cell's peak does not hide in another's."""
    gc.collect()
    if torch.cuda.is_available():
        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:  # an earlier illegal access: every later cell will say so itself
            print(f"note: {error}", file=sys.stderr)


def inputs(
    length: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device, *, bshd: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Seeded normal q (1, heads, N, dim), k, v (1, kv_heads, N, dim); ``bshd``: views of (1, N, H, D)."""
    generator = torch.Generator(device=device).manual_seed(length)

    def draw(count: int) -> torch.Tensor:
        shape = (1, length, count, dim) if bshd else (1, count, length, dim)
        tensor = torch.empty(shape, device=device, dtype=dtype).normal_(generator=generator)
        return tensor.transpose(1, 2) if bshd else tensor

    return draw(heads), draw(kv_heads), draw(kv_heads)


def parse_lengths(text: str) -> list[int]:
    """``"4K,128k,1M,5000"`` as integers, ascending; K is 1024, M is 1024 squared."""
    units = {"k": 1024, "m": 1024**2}
    lengths = []
    for part in text.split(","):
        part = part.strip().lower()
        scale = units.get(part[-1:], 1)
        digits = part[:-1] if scale > 1 else part
        if not digits.isdigit() or int(digits) == 0:
            raise ValueError(f"lengths must look like 4K,128K,1M or 5000, got {text!r}")
        lengths.append(int(digits) * scale)
    return sorted(set(lengths))


def short(length: int) -> str:
    """131072 as "128K", 1048576 as "1M", 5000 as "5000"."""
    for unit, size in (("M", 1024**2), ("K", 1024)):
        if length >= size and length % size == 0:
            return f"{length // size}{unit}"
    return str(length)


def write(directory: Path, name: str, rows: Sequence[dict[str, Any]], **header: Any) -> Path:
    """Write ``name.json`` (header and rows) and ``name.csv`` (rows, nested keys joined by dots)."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    path.write_text(json.dumps({**header, "rows": list(rows)}, indent=1, default=_plain) + "\n")
    flat = [dict(_flatten(row)) for row in rows]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    with (directory / f"{name}.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(flat)
    return path


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and rows as :func:`write` got them, each timing a :class:`Timing` again."""
    names = {field.name for field in fields(Timing)}
    header = json.loads(path.read_text(), object_hook=lambda x: Timing(**x) if x.keys() == names else x)
    return header, header.pop("rows")


def _plain(value: Any) -> Any:
    return asdict(value) if isinstance(value, Timing) else str(value)


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, Timing):
        value = asdict(value)
    if not isinstance(value, dict):
        return [(prefix, value)]
    return [pair for key, item in value.items() for pair in _flatten(item, f"{prefix}.{key}" if prefix else key)]


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> None:
    """Print one table with rich, or as aligned text where rich is not installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(title)
        widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
        for row in [columns, *rows]:
            print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    else:
        table = Table(header_style="bold")
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console = Console(width=None if sys.stdout.isatty() else 180)
        console.print(f"\n[bold]{title}[/bold]")
        console.print(table)
    for note in notes:
        print(note)
