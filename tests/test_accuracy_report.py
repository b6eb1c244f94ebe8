"""Tables of bench.accuracy from measurements made up here."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bench import accuracy_plots, accuracy_report, readme, report


def measured(section: str, selector: str, density: float, hits: str, loss: list[float], kl: list[float], **tags):
    """A row as bench.accuracy writes it; every family and protocol has the same hits but the harder one, none."""
    found = {"fact_place": hits, "short_tracking": "0" * len(hits)}
    nats = {family: [0.5] * len(hits) for family in found}
    return {
        "section": section, "selector": selector, "length": 4096, "turn": 0, "density": density, "loss": loss,
        "kl": kl, "computed": density, "prompt": found, "all": found, "prompt_nats": nats, "all_nats": nats,
        "prompt_computed": density, "all_computed": density,
    } | tags  # fmt: skip


@pytest.fixture
def rows():
    """Dense, a selector at a density, and one by a rule."""
    environment = {"section": "environment", "model": "`m`", "length": 4096, "command": "c", "gpu": None, "torch": "2",
                   "commit": "k", "date": "d", "families": ["fact_place"], "sink": 1, "local": 2}  # fmt: skip
    return [
        environment,
        measured("main", "dense", 1.0, "1111", [2.0, 3.0], [0.0, 0.0]),
        measured("main", "stem", 0.25, "1100", [2.1, 3.3], [0.2, 0.4]),
        measured("rules", "sketch", 1.0, "1110", [2.0, 3.1], [0.1, 0.1], rule="mass:0.05", computed=0.18),
        {"section": "end", "seconds": 1.0},
    ]


def test_cells(rows):
    """Harder families do not count in the shares; losses are paired by window; rules have their own density."""
    result = accuracy_report.summarize(rows)
    cells = {cell["selector"]: cell for cell in (*result["main"], *result["rules"])}
    assert (cells["stem"]["all"]["right"], cells["stem"]["all"]["samples"]) == (2, 4)
    assert cells["stem"]["all"]["families"]["short_tracking"] == [0, 4]
    assert cells["stem"]["extra_loss"] == pytest.approx(0.2)
    low, high = cells["stem"]["extra_interval"]
    assert (low, high) == (pytest.approx(0.1), pytest.approx(0.3))
    assert cells["stem"]["kl"] == pytest.approx(0.3)
    assert cells["sketch"]["computed"] == 0.18
    text = accuracy_report.markdown(result)
    assert "| sketch | mass:0.05 | 18.0% |" in text
    assert "| stem | 25% | prompt | 2/4 | 0/4 |" in text


def test_models_in_one_table(rows, tmp_path):
    """A column group a model, a line a selector and rule."""
    for folder in ("", "smollm2"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "accuracy.json").write_text(json.dumps(accuracy_report.summarize(rows)))
    text = readme.over_models(tmp_path)
    assert (
        "| selector | needle LM, 4K: prompt | needle LM, 4K: all | needle LM, 4K: text | SmolLM2, 4K: prompt |" in text
    )
    assert "| sketch, mass:0.05 | 0.75 [0.30, 0.95] | 0.75 [0.30, 0.95] | +0.050 (18%) |" in text
    pytest.importorskip("matplotlib", reason="the picture is drawn with it")
    accuracy_plots.draw_models(readme.by_model(tmp_path), tmp_path / "models.png")
    assert (tmp_path / "models.png").stat().st_size > 10_000


def test_bootstrap_covers_the_mean():
    """About 95 of 100 intervals hold the true mean; the interval of equal values is one point."""
    rng = np.random.default_rng(0)
    intervals = [report.bootstrap(rng.normal(size=40).tolist(), 500) for _ in range(200)]
    assert 0.88 < np.mean([low < 0 < high for low, high in intervals]) <= 1
    assert report.bootstrap([2.0, 2.0]) == [2.0, 2.0]
