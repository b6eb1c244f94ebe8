"""``python -m bench.prefill``: a Stem prefill, mask building included, against the dense kernels.

Every cell is checked on sampled rows against an explicit float32 gather before it is timed; one that fails
is reported and not timed. A cell that would take longer than ``--cell-seconds`` a call, going by the length
before it, is left blank: nothing is extrapolated. ``--report`` measures nothing and draws again.
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
from stem_flex.attention import sparse_prefill

from . import activations, check, dense, plots, report
from .mask import choose_config
from .result_tables import BUDGETS

DENSE = ("fa2", "cudnn", "flex", "fa4", "sdpa")
LENGTHS = "4K,8K,16K,32K,64K,128K,256K,512K,1M"
NAMES = {
    "fa2": "SDPA FlashAttention-2",
    "cudnn": "SDPA cuDNN",
    "flex": "flex, dense",
    "fa4": "flash-attn-4",
    "sdpa": "SDPA",
    "stem_triton": "Stem TRITON",
    "stem_flash": "Stem FLASH",
    "stem_auto": "Stem auto",
    "stem_cpu": "Stem CPU",
}


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a square matrix product in this run: what the card's matrix units give in practice."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    timing = report.measure(lambda: a @ b, device, repeats=10, seconds=0.2)
    return 2 * size**3 / timing.median / 1e9


class Length:
    """The cells of one prompt length."""

    def __init__(self, length: int, options: argparse.Namespace, config, before: dict[str, Any] | None):
        self.length, self.options, self.config = length, options, config
        self.device = torch.device(options.device)
        self.before = before or {}
        dtype = report.DTYPES[options.dtype]
        if options.inputs == "model":
            self.tensors = activations.model_inputs(length, self.device, dim=options.dim, dtype=dtype)
        else:
            sizes = (options.heads, options.kv_heads, options.dim)
            self.tensors = report.inputs(length, *sizes, dtype, self.device, bshd=options.bshd)

    def blank(self, name: str, limit: int | None = None) -> str | None:
        """Why this cell is left out, or None."""
        if limit is not None and self.length > limit:
            return f"not run above {report.short(limit)}"
        last = self.before.get(name, {})
        if "error" in last and "out of memory" in last["error"].lower():
            return "not run: out of memory at the length before"
        if "skipped" in last:
            return "not run: left out at the length before"
        expected = self.expected(name)
        if expected is not None and expected > self.options.cell_seconds:
            return f"not run: about {expected:.0f} s a call"
        return None

    def checked(self, name: str, call: Callable[[], torch.Tensor], mask) -> dict[str, Any]:
        """Run ``call`` once, compare sampled rows, time it if they agree.

        A call that is expected to take longer than ``--seconds`` runs only this once, timed.
        """
        kept: list[torch.Tensor] = []
        first = report.timed(lambda: kept.append(call()), self.device, 1)
        error = check.sampled_error(kept.pop(), *self.tensors, mask, count=self.options.check_rows)
        if not error <= self.options.tolerance:
            return {"sampled_error": error, "error": f"wrong: relative error {error:.2e} on sampled rows"}
        expected = self.expected(name) or 0.0
        if expected > self.options.seconds and first[0] < 1.5e3 * expected:  # else it compiled
            return {"ms": report.summarize(first), "sampled_error": error}
        timing = report.measure(
            call, self.device, repeats=self.options.repeats, seconds=self.options.seconds, warm=True
        )
        return {"ms": timing, "sampled_error": error}

    def expected(self, name: str) -> float | None:
        """Seconds a call would take by the length before and quadratic growth."""
        last = self.before.get(name, {})
        if "ms" not in last:
            return None
        return last["ms"].median * (self.length / self.before["tokens"]) ** 2 / 1e3

    def dense_cell(self, name: str, make: Callable[[], Callable[[], torch.Tensor]]) -> dict[str, Any]:
        """One dense kernel: time and TFLOP/s over the causal pairs."""
        cell = self.checked(name, make(), None)
        if "ms" in cell:
            pairs = self.options.heads * self.length * (self.length + 1) / 2
            cell["tflops"] = self.rate(pairs, cell["ms"])
        return cell

    def rate(self, pairs: float, timing: report.Timing) -> float:
        """TFLOP/s of both products (Q K^T and P V) over ``pairs``."""
        return round(4 * self.options.dim * pairs / timing.median / 1e9, 3)

    def stem_cell(self, backend: str) -> dict[str, Any]:
        """Stem through one backend: total, mask alone, attention alone, rate inside the kept blocks."""
        q, k, v = self.tensors
        build = functools.partial(stem_flex.stem_block_mask, q, k, v, self.config)
        mask = build()
        attend = functools.partial(sparse_prefill, q, k, v, mask, backend=backend)
        alone = self.checked(f"stem_{backend}", attend, mask)
        if "ms" not in alone:
            return alone
        timed = functools.partial(
            report.measure, device=self.device, repeats=self.options.repeats, seconds=self.options.seconds
        )
        facts = {
            "density": round(stem_flex.block_density(mask), 5),
            "tflops": self.rate(check.computed_pairs(mask), alone["ms"]),
        }
        del mask, attend
        whole = functools.partial(stem_flex.stem_attention, q, k, v, self.config, backend=backend)
        return {
            "ms": timed(whole, warm=True),
            "mask_ms": timed(build),
            "attention_ms": alone["ms"],
            **facts,
            "sampled_error": alone["sampled_error"],
        }

    def auto_cell(self) -> dict[str, Any]:
        """``backend="auto"``, timed only: what a user gets who asks for nothing."""
        call = functools.partial(stem_flex.stem_attention, *self.tensors, self.config, backend="auto")
        timing = report.measure(call, self.device, repeats=self.options.repeats, seconds=self.options.seconds)
        return {"ms": timing}

    def run(self) -> dict[str, Any]:
        """All cells; a failing one keeps its error."""
        row: dict[str, Any] = {"tokens": self.length}
        cells: dict[str, tuple[Callable[[], dict[str, Any]], int | None]] = {
            name: (functools.partial(self.dense_cell, name, make), self.options.skip_dense_above)
            for name, make in dense.calls(self.tensors).items()
        }
        for backend in self.options.backends:
            cells[f"stem_{backend}"] = (functools.partial(self.stem_cell, backend), None)
        if self.options.auto:
            cells["stem_auto"] = (self.auto_cell, None)
        for name, (cell, limit) in cells.items():
            reason = self.blank(name, limit)
            row[name] = {"skipped": reason} if reason else report.attempt(cell)
        return row


def speed_up(row: dict[str, Any], name: str, over: str) -> float | None:
    """How many times faster cell ``name`` is than cell ``over``, None where one is missing."""
    ours, theirs = row.get(name, {}).get("ms"), row.get(over, {}).get("ms")
    return round(theirs.median / ours.median, 3) if ours and theirs else None


def _cell(row: dict[str, Any], name: str) -> str:
    cell = row.get(name, {})
    if "ms" in cell:
        return f"{cell['ms'].median:.2f}"
    return "error" if "error" in cell else "-"


def _parts(rows: list[dict[str, Any]], name: str, dense_names: list[str]) -> list[list[str]]:
    """Lines of one Stem backend, whose speed-ups are added to the rows."""
    body = []
    for row in rows:
        cell = row.get(name, {})
        if "ms" in cell:
            row[f"{name}_speed_up"] = {over: speed_up(row, name, over) for over in dense_names}
            ups = [f"{up:.2f}x" if up else "-" for up in row[f"{name}_speed_up"].values()]
            facts = [f"{cell['density']:.3f}", f"{cell['mask_ms'].median:.3f}", f"{cell['attention_ms'].median:.2f}"]
            rates = [f"{cell['tflops']:.3g}", f"{cell['sampled_error']:.1e}"]
            body.append([report.short(row["tokens"]), *facts, *rates, *ups])
    return body


def file_name(options: argparse.Namespace) -> str:
    """What this run's files are called: a budget of mass beside a budget of counts, none over the other."""
    return f"prefill_{options.config}" if options.config in ("mass", "coarse") else "prefill"


