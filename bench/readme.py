"""``python -m bench.readme``: write the committed results of bench/results into bench/RESULTS.md and README.md."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .report import RESULTS, ROOT, share, short

START = "<!-- figures: python -m bench.readme writes what stands between these marks -->\n"
END = "<!-- end of figures -->"
SHOWN_DENSITIES = {0.15, 0.25}  # of accuracy's: those that the papers speak of
MODELS_DENSITY = 0.25
MODELS = {"": "needle LM", "smollm2": "SmolLM2", "smollm2_8k": "SmolLM2"}  # folders of accuracy.json
STEMS = ("stem_flash", "stem_triton")
NOTES = """
## Notes

The prefill run timed `auto` only at 512K tokens, for a defect of the benchmark that was mended after it; the run before
is `bench/results/prefill_512k.json` (commit fb018a4): FlashAttention-2 7,230 ms, cuDNN 4,515, flash-attn-4 3,474, Stem
FLASH 697. At 128K the first of the two prefills of the whole model compiled the selection kernel for rows of 1,024
blocks; Triton keeps it on disk, and the parts in `bench/results/ttft.md` are medians of both.
"""
EMPTY = "No results are committed yet: run `python -m bench.mask` and `python -m bench.prefill` on a GPU.\n"


def headlines(results: Path = RESULTS) -> str:
    """The tables that README.md keeps: what a prefill gains, what it costs by a budget of mass and by counts, and what
    other selectors cost."""
    tables = {"prefill": prefill, "thresholds": thresholds, "accuracy": accuracy, "compare": selectors}
    return "\n".join(_parts(results, tables)) or EMPTY


def figures(results: Path = RESULTS) -> str:
    """All tables of the results that exist, for bench/RESULTS.md."""
    tables = {"prefill": prefill, "ttft": ttft, "mask": mask, "thresholds": thresholds, "accuracy": accuracy}
    parts = _parts(results, tables)
    if (results / "smollm2" / "accuracy.json").exists():
        parts.append(over_models(results))
    if (path := results / "smollm2" / "reading.json").exists():
        parts.append(reading(json.loads(path.read_text())))
    parts += _parts(results, {"compare": compare, "compare_flash": speeds, "refine": refine})
    return "\n".join(parts) or EMPTY


def _parts(results: Path, tables: dict[str, Callable[[dict[str, Any]], str]]) -> list[str]:
    return [
        table(json.loads(path.read_text()))
        for name, table in tables.items()
        if (path := results / f"{name}.json").exists()
    ]


def by_model(results: Path) -> list[tuple[str, dict[str, Any]]]:
    """(title, result) of every model whose accuracy was measured, the shipped one first."""
    found = []
    for folder, name in MODELS.items():
        path = results / folder / "accuracy.json"
        if path.exists():
            result = json.loads(path.read_text())
            found.append((f"{name}, {short(result['environment']['length'])}", result))
    return found


def over_models(results: Path) -> str:
    """One table: what every selector costs every model at one density."""
    found = by_model(results)
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for title, result in found:
        for cell in (*result["main"], *result.get("rules", [])):
            label = cell["selector"] + (f", {cell['rule']}" if "rule" in cell else "")
            if "rule" in cell or cell["density"] in (1.0, MODELS_DENSITY):
                cells.setdefault(label, {})[title] = cell
    rows = []
    for label, of_model in cells.items():
        line = [label]
        for title, _ in found:
            cell = of_model.get(title)
            line += [share(cell["prompt"]), share(cell["all"]), _text(cell)] if cell else ["-", "-", "-"]
        rows.append(line)
    heads = [f"{title}: {what}" for title, _ in found for what in ("prompt", "all", "text")]
    commands = "; ".join(
        f"{title}: `{result['environment']['command']}` on {result['environment']['gpu'] or 'a CPU'}, torch "
        f"{result['environment']['torch']}, commit {result['environment']['commit']}"
        for title, result in found
    )
    return (
        f"The same over models, at {MODELS_DENSITY:.0%} of the blocks or by a budget rule, whose density is as it "
        f"falls (in brackets, of text). SmolLM2-135M-Instruct, by `python -m bench.models smollm2`, is asked in "
        f"its own chat format. {commands}.\n\n"
        + _table(["selector", *heads], rows)
        + "\n![models](bench/results/models.png)\n"
    )


def reading(result: dict[str, Any]) -> str:
    """Scores of long-document tasks by selector."""
    from .reading import table

    where = result["environment"]
    columns, rows = table(result["rows"])
    samples = result["rows"][0]["samples"]
    return (
        f"Summaries, code completion, few-shot learning and questions on {short(result['length'])} tokens of documents "
        f"of Python's packages, by {result['model']}: {_run(where)}; {samples} prompts a cell, in brackets what "
        f"they differ from dense attention's, with the 95 % bootstrap interval.\n\n" + _table(columns, rows)
    )


def _text(cell: dict[str, Any]) -> str:
    text = f"{cell['extra_loss'] if 'extra_loss' in cell else cell.get('extra', 0.0):+.3f}"
    if cell["selector"] == "dense":
        text = f"{cell['loss']:.3f} nats"
    return text + (f" ({cell['computed']:.0%})" if "rule" in cell else "")


def _ms(row: dict[str, Any], name: str, key: str = "ms") -> str:
    value = row.get(name, {}).get(key)
    if not value:
        return "-"
    return f"{value['median']:,.0f}" if value["median"] >= 100 else f"{value['median']:.3g}"


def _up(row: dict[str, Any], over: str) -> str:
    ours, theirs = (row.get(name, {}).get("ms") for name in ("stem_flash", over))
    return f"{theirs['median'] / ours['median']:.1f}x" if ours and theirs else "-"


def _heading(result: dict[str, Any], what: str) -> str:
    where, options = result["environment"], result["options"]
    return (
        f"{what} `{where['command']}` on one {where['gpu']}: batch 1, {options['heads']} query / "
        f"{options['kv_heads']} key heads of {options['dim']}, {options['dtype']}, causal, "
        f"{options['config']} budget, torch {where['torch']}, commit {where['commit']}.\n\n"
    )


def _run(where: dict[str, Any]) -> str:
    """The command of an environment, where it ran, and on which versions."""
    return f"`{where['command']}` on {where['gpu'] or 'a CPU'}, torch {where['torch']}, commit {where['commit']}"


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def prefill(result: dict[str, Any]) -> str:
    """Times of dense kernels and Stem, and Stem FLASH's speed-ups."""
    rows = [
        [
            short(row["tokens"]),
            next((f"{row[name]['density']:.1%}" for name in STEMS if "density" in row.get(name, {})), "-"),
            *(_ms(row, name) for name in ("fa2", "cudnn", "fa4", "stem_triton", "stem_flash", "stem_auto")),
            *(_up(row, over) for over in ("fa2", "cudnn", "fa4")),
            f"{row['stem_flash']['tflops']:.0f}" if "tflops" in row.get("stem_flash", {}) else "-",
        ]
        for row in result["rows"]
    ]
    columns = ["tokens", "density", "FlashAttention-2", "cuDNN", "flash-attn-4", "Stem TRITON", "Stem FLASH", "auto",
               "over FA2", "over cuDNN", "over FA4", "TFLOP/s in kept blocks"]  # fmt: skip
    text = _heading(result, "Prefill, median ms, mask building included:")
    return text + _table(columns, rows) + "\n![speed-up](bench/results/prefill.png)\n"


