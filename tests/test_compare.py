"""bench.compare: matched densities are met, rows are what they say, and the pages are written."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

pytest.importorskip("transformers", reason="the benchmark runs transformers models")
pytest.importorskip("matplotlib", reason="the report draws")

from bench import attend, compare, compare_report
from stem_flex import StemConfig
from stem_flex.budget import Coverage
from stem_flex.selectors import get
from stem_flex.selectors.rules import Above, Part, Relative

BASE = StemConfig(block_size=32, sink_blocks=1, local_blocks=1, stride=8)


@pytest.mark.parametrize("name", ["xattention", "flashprefill", "a-shape", "oracle"])
def test_a_rule_is_solved_for_a_density(name, make_qkv):
    """The number found keeps at least the density on the scores it was found on, and hardly more."""
    q, k, v = make_qkv(2, 4, 2, 1024, 16)
    selector = get(name)
    config = replace(selector.configured(BASE), sink_blocks=1, local_blocks=1, stride=8)
    seen = compare.Scored(selector, config)
    for layer in range(2):
        seen(layer, q + 0.3 * layer, k, v, 0.25)
    rule, kept = seen.solved(0.4)
    assert 0.4 <= kept < (0.45 if name != "a-shape" else 0.55)  # a static pattern moves by whole diagonals
    policy = attend.Sparse(selector, config, 0.4, rule=rule)
    for layer in range(2):
        policy.block_mask(q + 0.3 * layer, k, v)
    assert policy.computed(1024) == pytest.approx(kept)


def test_numbers_of_rules_keep_more_as_they_grow():
    assert compare.at(Coverage(0.9), 0.3) == Coverage(0.3)
    assert compare.at(Relative(0.2, full_rows=2), 0.3) == Relative(0.7)
    assert compare.at(Part(0.5), 0.3) == Part(0.3)
    assert compare.at(None, 0.75) == Above(4.0)


def test_speed(tmp_path, monkeypatch):
    """Times of a few selectors, without the model; test_bench compiles flex_attention."""
    monkeypatch.setattr(compare, "sparse_prefill", lambda q, k, v, mask, backend: q @ k[:, :1].mT)
    found = compare.main(["--device", "cpu", "--parts", "speed", "--speed-length", "256", "--selectors",
                          "dense,stem,xattention,oracle", "--seconds", "0.001", "--out", str(tmp_path)])  # fmt: skip
    assert not found["failures"]
    assert [(row["selector"], row["way"]) for row in found["speed"]] == [
        ("dense", "native"), ("stem", "native"), ("stem", "count"), ("xattention", "native"), ("xattention", "count")
    ]  # fmt: skip
    assert all(row["selection"] > 0 and row["attention"] > 0 and 0 < row["density"] <= 1 for row in found["speed"])
    assert "one layer of 256 tokens" in (tmp_path / "compare.md").read_text()
    assert (tmp_path / "compare.png").exists()


def answers(selector, way, density, hits, computed, turn=0):
    """A line of compare.jsonl."""
    found = {"prompt": {"single_number": hits}, "all": {"single_number": hits}, "loss": [2.0 + computed]}
    return {"section": "answers", "selector": selector, "way": way, "density": density, "turn": turn,
            "computed": computed, **found}  # fmt: skip


def test_the_report_pools_passes(tmp_path):
    """Hits and intervals over passes, loss against the dense one of the same pass, best answers first."""
    rows = [
        {"section": "environment", "families": ["single_number"], "length": 1024, "model": "m"},
        answers("dense", "native", None, "11", 1.0), answers("dense", "native", None, "10", 1.0, 1),
        answers("a-shape", "count", 0.25, "10", 0.25), answers("a-shape", "count", 0.25, "00", 0.25, 1),
        answers("stem", "count", 0.25, "11", 0.25), answers("xattention", "rule", 0.25, "01", 0.2),
        {"section": "probe", "way": "count", "selector": "stem", "density": 0.25, "computed": 0.25,
         "layers": [{"mass": 0.5, "error": 0.2}, {"mass": 0.7, "error": 0.4}]},
        {"section": "failure", "what": "a part", "error": "ValueError: no"},
        {"section": "end", "seconds": 3.0},
    ]  # fmt: skip
    path = tmp_path / "compare.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = compare_report.write(path)
    _, lines = compare_report.matched_table(result, "count", 0.25)
    assert [line[0] for line in lines] == ["stem", "a-shape"]
    assert lines[0][1:4] == ["0.250", "0.600", "0.300"]
    assert lines[1][5].startswith("0.25 [")
    assert lines[1][6] == "-0.750"
    page = (tmp_path / "compare.md").read_text()
    assert "25% of the blocks: its own rule" in page
    assert "ValueError: no" in page
    assert "one layer of" not in page  # nothing was timed
    assert (tmp_path / "compare.png").exists()


def test_a_rule_that_reaches_no_lower_density_is_named():
    rules = [
        {"selector": name, "density": 0.25, "kept": kept} for name, kept in (("a-shape", 0.26), ("spargeattn", 1.0))
    ]
    assert compare_report.unreached({"rules": rules}, 0.25).endswith("whatever its number: spargeattn 100%.")
    assert compare_report.unreached({"rules": rules[:1]}, 0.25) == compare_report.unreached({"rules": rules}, 0.1) == ""


def test_a_number_that_the_forced_blocks_use_up_is_named():
    """64 rows of at most 3 forced blocks are 189 of 2,080 pairs; 10 % of those are 208, 19 more."""
    result = {"environment": {"length": 8192, "sink": 1, "local": 2}, "rules": []}
    said = compare_report.remark(result, "count", 0.1)
    assert "take 9.1% of the pairs, which leaves selectors 0.3 blocks a row" in said
    assert compare_report.remark(result, "count", 0.25) == compare_report.remark(result, "rule", 0.1) == ""


def test_equal_densities_count_the_same_forced_blocks():
    for name in ("flashprefill", "minference", "a-shape"):
        config = attend.same_forced(get(name), BASE)
        assert (config.sink_blocks, config.local_blocks) == (BASE.sink_blocks, BASE.local_blocks)


def test_speeds_alone_draw_no_empty_legend(tmp_path, recwarn):
    speed = {"section": "speed", "selector": "stem", "way": "native", "length": 1024, "backend": "flash",
             "selection": 0.8, "attention": 45.0, "density": 0.2}  # fmt: skip
    path = tmp_path / "compare.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ({"section": "environment", "length": 1024}, speed)))
    compare_report.write(path)
    assert (tmp_path / "compare.png").exists()
    assert not [warning for warning in recwarn if "artists with labels" in str(warning.message)]
