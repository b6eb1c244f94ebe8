"""README.md says what is true: its snippets run, its commands are CI's, its figures are the committed ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import stem_flex

ROOT = Path(__file__).resolve().parent.parent
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
    from bench.readme import headlines, results_page, written

    assert written(README, headlines()) == README, "run python -m bench.readme"
    assert (ROOT / "bench" / "RESULTS.md").read_text() == results_page(), "run python -m bench.readme"


def test_figures_of_results(tmp_path):
    import json

    from bench.readme import figures

    timing = {"median": 2.0, "low": 1.9, "high": 2.1, "calls": 5}
    head = {"environment": {"command": "python -m bench", "gpu": "GPU", "torch": "2", "commit": "c"},
            "options": {"heads": 32, "kv_heads": 8, "dim": 128, "dtype": "bf16", "config": "operator"}}  # fmt: skip
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
