"""Tables of single result files of bench/results, as Markdown: one function a file, for :mod:`bench.readme`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .report import RESULTS, share, short
from .ttft_report import NAMES, listed

SHOWN_DENSITIES = {0.15, 0.25}  # of accuracy's: those that the papers speak of
STEMS = ("stem_flash", "stem_triton")


def _ms(row: dict[str, Any], name: str, key: str = "ms") -> str:
    value = row.get(name, {}).get(key)
    return _plain(value["median"] if value else None)


def _up(row: dict[str, Any], over: str, name: str) -> str:
    ours, theirs = (row.get(of, {}).get("ms") for of in (name, over))
    return f"{theirs['median'] / ours['median']:.1f}x" if ours and theirs else "-"


def _heading(result: dict[str, Any], what: str) -> str:
    where, options = result["environment"], result["options"]
    return (
        f"{what} `{where['command']}` on one {where['gpu']}: batch 1, {options['heads']} query / "
        f"{options['kv_heads']} key heads of {options['dim']}, {options['dtype']}, causal, "
        f"{options['config']} budget, torch {where['torch']}, commit {where['commit']}.\n\n"
    )


def run(where: dict[str, Any]) -> str:
    """The command of an environment, where it ran, on which versions, and what else is to be known of that run."""
    said = f"`{where['command']}` on {where['gpu'] or 'a CPU'}, torch {where['torch']}, commit {where['commit']}"
    return said + (f" ({where['note']})" if "note" in where else "")


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


COLUMNS = {
    "fa2": "FlashAttention-2",
    "cudnn": "cuDNN",
    "fa4": "flash-attn-4",
    "stem_triton": "Stem TRITON",
    "stem_flash": "Stem FLASH",
    "stem_auto": "auto",
}
OVER = {"fa2": "over FA2", "cudnn": "over cuDNN", "fa4": "over FA4"}
BUDGETS = {  # by bench.prefill's --config
    "default": "StemConfig()",
    "operator": "StemConfig.operator()",
    "paper": "StemConfig.paper()",
    "mass": "StemConfig.mass()",
    "coarse": "StemConfig.mass(sketch=(8, 8, 4, 8), coarse=(4, 1))",
}


def prefill(result: dict[str, Any]) -> str:
    """Times of dense kernels and Stem, and Stem FLASH's speed-ups."""
    text = _heading(result, "Prefill, median ms, mask building included:")
    return text + _times(result, [*COLUMNS], masks=False, rates=True) + "\n![speed-up](bench/results/prefill.png)\n"


def prefill_brief(result: dict[str, Any]) -> str:
    """A budget of mass, as README.md shows it: Stem's times, the mask's among them, and the speed-ups."""
    return _of_model(result) + _times(result, ["stem_triton", "stem_flash"], masks=True, rates=False)


def prefill_full(result: dict[str, Any]) -> str:
    """The same with the dense kernels' times, and the picture where there is one of this run."""
    text = _of_model(result) + _times(result, [*COLUMNS], masks=True, rates=True)
    name = f"prefill_{result['options']['config']}.png"
    return text + (f"\n![speed-up](bench/results/{name})\n" if (RESULTS / name).exists() else "")


def _of_model(result: dict[str, Any]) -> str:
    """Which budget, of whose activations."""
    where, config = result["environment"], result["options"]["config"]
    whose = "random q, k, v"
    if result["options"]["inputs"] == "model":
        whose = (
            "q, k, v of four layers of the shipped model reading unseen text, which repeats past its end, and past the "
            "32K tokens that it was trained on (`bench/activations.py`)"
        )
    return f"Prefill by `{BUDGETS[config]}`, median ms, mask building included: {run(where)}; {whose}.\n\n"


def _times(result: dict[str, Any], names: list[str], *, masks: bool, rates: bool) -> str:
    """A line a length: density, times, how many times faster Stem is, by FLASH where it ran, and FLASH's rate."""
    rows = []
    for row in result["rows"]:
        stem = row.get("stem_flash", {})
        density = next((f"{row[name]['density']:.1%}" for name in STEMS if "density" in row.get(name, {})), "-")
        line = [short(row["tokens"]), density]
        fastest = next((name for name in STEMS if "ms" in row.get(name, {})), "stem_flash")
        line += [_ms(row, fastest, "mask_ms")] if masks else []
        line += [_ms(row, name) for name in names] + [_up(row, over, fastest) for over in OVER]
        rows.append(line + ([f"{stem['tflops']:.0f}" if "tflops" in stem else "-"] if rates else []))
    columns = ["tokens", "density", *(["mask ms"] if masks else []), *(COLUMNS[name] for name in names)]
    return markdown([*columns, *OVER.values(), *(["TFLOP/s in kept blocks"] if rates else [])], rows)


