"""calibrate: the threshold for a wanted loss, its statistics, what it refuses, and that it leaves no trace."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")

import stem_flex.integrations.hf as stem_hf  # noqa: E402
from stem_flex import StemConfig, calibrate  # noqa: E402
from stem_flex.integrations import hf_calibrate  # noqa: E402
from stem_flex.integrations.hf_calibrate import CalibrationError, Measured, student  # noqa: E402
from tests.hf_models import prompt, tiny_model  # noqa: E402

CONFIG = replace(StemConfig.mass(), block_size=16, stride=4, sketch=(4, 4, 2, 4))
OPTIONS = {"lengths": (96,), "windows": 3, "config": CONFIG, "dense_layers": (), "progress": False}
TEXT = prompt(batch=3, tokens=97)


def test_more_threshold_is_less_density_and_none_is_dense(llama, exactly):
    found = calibrate(llama, TEXT, loss=9.0, thresholds=[1.5, 1e-9, 0.6], every=True, **OPTIONS)
    assert [row.threshold for row in found.rows] == [1e-9, 0.6, 1.5]
    densities = [row.density for row in found.rows]
    assert densities[0] == 1.0
    assert densities == sorted(set(densities), reverse=True)
    assert max(map(abs, found.rows[0].differences)) < 1e-4
    assert max(map(abs, found.rows[2].differences)) > 1e-2
    assert found.config == replace(CONFIG, threshold=1.5)
    assert found.by_length == {96: found.config}


def test_the_loss_is_that_of_the_second_half(llama, exactly):
    found = calibrate(llama, TEXT, loss=9.0, thresholds=[0.5], **OPTIONS)
    windows = TEXT[:, :96]
    with torch.no_grad():
        losses = []
        for switch in (lambda m: m, lambda m: stem_hf.apply(m, found.config, dense_layers=(), min_tokens=0)):
            logits = switch(llama)(windows, use_cache=False).logits[:, 47:-1].double()
            losses.append(-logits.log_softmax(-1).gather(-1, windows[:, 48:, None]).mean((1, 2)))
    assert found.dense[96] == pytest.approx(float(losses[0].mean()), abs=1e-5)
    expected = losses[1] - losses[0]
    assert found.rows[0].differences == pytest.approx(expected.tolist(), abs=1e-5)
    half = 4.3027 * float(expected.std()) / math.sqrt(3)
    assert found.rows[0].high == pytest.approx(float(expected.mean()) + half, abs=1e-5)
    assert found.rows[0].low == pytest.approx(float(expected.mean()) - half, abs=1e-5)


def test_a_model_is_left_as_it_was(llama, exactly):
    before, attributes = llama.config.to_dict(), set(llama.__dict__)
    modules = {name: set(module.__dict__) for name, module in llama.named_modules()}
    calibrate(llama, TEXT, loss=9.0, thresholds=[0.5], **OPTIONS)
    with pytest.raises(CalibrationError):
        calibrate(llama, TEXT, loss=1e-12, thresholds=[1.5], **OPTIONS)
    with pytest.raises(ValueError, match="dense_layers must be layers of the model, 0 to 1"):
        calibrate(llama, TEXT, thresholds=[0.5], **OPTIONS | {"dense_layers": (5,)})
    assert llama.config.to_dict() == before
    assert set(llama.__dict__) == attributes
    assert {name: set(module.__dict__) for name, module in llama.named_modules()} == modules


def losses(monkeypatch, of_threshold):
    """Let a threshold at a length lose what ``of_threshold`` says, with a spread of 0.001 over the windows."""
    state = {}
    monkeypatch.setattr(stem_hf, "apply", lambda model, config, **_: state.update(threshold=config.threshold))
    monkeypatch.setattr(stem_hf, "remove", lambda model: None)
    monkeypatch.setattr(hf_calibrate, "_text_loss", lambda model, ids: 1.0)

    def sparse(hf, model, ids):
        state["turn"] = state.get("turn", 0) + 1
        jitter = (state["turn"] % 3 - 1) * 0.001
        return 1.0 + of_threshold(ids.shape[1], state["threshold"]) + jitter, 0.5

    monkeypatch.setattr(hf_calibrate, "_sparse_loss", sparse)


def test_the_search_stops_where_too_much_is_lost(llama, monkeypatch):
    losses(monkeypatch, lambda length, threshold: threshold / 10 * length / 32)
    options = OPTIONS | {"lengths": (32, 64)}
    found = calibrate(llama, TEXT, loss=0.02, thresholds=[0.05, 0.08, 0.1, 0.15, 0.2], **options)
    # half an interval is 4.3027 * 0.001 / sqrt(3) = 0.0025, so the mean must stay below 0.0175
    assert [(row.length, row.threshold) for row in found.rows] == [
        *((32, t) for t in (0.05, 0.08, 0.1, 0.15, 0.2)), *((64, t) for t in (0.05, 0.08, 0.1)),
    ]  # fmt: skip
    assert {length: config.threshold for length, config in found.by_length.items()} == {32: 0.15, 64: 0.08}
    assert found.config.threshold == 0.08
    lines = str(found).splitlines()
    assert len(lines) == 10
    assert [line.endswith("*") for line in lines[1:-1]] == [row.threshold == (0.15 if row.length == 32 else 0.08)
                                                             for row in found.rows]  # fmt: skip
    assert lines[-1] == "threshold=0.08 adds at most 0.02 nats a token at every length"


def test_what_comes_after_a_failure_does_not_count(llama, monkeypatch):
    losses(monkeypatch, lambda length, threshold: {0.1: 0.0, 0.2: 0.5, 0.3: 0.0}[threshold])
    found = calibrate(llama, TEXT, loss=0.02, thresholds=[0.1, 0.2, 0.3], every=True, **OPTIONS)
    assert len(found.rows) == 3
    assert found.config.threshold == 0.1


def test_a_loss_that_is_not_reached_is_refused(llama, monkeypatch):
    losses(monkeypatch, lambda length, threshold: threshold * (length > 32))
    match = r"loss=0.02 is not reached at 64 tokens: the best is threshold=0.1, which adds \+0.1000 .* density of 50.0%"
    with pytest.raises(CalibrationError, match=match) as caught:
        calibrate(llama, TEXT, loss=0.02, thresholds=[0.1, 0.2], **OPTIONS | {"lengths": (32, 64)})
    assert [row.length for row in caught.value.rows] == [32, 32, 64]
    assert isinstance(caught.value.rows[0], Measured)


@pytest.mark.parametrize(("degrees", "expected"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (7, 2.3646), (30, 2.0423)])
def test_student(degrees, expected):
    assert student(0.95, degrees) == pytest.approx(expected, abs=1e-4)
    assert student(0.5, 1) == pytest.approx(1.0)


class Letters:
    """A tokenizer of letters, with a beginning of text of 1."""

    bos_token_id = 1

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = [2 + ord(letter) % 50 for letter in text]
        return transformers.BatchEncoding({"input_ids": [1, *ids] if add_special_tokens else ids})


def test_windows_of_text(llama, monkeypatch):
    seen = []
    monkeypatch.setattr(hf_calibrate, "_text_loss", lambda model, ids: seen.append(ids) or 1.0)
    monkeypatch.setattr(hf_calibrate, "_sparse_loss", lambda hf, model, ids: (1.0, 0.5))
    monkeypatch.setattr(stem_hf, "apply", lambda *_, **__: None)
    monkeypatch.setattr(stem_hf, "remove", lambda *_: None)
    options = OPTIONS | {"lengths": (16,), "thresholds": [0.1]}
    calibrate(llama, ["abcdefgh" * 5, "zyxw" * 9], tokenizer=Letters(), **options)
    assert all(ids.shape == (1, 16) and ids[0, 0] == 1 for ids in seen)
    text = Letters()("abcdefgh" * 5, add_special_tokens=False).input_ids
    assert seen[0][0, 1:].tolist() == text[:15]
    given = torch.arange(64) % 50
    for form in (given, given.tolist(), [given], given[None]):
        seen.clear()
        calibrate(llama, form, **options)
        assert torch.equal(torch.cat(seen), given.reshape(4, 16)[[0, 1, 2]])  # 3 of 4, spread
    seen.clear()
    calibrate(llama, given, before=[7, 8], **options)
    assert [ids[0, :3].tolist() for ids in seen] == [[7, 8, i * 14] for i in (0, 1, 2)]


REFUSED = [
    ({"config": StemConfig()}, ValueError, "config must have a budget with a threshold, got budget='tpd'"),
    ({"loss": 0}, ValueError, "loss must be above 0 and below inf, got 0"),
    ({"loss": "x"}, TypeError, "loss must be a number, got 'x'"),
    ({"confidence": 1.0}, ValueError, "confidence must be above 0 and below 1, got 1.0"),
    ({"windows": 1}, ValueError, "windows must be at least 2, got 1"),
    ({"lengths": ()}, ValueError, "lengths must be one or more different numbers"),
    ({"lengths": (96, 96)}, ValueError, "lengths must be one or more different numbers"),
    ({"lengths": (2,)}, ValueError, "lengths must be at least 4, got 2"),
    ({"lengths": (9.5,)}, TypeError, "lengths must hold ints, got 9.5"),
    ({"thresholds": ()}, ValueError, "thresholds must hold one number or more, got none"),
    ({"thresholds": (3.0,)}, ValueError, r"threshold must be a number in \(0, 2\], got 3.0"),
    ({"windows": 4}, ValueError, "text must hold 4 windows of 96 tokens that do not overlap, it holds 3"),
    ({"before": range(93)}, ValueError, "lengths must leave 4 tokens or more besides the 93 of before, got 96"),
    ({"text": "abc"}, ValueError, "tokenizer must be given for text that is strings"),
    ({"text": torch.rand(400)}, TypeError, r"text must be strings or int tensors \(tokens,\), got torch.float32"),
    ({"model": 3}, TypeError, "model must be a transformers PreTrainedModel, got int"),
    ({"dense_layers": (0, 1)}, ValueError, r"model must have a layer that runs Stem, its layers took .*\['dense'\]"),
]


@pytest.mark.parametrize(("options", "error", "match"), REFUSED)
def test_wrong_arguments_are_refused(options, error, match, llama, exactly):
    options = {"model": llama, "text": TEXT, "thresholds": [0.5]} | OPTIONS | options
    with pytest.raises(error, match=match):
        calibrate(options.pop("model"), options.pop("text"), **options)
    assert not hasattr(llama.config, "stem_flex")


def test_a_model_that_is_sparse_or_trains_is_refused(llama):
    stem_hf.apply(llama, CONFIG)
    with pytest.raises(ValueError, match="model must attend densely, got attention 'stem_flex'"):
        calibrate(llama, TEXT, **OPTIONS)
    with pytest.raises(ValueError, match=re.escape("call model.eval()")):
        calibrate(tiny_model("llama").train(), TEXT, **OPTIONS)


def test_without_transformers_the_extra_is_named():
    program = (
        "import sys; sys.modules['transformers'] = None\n"
        "import stem_flex\n"
        "try: stem_flex.calibrate(None, [1])\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "stem_flex.calibrate needs transformers; pip install 'stem-flex[hf]'", done.stderr
