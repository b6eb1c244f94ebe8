"""``python -m bench.readme``: write the committed results of bench/results into bench/RESULTS.md and README.md."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from . import compare_tables, threshold_tables
from . import result_tables as tables
from .report import RESULTS, ROOT, share, short
from .result_tables import markdown, run

START = "<!-- figures: python -m bench.readme writes what stands between these marks -->\n"
END = "<!-- end of figures -->"
MODELS_DENSITY = 0.25
MODELS = {"": "needle LM", "smollm2": "SmolLM2", "smollm2_8k": "SmolLM2"}  # folders of accuracy.json
LINES = {"distributed": tables.distributed_line, "vllm_paged": tables.vllm_paged_line}  # one sentence each in README.md
EMPTY = "No results are committed yet: run `python -m bench.mask` and `python -m bench.prefill` on a GPU.\n"
Table = Callable[[dict[str, Any]], str]


def headlines(results: Path = RESULTS) -> str:
    """The tables that README.md keeps: what a prefill gains, what it costs by a budget of mass and by counts, and what
    other selectors cost."""
    shown: dict[str, Table] = {
        "prefill": tables.prefill,
        "prefill_mass": tables.prefill_brief,
        "prefill_coarse": tables.prefill_brief,
        "ttft": tables.ttft_line,
        "thresholds": threshold_tables.thresholds_brief,
        "thresholds_coarse": threshold_tables.thresholds_coarse,
        "accuracy": tables.accuracy,
        "compare": compare_tables.selectors,
    }
    parts = _parts(results, shown)
    if len(by_model(results)) > 1:
        parts.append(over_models(results, brief=True))
    return "\n".join(parts) or EMPTY


def sections(results: Path = RESULTS) -> dict[str, str]:
    """All tables of the results that exist, by their headings in bench/RESULTS.md."""
    model = threshold_tables.THRESHOLDS
    shown: list[tuple[str, str, Table]] = [
        ("Prefill", "prefill", tables.prefill),
        ("Prefill by a threshold of mass", "prefill_mass", tables.prefill_full),
        ("Prefill by a threshold of mass, with a coarse sketch", "prefill_coarse", tables.prefill_full),
        ("Time to the first token", "ttft", tables.ttft),
        ("Building the mask", "mask", tables.mask),
        *(
            (f"Thresholds of mass: {whose}", file, partial(threshold_tables.thresholds, model=whose))
            for file, whose in model.items()
        ),
        ("Answers by density", "accuracy", tables.accuracy),
        ("Answers over models", "smollm2/accuracy", lambda _: over_models(results)),
        ("Facts that SmolLM2 answers", "smollm2/ruler", tables.retrieval),
        ("Long documents, by SmolLM2", "smollm2/reading", reading),
        ("Published selectors", "compare", compare_tables.compare),
        ("Times of published selectors", "compare_flash", compare_tables.speeds),
        ("Trained sparsity", "refine", tables.refine),
        ("Several cards", "distributed", tables.distributed),
        ("Pages of vLLM", "vllm_paged", tables.vllm_paged),
    ]
    found = {heading: _parts(results, {name: table}) for heading, name, table in shown}
    return {heading: parts[0] for heading, parts in found.items() if parts}


def figures(results: Path = RESULTS) -> str:
    """All sections for bench/RESULTS.md, under a table of contents."""
    found = sections(results)
    contents = "".join(f"- [{heading}](#{_anchor(heading)})\n" for heading in found)
    return "\n".join([contents, *(f"## {heading}\n\n{text}" for heading, text in found.items())]) if found else EMPTY


def _anchor(heading: str) -> str:
    """The name by which GitHub links to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _parts(results: Path, shown: dict[str, Table]) -> list[str]:
    return [
        table(json.loads(path.read_text()))
        for name, table in shown.items()
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


def over_models(results: Path, *, brief: bool = False) -> str:
    """One table: what every selector costs every model at one density; brief: those that several of its columns have,
    and answers of sparse rows alone."""
    found, kinds = by_model(results), ("all",) if brief else ("prompt", "all")
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for title, result in found:
        for cell in (*result["main"], *result.get("rules", [])):
            label = cell["selector"] + (f", {cell['rule']}" if "rule" in cell else "")
            if "rule" in cell or cell["density"] in (1.0, MODELS_DENSITY):
                cells.setdefault(label, {})[title] = cell
    rows = []
    for label, of_model in cells.items():
        if brief and len(of_model) < 2:
            continue
        line = [label]
        for title, _ in found:
            cell = of_model.get(title)
            answers = [share(cell[kind]) for kind in kinds] if cell else ["-" for _ in kinds]
            line += [*answers, _text(cell) if cell else "-"]
        rows.append(line)
    heads = [f"{title}: {what}" for title, _ in found for what in (*kinds, "text")]
    commands = "; ".join(f"{title}: {run(result['environment'])}" for title, result in found)
    return (
        f"Answers over models, at {MODELS_DENSITY:.0%} of the blocks or by a budget rule, whose density is as it "
        f"falls (in brackets, of text). SmolLM2-135M-Instruct, by `python -m bench.models smollm2`, is asked in "
        f"its own chat format. {commands}.\n\n"
        + markdown(["selector", *heads], rows)
        + "\n![models](bench/results/models.png)\n"
    )


def reading(result: dict[str, Any]) -> str:
    """Scores of long-document tasks by selector."""
    from .reading import table

    where = result["environment"]
    found = [row for row in result["rows"] if row["selector"] != "dense" or row["budget"] == "100%"]
    columns, rows = table(found)
    samples = found[0]["samples"]
    lost = [row["kind"] for row in found if row["selector"] == "dense" and not row["mean"]]
    said = f" Dense attention has 0 of {', '.join(lost)}, which says nothing of any selector." if lost else ""
    return (
        f"Summaries, code completion, few-shot learning and questions on {short(result['length'])} tokens of documents "
        f"of Python's packages, by {result['model']}: {run(where)}; {samples} prompts a cell, in brackets what "
        f"they differ from dense attention's, with the 95 % bootstrap interval.{said}\n\n" + markdown(columns, rows)
    )


def _text(cell: dict[str, Any]) -> str:
    text = f"{cell['extra_loss'] if 'extra_loss' in cell else cell.get('extra', 0.0):+.3f}"
    if cell["selector"] == "dense":
        text = f"{cell['loss']:.3f} nats"
    return text + (f" ({cell['computed']:.0%})" if "rule" in cell else "")


def written(readme: str, text: str, lines: dict[str, str] | None = None) -> str:
    """``readme`` with ``text`` between the marks of the figures, and each of ``lines`` between those of its name."""
    readme = _between(readme, START, END, text)
    for name, line in (lines or {}).items():
        start = f"<!-- {name}: python -m bench.readme writes this -->\n"
        readme = _between(readme, start, f"<!-- end of {name} -->", line)
    return readme


def _between(readme: str, start: str, end: str, text: str) -> str:
    before, _, rest = readme.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"README.md must hold the marks {start!r} and {end!r}")
    return before + start + text + end + after


def sentences(results: Path = RESULTS) -> dict[str, str]:
    """README.md's sentences by the names of their results, "" where a result does not exist."""
    return {name: "".join(_parts(results, {name: line})) for name, line in LINES.items()}


def results_page(results: Path = RESULTS) -> str:
    """All of bench/RESULTS.md."""
    text = figures(results).replace("](bench/results/", "](results/")
    return "# Results\n\nWritten by `python -m bench.readme` from `bench/results`, as measured.\n\n" + text


def main(arguments: list[str] | None = None) -> None:
    """Rewrite README.md's figures and bench/RESULTS.md."""
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    path = ROOT / "README.md"
    path.write_text(written(path.read_text(), headlines(), sentences()))
    (ROOT / "bench" / "RESULTS.md").write_text(results_page())
    found = by_model(RESULTS)
    if len(found) > 1:
        from .accuracy_plots import draw_models

        draw_models(found, RESULTS / "models.png")
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