def ttft(result: dict[str, Any]) -> str:
    """Whole models' times to the first token."""
    where, options = result["environment"], result["options"]
    rows = []
    for row in result["rows"]:
        times = [f"{row[name]['fastest_ms']:,.0f}" if "ms" in row.get(name, {}) else "-" for name in NAMES]
        ups = [f"{row[key]:.2f}x" if key in row else "-" for key in ("over_sdpa", "over_fa4")]
        extra = f"{row['extra_gib']:+.2f}" if "extra_gib" in row else "-"
        rows.append([row["model"], short(row["tokens"]), *times, *ups, extra])
    columns = ["model", "tokens", *NAMES.values(), "over SDPA", "over flash-attn-4", "GiB over SDPA"]
    layers = listed(options["dense_layers"])
    return (
        f"Time to the first token of whole models, ms, fastest of up to {options['repeats']}: `{where['command']}` "
        f"on one {where['gpu']}: {options['dtype']}, batch 1, {options['config']} budget, dense layers {layers}, torch "
        f"{where['torch']}, commit {where['commit']}; `llama` is the shape of Llama-3.1-8B. "
        f"Its parts: `bench/results/ttft.md`.\n\n"
        + markdown(columns, rows)
        + "\n![time to first token](bench/results/ttft.png)\n"
    )


def ttft_line(result: dict[str, Any]) -> str:
    """A model of Llama-3.1-8B's shape at its longest prompt, in one sentence."""
    rows = [row for row in result["rows"] if row["model"] == "llama" and {"over_sdpa", "over_fa4"} <= row.keys()]
    if not rows:
        return ""
    row, where, options = rows[-1], result["environment"], result["options"]
    stem, sdpa, fa4 = (f"{row[name]['fastest_ms'] / 1e3:.3g} s" for name in ("stem", "sdpa", "fa4"))
    layers = listed(options["dense_layers"])
    return (
        f"A whole model of Llama-3.1-8B's shape gives the first token after {short(row['tokens'])} tokens in {stem}: "
        f"{row['over_sdpa']:.2f} times faster than by SDPA's FlashAttention-2 ({sdpa}), {row['over_fa4']:.2f} times "
        f"faster than by flash-attn-4 ({fa4}) (`{where['command']}` on one {where['gpu']}, {options['config']} budget, "
        f"dense layers {layers}, torch {where['torch']}, commit {where['commit']}).\n"
    )


def mask(result: dict[str, Any]) -> str:
    """Times and memory of mask building against the floor."""
    rows = []
    for row in result["rows"]:
        floor, best = (row.get(name, {}).get("ms") for name in ("floor", "graph"))
        ratio = f"{best['median'] / floor['median']:.2f}x" if floor and best else "-"
        memory = row.get("stem", {}).get("peak_mib")
        cells = (_ms(row, name) for name in ("floor", "graph", "stem", "torch"))
        rows.append([short(row["tokens"]), *cells, ratio, "-" if memory is None else f"{memory:,.0f} MiB"])
    columns = ["tokens", "reading q, k, v once", "Stem, CUDA graph", "Stem, eager", "PyTorch", "over the floor",
               "peak extra memory"]  # fmt: skip
    text = _heading(result, "Building the mask, median ms:")
    return text + markdown(columns, rows) + "\n![mask](bench/results/mask.png)\n"


SELECTORS = {  # in a few words, for the tables of them
    "sam": "the mass of strided antidiagonals (Stem's routing) alone, as many blocks for every row",
    "oam": "`sam` with the magnitude of the values",
    "stem": "`oam` with counts that fall along the prompt, as `+tpd` does; `stem-log` takes the paper's logarithm",
    "sketch": "attention between 16 means of each block of queries and of keys",
    "sketch-outliers": "`sketch` with outlying tokens beside 8 means, the scores of `StemConfig.mass()`",
    "oracle": "the largest mass that any token of dense attention gives a block: costs as much as dense, a yardstick",
}