def present(rows: list[dict[str, Any]], options: argparse.Namespace, header: dict[str, Any]) -> None:
    """Print the tables, write JSON, CSV and the picture."""
    dense_names = [name for name in DENSE if any(name in row for row in rows)]
    stems = [f"stem_{backend}" for backend in options.backends]
    autos = ["stem_auto"] if options.auto else []
    machine = header["environment"]["gpu"] or "CPU"
    heads = f"{options.heads}/{options.kv_heads} heads of {options.dim}"
    title = f"Causal prefill by {BUDGETS[options.config]}, {machine}, {heads}, {options.dtype}"
    times = [
        [report.short(row["tokens"]), *(_cell(row, name) for name in [*dense_names, *stems, *autos])] for row in rows
    ]
    notes = [
        f"{report.short(row['tokens'])} {name}: {cell.get('error') or cell['skipped']}"
        for row in rows
        for name, cell in row.items()
        if isinstance(cell, dict) and ({"error", "skipped"} & cell.keys())
    ]
    report.show(
        f"{title}: median ms, mask building included",
        ["tokens", *(NAMES[name] for name in [*dense_names, *stems, *autos])],
        times,
        notes,
    )
    for name in stems:
        body = _parts(rows, name, dense_names)
        report.show(
            f"{NAMES[name]}: where the time goes, and how much faster",
            [
                "tokens",
                "density",
                "mask ms",
                "attention ms",
                "TFLOP/s in kept",
                "error",
                *(f"over {NAMES[over]}" for over in dense_names),
            ],
            body,
        )
    print(
        f"roofline: a matrix product ran at {header['matmul_tflops']:.3g} TFLOP/s in this run; "
        "the mask cannot take less than reading q, k and v once (python -m bench.mask)"
    )
    path = report.write(options.out, file_name(options), rows, **header)
    picture = picture_of(rows, path.with_suffix(".png"), title, dense_names, stems, header["matmul_tflops"])
    print(f"wrote {path}" + (f" and {picture}" if picture else ""))


