"""The benchmarks' smoke mode: they run on a CPU, check before they time, and write what they say."""

from __future__ import annotations

import json

import pytest
import torch

import stem_flex
from bench import check, report


def drawn_again(bench, folder, name):
    """The rows that ``--report`` reads; what was measured stays as it is."""
    before = (folder / f"{name}.json").read_text()
    rows = bench.main(["--device", "cpu", "--out", str(folder), "--report"])
    assert (folder / f"{name}.json").read_text() == before
    return rows


def test_mask(tmp_path):
    from bench import mask

    rows = mask.main(["--device", "cpu", "--lengths", "512,1K", "--heads", "4", "--kv-heads", "2", "--dim", "32",
                      "--seconds", "0.01", "--repeats", "3", "--out", str(tmp_path)])  # fmt: skip
    assert [row["tokens"] for row in rows] == [512, 1024]
    assert all(row["check"]["ok"] for row in rows)
    assert not any("error" in cell for row in rows for cell in row.values() if isinstance(cell, dict))
    written = json.loads((tmp_path / "mask.json").read_text())
    assert written["environment"]["torch"]
    assert written["rows"][0]["stem"]["ms"]["median"] > 0
    assert (tmp_path / "mask.csv").read_text().startswith("tokens,")
    assert drawn_again(mask, tmp_path, "mask") == rows


def test_prefill(tmp_path):
    from bench import prefill

    rows = prefill.main(["--device", "cpu", "--lengths", "512,1K", "--heads", "2", "--kv-heads", "1", "--seconds",
                         "0.0001", "--repeats", "3", "--no-auto", "--out", str(tmp_path)])  # fmt: skip
    assert [row["tokens"] for row in rows] == [512, 1024]  # the second is expected to take longer than --seconds
    for row in rows:
        assert {"sdpa", "flex", "stem_cpu"} < row.keys()
        for name in ("sdpa", "flex", "stem_cpu"):
            assert row[name]["sampled_error"] < 1e-4, row[name]
        assert row["stem_cpu_speed_up"]["sdpa"] > 0
    assert (tmp_path / "prefill.csv").exists()
    assert drawn_again(prefill, tmp_path, "prefill") == rows
    names = [
        prefill.file_name(prefill.parse(["--device", "cpu", "--config", x])) for x in ("operator", "mass", "coarse")
    ]
    assert names == ["prefill", "prefill_mass", "prefill_coarse"]


def test_calibrate(tmp_path, monkeypatch, exactly):
    from bench import calibrate, models
    from stem_flex.integrations.hf_calibrate import CalibrationError
    from tests.hf_models import tiny_model

    tokenizer = calibrate.load(models.SHIPPED, torch.device("cpu"))[1]
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=2048)
    monkeypatch.setattr(calibrate, "load", lambda *_: (model, tokenizer))
    common = ["--text", str(models.SHIPPED / "document.txt"), "--lengths", "512", "--windows", "2", "--key-block", "64",
              "--device", "cpu", "--out", str(tmp_path)]  # fmt: skip
    found = calibrate.main([*common, "--loss", "5", "--thresholds", "0.9,1e-9"])
    written = json.loads((tmp_path / "calibrate.json").read_text())
    assert written["threshold"] == found.config.threshold == 0.9
    assert written["rows"][0]["density"] == 1.0 > written["rows"][1]["density"]
    with pytest.raises(CalibrationError, match="is not reached at 512 tokens"):
        calibrate.main([*common, "--loss", "1e-12", "--thresholds", "0.9"])
    assert len(json.loads((tmp_path / "calibrate.json").read_text())["rows"]) == 1


def test_a_failing_cell_is_a_result():
    def fail():
        raise RuntimeError("no\nsuch kernel")

    assert report.attempt(fail) == {"error": "RuntimeError: no such kernel"}


def test_sampled_error_sees_a_wrong_output():
    q, k, v = report.inputs(700, 4, 2, 16, torch.float32, torch.device("cpu"), bshd=True)
    config = stem_flex.StemConfig(schedule="fixed", k_start=1, sink_blocks=0, local_blocks=1)
    mask = stem_flex.stem_block_mask(q, k, v, config)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert check.sampled_error(dense, q, k, v, None) < 1e-5
    assert check.sampled_error(dense, q, k, v, mask) > 1e-2


def test_same_selection_allows_ties_only():
    q, k, v = report.inputs(1000, 4, 2, 16, torch.float32, torch.device("cpu"), bshd=False)
    config = stem_flex.StemConfig(schedule="fixed", k_start=2, sink_blocks=1, local_blocks=1)
    scores = stem_flex.oam_scores(q, k, v, config)
    one = stem_flex.stem_block_mask(q, k, v, config)
    other = stem_flex.stem_block_mask(-q, k, v, config)
    assert check.same_selection(one, one, scores, 0.0)["ok"]
    assert not check.same_selection(one, other, scores, 1e-6)["ok"]


@pytest.mark.parametrize(("text", "lengths"), [("4K,512", [512, 4096]), ("1M", [1048576])])
def test_lengths(text, lengths):
    assert report.parse_lengths(text) == lengths
    assert report.short(lengths[-1]) in text


def test_wrong_lengths():
    with pytest.raises(ValueError, match="lengths must look like"):
        report.parse_lengths("many")