def ttft(result: dict[str, Any]) -> str:
    """Whole models' times to the first token."""
    where, options = result["environment"], result["options"]
    names = {"sdpa": "SDPA FlashAttention-2", "fa4": "flash-attn-4", "stem": "Stem"}
    rows = []
    for row in result["rows"]:
        times = [f"{row[name]['fastest_ms']:,.0f}" if "ms" in row.get(name, {}) else "-" for name in names]
        ups = [f"{row[key]:.2f}x" if key in row else "-" for key in ("over_sdpa", "over_fa4")]
        extra = f"{row['extra_gib']:+.2f}" if "extra_gib" in row else "-"
        rows.append([row["model"], short(row["tokens"]), *times, *ups, extra])
    columns = ["model", "tokens", *names.values(), "over SDPA", "over flash-attn-4", "GiB over SDPA"]
    layers = ", ".join(map(str, options["dense_layers"])) or "none"
    return (
        f"Time to the first token of whole models, ms, fastest of up to {options['repeats']}: `{where['command']}` "
        f"on one {where['gpu']}: {options['dtype']}, batch 1, {options['config']} budget, dense layers {layers}, torch "
        f"{where['torch']}, commit {where['commit']}; `llama` is the shape of Llama-3.1-8B.\n\n"
        + _table(columns, rows)
        + "\n![time to first token](bench/results/ttft.png)\n"
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
    return text + _table(columns, rows) + "\n![mask](bench/results/mask.png)\n"


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
        f"{_run(where)}; "
        f'{asked} prompts a cell, 95 % Wilson intervals. "prompt": the prompt\'s rows are sparse, the answer is '
        f'decoded densely; "all": every row is sparse; "text": nats a token added on unseen text.\n\n'
        + _table(["selector", *heads], rows)
        + "\nOther densities, ablations, layers and heads are in `bench/results/accuracy.md`.\n\n"
        + "![accuracy](bench/results/accuracy.png)\n"
    )