def picture_of(rows, path: Path, title: str, dense_names, stems, ceiling: float) -> Path | None:
    """Left: speed-up of each Stem backend over each dense kernel; right: TFLOP/s in the computed pairs."""
    ups: dict[str, list[tuple[int, float]]] = {}
    rates: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name in [*dense_names, *stems]:
            if "tflops" in row.get(name, {}):
                rates.setdefault(NAMES[name], []).append((row["tokens"], row[name]["tflops"]))
        for name in stems:
            for over in dense_names:
                if up := speed_up(row, name, over):
                    ups.setdefault(f"{NAMES[name]} over {NAMES[over]}", []).append((row["tokens"], up))
    dashed = tuple(
        label
        for label in [*ups, *rates]
        if label.startswith("Stem TRITON over") or label in {NAMES[name] for name in dense_names}
    )
    return plots.panels(
        path,
        title,
        [
            {
                "title": "speed-up, mask building included",
                "ylabel": "times faster",
                "series": ups,
                "dashed": dashed,
                "lines": {"equal": 1.0},
            },
            {
                "title": "rate over the pairs computed (dense: causal pairs)",
                "ylabel": "TFLOP/s",
                "series": rates,
                "dashed": dashed,
                "lines": {"matrix product": ceiling},
            },
        ],
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.prefill", description=(__doc__ or "").split("\n\n")[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--lengths", default=LENGTHS if cuda else "512", type=report.parse_lengths)
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--heads", type=int, default=32 if cuda else 4)
    parser.add_argument("--kv-heads", type=int, default=8 if cuda else 2)
    parser.add_argument("--dim", type=int, default=128 if cuda else 32)
    parser.add_argument("--dtype", default="bf16" if cuda else "fp32", choices=sorted(report.DTYPES))
    parser.add_argument("--bshd", action="store_true", help="q, k, v as views of (B, N, H, D) memory")
    parser.add_argument("--config", default="operator", choices=("operator", "paper", "default", "mass", "coarse"))
    parser.add_argument("--inputs", default="random", choices=("random", "model"), help="model: bench.activations")
    parser.add_argument("--backends", nargs="*", default=None, choices=("triton", "flash", "cpu"))
    parser.add_argument("--no-auto", dest="auto", action="store_false", help="leave backend='auto' out")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=1.0, help="most time for one cell's timed calls")
    parser.add_argument("--cell-seconds", type=float, default=8.0, help="longest call that is run at all")
    parser.add_argument("--skip-dense-above", type=int, default=524288, help="leave dense kernels out above this")
    parser.add_argument("--check-rows", type=int, default=16, help="(head, query) rows checked before timing")
    parser.add_argument("--tolerance", type=float, default=2e-2, help="relative error allowed on sampled rows")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    parser.add_argument("--report", action="store_true", help="measure nothing, draw from the JSON of --config")
    options = parser.parse_args(arguments)
    if options.inputs == "model" and (options.heads, options.kv_heads, options.bshd) != (32, 8, False):
        parser.error("--inputs model has 32 query and 8 key heads")
    if options.backends is None:
        options.backends = ["triton", "flash"] if options.device == "cuda" else ["cpu"]
    return options


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Run, print, write; returns the rows."""
    options = parse(arguments)
    if options.report:
        header, rows = report.read(options.out / f"{file_name(options)}.json")
        present(rows, argparse.Namespace(**header["options"] | {"out": options.out}), header)
        return rows
    config = choose_config(options.config)
    rate = matmul_rate(torch.device(options.device), report.DTYPES[options.dtype])
    header = {"environment": report.environment(), "options": vars(options), "matmul_tflops": round(rate, 3)}
    rows: list[dict[str, Any]] = []
    for length in options.lengths:
        start = time.perf_counter()
        before = rows[-1] if rows else None

        def cells(length: int = length, before: dict[str, Any] | None = before) -> dict[str, Any]:
            return Length(length, options, config, before).run()

        rows.append({"tokens": length} | report.attempt(cells))
        report.write(options.out, file_name(options), rows, **header)  # a run that is cut short keeps what it has
        print(f"{report.short(length)}: {time.perf_counter() - start:.1f} s", flush=True)
    present(rows, options, header)
    return rows


if __name__ == "__main__":
    main()