def named(shown: Iterable[str]) -> str:
    """A line for each of the names that :data:`SELECTORS` explains."""
    lines = [f"- `{name}`: {SELECTORS[name]}\n" for name in shown if name in SELECTORS]
    return "".join(lines) + "\n" if lines else ""


def accuracy(result: dict[str, Any]) -> str:
    """Answers found by selector, density and protocol, with intervals, and the loss added on text."""
    where, cells = result["environment"], result["main"]
    sparse = sorted({cell["density"] for cell in cells} & SHOWN_DENSITIES)
    by_name: dict[str, dict[float, dict[str, Any]]] = {}
    for cell in cells:
        by_name.setdefault(cell["selector"], {})[cell["density"]] = cell

    rows = []
    for name, found in by_name.items():
        kept = [found.get(density, found.get(1.0)) for density in sparse]
        text = [f"{cell['extra_loss']:+.3f}" if cell and cell["density"] < 1 else "0" for cell in kept]
        by_protocol = [share(cell[protocol]) if cell else "-" for protocol in ("prompt", "all") for cell in kept]
        rows.append([name, *by_protocol, *text])
    heads = [f"{what}, {density:.0%}" for what in ("prompt", "all", "text") for density in sparse]
    counts = sorted({cell["prompt"]["samples"] for cell in cells})
    asked = " to ".join(str(count) for count in sorted({counts[0], counts[-1]}))
    return (
        f"Answers that the shipped 15 M model finds in {short(where['length'])}-token prompts, by density: "
        f"{run(where)}; "
        f'{asked} prompts a cell, 95 % Wilson intervals. "prompt": the prompt\'s rows are sparse, the answer is '
        f'decoded densely; "all": every row is sparse; "text": nats a token added on unseen text.\n\n'
        + named(by_name)
        + markdown(["selector", *heads], rows)
        + "\nOther densities, ablations, layers and heads are in `bench/results/accuracy.md`.\n\n"
        + "![accuracy](bench/results/accuracy.png)\n"
    )


def retrieval(result: dict[str, Any]) -> str:
    """What dense attention answers of the facts that a small instruct model is asked for."""
    from .families import FACTS

    rows = result["rows"]
    shown = ", ".join(f"{row['family']} {row['right']} of {row['samples']}" for row in rows)
    right, asked = (sum(row[key] for row in rows if row["family"] in FACTS) for key in ("right", "samples"))
    return (
        f"SmolLM2-135M-Instruct answers {right} of {asked} facts at {short(rows[0]['length'])} tokens by dense "
        f"attention, in its own chat format: {run(result['environment'])}; {shown}.\n"
    )


def refine(result: dict[str, Any]) -> str:
    """Output error of budgets on trained sparsity, each against a uniform cut of the same size."""
    from .refine_report import errors_table

    where = result["environment"]
    return (
        f"Stem on trained sparsity, stood in for on the shipped model: {run(where)}; layers at "
        f"{short(result['length'])} tokens, {result['seeds']} prompts; the whole model at "
        f"{short(result['deep_length'])}, {result['deep_seeds']} prompts. Relative errors against dense attention; "
        f"ratios to a uniform cut of the same size are paired by prompt, with 95 % bootstrap intervals.\n\n"
        + markdown(*errors_table(result["rows"]))
        + "\nBy layer, by quarter of the prompt, and savings by length: `bench/results/refine.md`.\n"
    )


