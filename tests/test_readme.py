"""README.md says what is true: its snippets run, its commands are CI's, its figures are the committed ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import stem_flex
from bench import result_tables
from bench.report import RESULTS

ROOT = Path(__file__).resolve().parent.parent
TIMING = {"median": 2.0, "low": 1.9, "high": 2.1, "calls": 5}
HEAD = {"environment": {"command": "python -m bench", "gpu": "GPU", "torch": "2", "commit": "c"},
        "options": {"heads": 32, "kv_heads": 8, "dim": 128, "dtype": "bf16", "config": "operator"}}  # fmt: skip
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_first_snippet_is_short_early_and_ends_in_an_assert():
    lines = README.splitlines()
    assert lines.index("```python") < 30
    assert len(SNIPPETS[0].splitlines()) <= 10
    assert all(snippet.strip().splitlines()[-1].startswith("assert ") for snippet in SNIPPETS)


def test_snippets_run():
    pytest.importorskip("transformers", reason="the Hugging Face snippet needs transformers")
    namespace: dict[str, object] = {}
    for number, snippet in enumerate(SNIPPETS):
        exec(compile(snippet, f"README.md, snippet {number + 1}", "exec"), namespace)


def test_every_public_name_is_mentioned():
    missing = [name for name in stem_flex.__all__ if name not in README]
    assert not missing


def test_ci_finds_the_two_commands():
    block = re.search(r"<!-- commands:.*?-->\n```bash\n(.*?)```", README, re.DOTALL)
    assert block is not None
    first, second = block.group(1).strip().splitlines()
    assert first.endswith("python examples/prefill.py")
    assert "pytest" in second
    assert "commands:" in (ROOT / ".ci" / "run").read_text()


def test_figures_are_the_committed_results():
    from bench.readme import headlines, results_page, sentences, written

    assert written(README, headlines(), sentences()) == README, "run python -m bench.readme"
    assert (ROOT / "bench" / "RESULTS.md").read_text() == results_page(), "run python -m bench.readme"


def test_results_have_a_table_of_contents():
    page = (ROOT / "bench" / "RESULTS.md").read_text()
    headings = re.findall(r"^## (.*)$", page, re.MULTILINE)
    links = re.findall(r"^- \[(.*)\]\(#(.*)\)$", page, re.MULTILINE)
    assert [heading for heading, _ in links] == headings
    assert len({anchor for _, anchor in links}) == len(links) > 15
    assert ("Thresholds of mass: SmolLM2-135M-Instruct", "thresholds-of-mass-smollm2-135m-instruct") in links


def test_figures_of_results(tmp_path):
    from bench.readme import figures

    timing, head = TIMING, HEAD
    row = {"tokens": 131072, "fa2": {"ms": timing | {"median": 9.0}}, "cudnn": {"skipped": "why"},
           "stem_flash": {"ms": timing, "density": 0.2, "tflops": 650.4}}  # fmt: skip
    (tmp_path / "prefill.json").write_text(json.dumps(head | {"rows": [row]}))
    text = figures(tmp_path)
    assert "| 128K | 20.0% | 9 | - | - | - | 2 | - | 4.5x | - | - | 650 |" in text
    row = {"tokens": 8192, "floor": {"ms": timing}, "graph": {"ms": timing | {"median": 3.0}},
           "stem": {"ms": timing, "peak_mib": 31.2}}  # fmt: skip
    (tmp_path / "mask.json").write_text(json.dumps(head | {"rows": [row]}))
    assert "| 8K | 2 | 3 | 2 | - | 1.50x | 31 MiB |" in figures(tmp_path)
    found = {"share": 0.5, "low": 0.2, "high": 0.8, "samples": 12}
    cell = {"prompt": found, "all": found | {"share": 0.25}, "extra_loss": 0.057}
    cells = [cell | {"selector": "dense", "density": 1.0}, cell | {"selector": "stem", "density": 0.25}]
    where = head["environment"] | {"length": 8192}
    (tmp_path / "accuracy.json").write_text(json.dumps({"environment": where, "main": cells}))
    assert "| stem | 0.50 [0.20, 0.80] | 0.25 [0.20, 0.80] | +0.057 |" in figures(tmp_path)
    assert "8K-token prompts" in figures(tmp_path)
    assert "- `stem`: `oam` with counts that fall along the prompt" in figures(tmp_path)
    assert "- `oracle`" not in figures(tmp_path)


@pytest.mark.parametrize("config", ["mass", "coarse"])
def test_figures_of_budgets_of_mass(tmp_path, config):
    """README.md has few columns, bench/RESULTS.md all of them and the picture; both say whose activations they are."""
    from bench.readme import figures, headlines

    head = HEAD | {"options": HEAD["options"] | {"config": config, "inputs": "model"}}
    stem = {"ms": TIMING, "mask_ms": TIMING | {"median": 0.625}, "density": 0.066, "tflops": 576.4}
    row = {"tokens": 32768, "fa2": {"ms": TIMING | {"median": 30.0}}, "fa4": {"ms": TIMING | {"median": 12.0}},
           "cudnn": {"skipped": "why"}, "stem_flash": stem,
           "stem_triton": stem | {"ms": TIMING | {"median": 2.5}}}  # fmt: skip
    (tmp_path / f"prefill_{config}.json").write_text(json.dumps(head | {"rows": [row]}))
    brief, full = headlines(tmp_path), figures(tmp_path)
    assert "| tokens | density | mask ms | Stem TRITON | Stem FLASH | over FA2 | over cuDNN | over FA4 |" in brief
    assert "| 32K | 6.6% | 0.625 | 2.5 | 2 | 15.0x | - | 6.0x |" in brief
    assert "| 32K | 6.6% | 0.625 | 30 | - | 12 | 2.5 | 2 | - | 15.0x | - | 6.0x | 576 |" in full
    assert ("prefill_mass.png" in full) == (config == "mass")  # the only picture that is committed
    assert "png" not in brief
    for text in (brief, full):
        assert "layers of the shipped model reading unseen text" in text
        assert ("coarse=(4, 1)" in text) == (config == "coarse")


def test_figures_of_thresholds(tmp_path):
    """README.md: the shipped model's at two lengths, and what the longest says; bench/RESULTS.md: a table a model."""
    from bench.readme import figures, headlines

    def cell(policy, length, hits, loss, density):
        return {"policy": policy, "length": length, "prompt": [hits, 4], "all": [hits - 1, 4], "density": density,
                "losses": [loss, loss + 1]}  # fmt: skip

    rows = [
        cell(policy, length, *facts)
        for length in (4096, 8192, 32768)
        for policy, *facts in (("dense", 4, 1.0, 1.0), ("mass > 0.05", 4, 1.25, 0.075), ("Stem 25%", 3, 1.5, 0.38))
    ]
    for name in ("thresholds", "thresholds_smollm2"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"environment": HEAD["environment"], "rows": rows}))
    brief, full = headlines(tmp_path), figures(tmp_path)
    assert (
        "At 32K tokens: dense attention finds 1.00 of the answers with the prompt sparse (0.75 with every row); "
        in brief
    )
    assert (
        "mass > 0.05 1.00 (0.75) by 7.5% of the blocks, for +0.250 ± 0.000 nats; Stem 25% 0.75 (0.50) by 38.0%" in brief
    )
    assert "keep all they see. Of the causal pairs, by which density counts, Stem 25% computes 38%." in brief
    assert "| 4K | mass" not in brief
    assert "| 8K | mass > 0.05 | 7.5% |" in brief
    assert "SmolLM2" not in brief
    assert full.count("| 4K | mass > 0.05 | 7.5% |") == 2
    assert "mass on the shipped model" in full
    assert "mass on SmolLM2-135M-Instruct" in full