def thresholds(result: dict[str, Any]) -> str:
    """Density, answers and text loss by threshold and length."""
    from .thresholds import table

    where = result["environment"]
    return (
        f"Budgets of estimated mass on the shipped model: {_run(where)}; 95 % intervals, of text of the "
        "paired difference.\n\n" + "\n".join(table(result["rows"])) + "\n"
    )


def selectors(result: dict[str, Any]) -> str:
    """Every published selector at its own settings, and the figure of all."""
    from .compare_report import native_table

    where = result["environment"]
    return (
        f"Published selectors at their own settings in the same kernels: {_run(where)}. "
        f"{_compared(result)}\n\n"
        + _table(*native_table(result))
        + "\nAt equal densities: [bench/RESULTS.md](bench/RESULTS.md).\n\n"
        + "![selectors](bench/results/compare.png)\n"
    )


def _compared(result: dict[str, Any]) -> str:
    """What the columns of a comparison say."""
    from .compare_report import speed_words

    where = result["environment"]
    asked = max((cell["all"]["samples"] for cell in result["cells"] if "all" in cell), default=0)
    return (
        f"The shipped model on {short(where['length'])}-token prompts, {asked} a cell: density of text, attention mass "
        f"on computed blocks and error of the attention output on dense activations, answers exactly right with the "
        f"prompt's rows sparse or all of them (95 % Wilson intervals), nats a token added on text. One layer of "
        f"{speed_words(result)}: median ms of selection and attention, each alone, and its density."
    )


def compare(result: dict[str, Any]) -> str:
    """The same at equal densities: by counts, and by each selector's own rule."""
    from .compare_report import WAYS, matched_table

    text = selectors(result).replace("\nAt equal densities: [bench/RESULTS.md](bench/RESULTS.md).\n", "")
    for density in sorted({cell["wanted"] for cell in result["cells"] if cell["wanted"] is not None}):
        for way, words in WAYS.items():
            columns, rows = matched_table(result, way, density)
            if rows:
                text += f"\n{density:.0%} of the blocks, {words}:\n\n" + _table(columns, rows)
    return text


def speeds(result: dict[str, Any]) -> str:
    """Times of selection and of attention by another backend."""
    from .compare_report import speed_words

    where = result["environment"]
    rows = [
        [row["selector"], row["way"], *(f"{row[key]:.3g}" for key in ("selection", "attention", "density"))]
        for row in result["speed"]
        if "selection" in row
    ]
    return (
        f"Selection and attention by {result['speed'][0]['backend'].upper()}, median ms, one layer of "
        f"{speed_words(result)}: {_run(where)}. native: at its own settings; count: "
        f"{result['environment']['density']:.0%} of the blocks, "
        "the same number for every row.\n\n"
        + _table(["selector", "settings", "selection", "attention", "density"], rows)
    )


def refine(result: dict[str, Any]) -> str:
    """Output error of budgets on trained sparsity, each against a uniform cut of the same size."""
    from .refine_report import errors_table

    where = result["environment"]
    return (
        f"Stem on trained sparsity, stood in for on the shipped model: {_run(where)}; layers at "
        f"{short(result['length'])} tokens, {result['seeds']} prompts; the whole model at "
        f"{short(result['deep_length'])}, {result['deep_seeds']} prompts. Relative errors against dense attention; "
        f"ratios to a uniform cut of the same size are paired by prompt, with 95 % bootstrap intervals.\n\n"
        + _table(*errors_table(result["rows"]))
        + "\nBy layer, by quarter of the prompt, and savings by length: `bench/results/refine.md`.\n"
    )


def written(readme: str, text: str) -> str:
    """``readme`` with ``text`` between the marks."""
    before, _, rest = readme.partition(START)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"README.md must hold the marks {START!r} and {END!r}")
    return before + START + text + END + after


def results_page(results: Path = RESULTS) -> str:
    """All of bench/RESULTS.md."""
    text = figures(results).replace("](bench/results/", "](results/")
    return "# Results\n\nWritten by `python -m bench.readme` from `bench/results`, as measured.\n\n" + text + NOTES


def main() -> None:
    """Rewrite README.md's figures and bench/RESULTS.md."""
    path = ROOT / "README.md"
    path.write_text(written(path.read_text(), headlines()))
    (ROOT / "bench" / "RESULTS.md").write_text(results_page())
    found = by_model(RESULTS)
    if len(found) > 1:
        from .accuracy_report import draw_models

        draw_models(found, RESULTS / "models.png")
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