def distributed(result: dict[str, Any]) -> str:
    """Several cards against one of them: times, what the exchange takes, rows whose blocks are not one card's."""
    where, options = result["environment"], result["options"]
    rows = []
    for row in result["rows"]:
        name = [row["mode"], short(row["tokens"])]
        if "error" in row:
            rows.append([*name, row["error"], *["-"] * 5])
            continue
        cells = [(name, row["parallel"])]
        if "plain_zigzag" in row:
            cells.append(([f"{row['mode']}, equal chunks", name[1]], row["plain_zigzag"]))
        for title, cell in cells:
            one, every = row["one_card"]["fastest_ms"], cell["ms"]["median"]
            share_of = f"{cell['share_of_communication']:.1%}" if "share_of_communication" in cell else "-"
            facts = [share_of, str(cell.get("rows_with_other_blocks", "-"))]
            far = f"{cell['difference_from_one_card']:.1e}"
            rows.append([*title, f"{one:,.1f}", f"{every:,.1f}", f"{one / every:.2f}x", *facts, far])
    columns = ["parallel", "tokens", "one card, ms", "all cards, ms", "times faster", "exchange",
               "rows of other blocks", "difference from one card"]  # fmt: skip
    failing = result.get("a_rank_fails")
    said = (
        f" Where a rank passes a row too few, every rank raises within {failing['seconds']:.2g} s." if failing else ""
    )
    return (
        f"{result['ranks']} cards against one of them: {run(where)}; batch 1, {options['heads']} query / "
        f"{options['kv_heads']} key heads of {options['dim']}, {options['dtype']}, {options['config']} budget. "
        f"tensor: heads spread; context: rows spread. One card is the fastest one, all cards are the slowest rank's "
        f"time; exchange: what keys and values take to travel, alone, of the whole.{said}\n\n"
        + markdown(columns, rows)
        + "".join(f"\n{row['note']}\n" for row in result["rows"] if "note" in row)
    )


def distributed_line(result: dict[str, Any]) -> str:
    """Speed-ups in one sentence."""
    words = {"tensor": "by heads", "context": "by rows"}
    rows = [row for row in result["rows"] if "speed_up" in row]
    found = ", ".join(
        f"{row['one_card']['fastest_ms'] / row['parallel']['ms']['median']:.2f} {words[row['mode']]} at "
        f"{short(row['tokens'])} tokens"
        for row in rows
    )
    cards = f"{result['ranks']} cards ({result['environment']['gpu'] or 'CPU'})"
    notes = "".join(f" {row['note']}" for row in rows if "note" in row)
    return (
        f"Times faster on {cards} than on one: {found} ([bench/RESULTS.md](bench/RESULTS.md)).{notes}\n" if rows else ""
    )


PAGED = {"stem triton": "Stem TRITON", "stem flash": "Stem FLASH", "vLLM Triton": "vLLM's Triton", "SDPA": "SDPA"}


def vllm_paged(result: dict[str, Any]) -> str:
    """One attention layer of the vLLM plug-in on a paged cache: checks, and times of chunks that end a prompt."""
    where, check = result["environment"], result["check"]
    rows = []
    for cell in result["cells"]:
        if "error" in cell:
            rows.append([short(cell["queries"]) if "queries" in cell else "-", cell["error"], *["-"] * 6])
            continue
        times = [_plain(cell.get(name, {}).get("ms")) for name in PAGED]
        density = next((f"{cell[name]['density']:.1%}" for name in PAGED if "density" in cell.get(name, {})), "-")
        rows.append([short(cell["queries"]), short(cell["keys"]), density, _plain(cell.get("gather")), *times])
    errors = ", ".join(
        f"{name.removesuffix(', error')} {value:.1e}" for name, value in check.items() if "error" in name
    )
    return (
        f"The vLLM plug-in's attention class on a paged cache, one layer, median ms: {run(where)}, files of vLLM "
        f"{where['vllm files']}. The last queries of a prompt; Stem's times hold the gathering of its pages. SDPA has "
        f"gathered tensors; vLLM's FlashAttention was not timed. Largest errors of "
        f"mixed batches against dense attention: {errors}; waits for the device: {check['waits for the device']}.\n\n"
        + markdown(["queries", "keys", "density", "gather", *PAGED.values()], rows)
    )


def vllm_paged_line(result: dict[str, Any]) -> str:
    """What a chunk costs, in one sentence."""
    cells = [cell for cell in result["cells"] if "gather" in cell and all("ms" in cell.get(name, {}) for name in PAGED)]
    if not cells:
        return ""
    cell = cells[len(cells) // 2]
    flash, dense, sdpa = (_plain(cell[name]["ms"]) for name in ("stem flash", "vLLM Triton", "SDPA"))
    return (
        f"A layer takes {flash} ms for a chunk of {short(cell['queries'])} tokens that ends a prompt of "
        f"{short(cell['keys'])}, reading its pages included, vLLM's Triton attention {dense} ms and SDPA on gathered "
        f"tensors {sdpa} ms (one {result['environment']['gpu']}, {cell['stem flash']['density']:.0%} of the blocks; "
        f"[bench/RESULTS.md](bench/RESULTS.md)).\n"
    )


def _plain(ms: float | None) -> str:
    return "-" if ms is None else f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"