def test_figures_of_several_cards(tmp_path):
    from bench.readme import figures, sentences

    one = {"ms": TIMING, "ranks_ms": [4.0, 3.8], "fastest_ms": 3.8}
    tensor = {"ms": TIMING, "ranks_ms": [2.0, 1.9], "difference_from_one_card": 0.0}
    context = tensor | {"share_of_communication": 0.0421, "rows_with_other_blocks": 3}
    rows = [
        {"mode": "tensor", "tokens": 131072, "ranks": 2, "one_card": one, "parallel": tensor, "speed_up": 1.9},
        {"mode": "context", "tokens": 524288, "ranks": 2, "one_card": one, "parallel": context, "speed_up": 1.9,
         "plain_zigzag": context | {"ms": TIMING | {"median": 3.8}}},
        {"mode": "context", "tokens": 1048576, "error": "rank 0: no"},
    ]  # fmt: skip
    assert sentences(tmp_path) == {"distributed": "", "vllm_paged": ""}
    result = HEAD | {"ranks": 2, "a_rank_fails": {"seconds": 0.51, "errors": []}, "rows": rows}
    (tmp_path / "distributed.json").write_text(json.dumps(result))
    text = figures(tmp_path)
    assert "| tensor | 128K | 3.8 | 2.0 | 1.90x | - | - | 0.0e+00 |" in text
    assert "| context | 512K | 3.8 | 2.0 | 1.90x | 4.2% | 3 | 0.0e+00 |" in text
    assert "| context, equal chunks | 512K | 3.8 | 3.8 | 1.00x | 4.2% | 3 | 0.0e+00 |" in text
    assert "| context | 1M | rank 0: no |" in text
    assert "every rank raises within 0.51 s" in text
    line = sentences(tmp_path)["distributed"]
    assert "than on one: 1.90 by heads at 128K tokens, 1.90 by rows at 512K tokens" in line


def test_figures_of_paged_attention(tmp_path):
    from bench.readme import figures, sentences, written

    stem = {"ms": 3.746, "density": 0.1016, "MiB": 640.0}
    cell = {"queries": 8192, "keys": 131072, "gather": 0.942, "stem triton": stem | {"ms": 4.957}, "stem flash": stem,
            "vLLM Triton": {"ms": 227.3}, "SDPA": {"ms": 51.77}}  # fmt: skip
    whole = {name: value for name, value in cell.items() if name != "gather"} | {
        "queries": 131072,
        "SDPA": {"error": "x"},
    }
    check = {"everything kept, error": 0.00174, "waits for the device": 0, "counters": {}}
    result = {"environment": HEAD["environment"] | {"vllm files": "0.32.0"}, "check": check,
              "cells": [cell, whole, {"error": "ValueError: no"}]}  # fmt: skip
    (tmp_path / "vllm_paged.json").write_text(json.dumps(result))
    text = figures(tmp_path)
    assert "| 8K | 128K | 10.2% | 0.942 | 4.96 | 3.75 | 227 | 51.8 |" in text
    assert "| 128K | 128K | 10.2% | - | 4.96 | 3.75 | 227 | - |" in text
    assert "| - | ValueError: no |" in text
    assert "everything kept 1.7e-03; waits for the device: 0" in text
    line = sentences(tmp_path)["vllm_paged"]
    assert line.startswith("A layer takes 3.75 ms for a chunk of 8K tokens that ends a prompt of 128K")
    assert line in written(README, "", sentences(tmp_path))
    with pytest.raises(ValueError, match="must hold the marks"):
        written("no marks", "")


def test_words_on_trained_sparsity_are_the_committed_results():
    """README.md and refine.py quote bench/results/refine.json."""
    from stem_flex.selectors import refine

    rows = json.loads((ROOT / "bench" / "results" / "refine.json").read_text())["rows"]
    found = {(row["method"], row["policy"]): row for row in rows}
    for method in ("dsa", "infllm"):
        row = found[method, "mass"]
        error, (low, high) = row["layer all"]["ratio"], row["layer all"]["ratio_interval"]
        decay = found[method, "decay"]["layer all"]
        for text in (README, refine.__doc__ or ""):
            plain = " ".join(text.split())
            assert f"{row['saved']:.1%}".replace("%", " %") in plain
            assert f"{error:.3f} [{low:.3f}, {high:.3f}]" in plain
            assert f"{decay['ratio']:.2f}" in plain or f"{decay['ratio']:.3f}" in plain


def test_figures_of_reading(tmp_path):
    """Dense attention once, and a task that it cannot do is said to say nothing."""
    from bench.readme import figures

    def row(kind, selector, budget, mean):
        return {"kind": kind, "metric": "F1", "selector": selector, "budget": budget, "computed": 0.3, "samples": 4,
                "mean": mean, "difference": 0.0, "difference_interval": [-0.1, 0.1]}  # fmt: skip

    rows = [
        row(kind, *policy, mean)
        for kind, mean in (("summary", 0.5), ("answer", 0.0))
        for policy in (("dense", "100%"), ("dense", "25%"), ("stem", "25%"))
    ]
    (tmp_path / "smollm2").mkdir()
    result = {"environment": HEAD["environment"], "model": "m", "length": 4096, "rows": rows}
    (tmp_path / "smollm2" / "reading.json").write_text(json.dumps(result))
    text = figures(tmp_path)
    assert "| dense | 100% | 0.500 | 0.000 | 0.250 |" in text
    assert "| dense | 25%" not in text
    assert "| stem | 25% |" in text
    assert "Dense attention has 0 of answer" in text


def test_notes_of_a_run_are_printed(tmp_path):
    from bench.readme import figures

    where = HEAD["environment"] | {"note": "cut by time"}
    (tmp_path / "distributed.json").write_text(json.dumps(HEAD | {"environment": where, "ranks": 2, "rows": []}))
    assert "commit c (cut by time); batch 1" in figures(tmp_path)


def test_notes_of_a_cell_are_printed():
    result, note = json.loads((RESULTS / "distributed.json").read_text()), "A card was slow."
    result["rows"][0]["note"] = note
    assert note in result_tables.distributed(result)
    assert note in result_tables.distributed_line(result)
