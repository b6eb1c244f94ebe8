"""The main job, on a prompt short enough for every run."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from stem_flex import tpd_budget
from stem_flex.plumbing.tables import block_classes

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("transformers", reason="the example needs transformers")
pytest.importorskip("matplotlib", reason="the example draws with matplotlib")


def load(path: Path):
    spec = importlib.util.spec_from_file_location("example_" + path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")  # a script's own folder
        yield load(ROOT / "examples" / "prefill.py")


@pytest.fixture
def random_model(example, monkeypatch, tmp_path):
    """Without the shipped model, whatever is in the checkout."""
    monkeypatch.setattr(example, "MODEL", tmp_path / "none")


def run(example, tmp_path, *arguments):
    return example.main([*arguments, "--answer", "2", "--picture", str(tmp_path / "blocks.png")])


def test_random_model(example, random_model, tmp_path, capsys):
    result = run(example, tmp_path, "--length", "2048", "--density", "0.4")
    runs = result["runs"]
    assert list(runs) == ["dense", "stem", "sketch"]
    assert result["picture"].stat().st_size > 1000
    assert not result["trained"]
    assert runs["dense"].layers == 4
    for name in ("stem", "sketch"):
        assert len(runs[name].densities) == runs[name].layers == len(runs[name].attention_ms) == 4
        assert 0.3 < runs[name].computed < 0.5
        assert 0 < result["errors"][name] < 2
        assert 0 <= runs[name].seeing <= runs[name].heads == 4 * 8
    printed = capsys.readouterr().out
    for word in ("tokens", "2,048", "blocks computed", "building masks", "attention", "last logits", "answer"):
        assert word in printed


def test_keeping_everything_is_dense(example, random_model, tmp_path):
    result = run(example, tmp_path, "--length", "2048", "--density", "1", "--selector", "stem")
    assert result["errors"]["stem"] < 1e-4
    assert result["runs"]["stem"].answer == result["runs"]["dense"].answer
    assert set(result["runs"]["stem"].densities) == {1.0}


def test_dense_layers_stay_dense(example, random_model, tmp_path):
    result = run(example, tmp_path, "--length", "2048", "--selector", "sam", "--dense-layers", "0", "1")
    assert (result["runs"]["sam"].layers, len(result["runs"]["sam"].densities)) == (4, 2)


@pytest.mark.parametrize("blocks", [8, 64, 128])
@pytest.mark.parametrize("density", [0.1, 0.25, 0.5])
def test_fitted_budgets_compute_the_density(example, blocks, density):
    config = example.fitted(density, blocks)
    kept = [max(3, min(row + 1, k)) for row, k in enumerate(tpd_budget(blocks, config).tolist())]
    part = sum(min(row + 1, k) for row, k in enumerate(kept)) / (blocks * (blocks + 1) / 2)
    assert part <= density or config.k_start == 1
    assert part > density - 0.08


def test_every_selector_draws_its_own_blocks(example):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 1024, 16), torch.randn(1, 1, 1024, 16), torch.randn(1, 1, 1024, 16)
    config = example.fitted(0.5, 8)
    where = {"layout": None, "q_offset": 0, "kv_len": None, "prompt_len": None}
    kept = {
        name: block_classes(example.builder(name)(q, k, v, config, **where)) for name in ("stem", "sketch", "oracle")
    }
    assert not torch.equal(kept["stem"], kept["sketch"])
    assert not torch.equal(kept["sketch"], kept["oracle"])


def test_prompt_holds_the_sentence_and_has_the_length(example):
    tokenizer = example.ByteTokenizer()
    text = example.DOCUMENT.read_text()
    ids, value = example.prompt_ids(tokenizer, text, 5000, None, 0.5)
    read = tokenizer.decode(ids)
    assert len(ids) == 5000
    assert example.NEEDLE in read
    assert tokenizer.decode(ids[value : value + 9]).strip().startswith(example.VALUE)
    assert read.endswith(example.QUESTION)
    asked, value = example.prompt_ids(tokenizer, text, 5000, "Who?", 0.5)
    assert value is None
    assert example.VALUE not in tokenizer.decode(asked)
    assert tokenizer.decode(asked).endswith("Question: Who?\nAnswer:")


def test_a_lost_sentence_is_explained(example, tmp_path):
    options = example.parse(["--picture", str(tmp_path / "a.png")])
    logits = torch.ones(4)
    dense = example.Run("dense", logits, example.VALUE, 1.0, 0.0, attention_ms=[1.0])
    lost = [example.Run(name, logits, "12", 1.0, 0.0, [1.0], [1.0], [0.2], 3, 8) for name in ("stem", "sketch")]
    options.console = Console(record=True, width=400)
    example.present([dense, *lost], 8192, options, trained=True)
    printed = options.console.export_text()
    assert printed.count("WRONG") == 2
    assert printed.count("right") == 1
    assert printed.count("3 of 8 heads") == 2
    assert printed.count("averages all pairs") == 1


def test_errors(example, tmp_path, capsys):
    for arguments, message in (
        ([str(tmp_path / "missing.txt")], "does not exist"),
        (["--density", "0"], "--density must be in (0, 1], got 0.0"),
        (["--selector", "best"], "invalid choice: 'best'"),
    ):
        with pytest.raises(SystemExit):
            example.main(arguments)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--length must be more than"):
        example.prompt_ids(example.ByteTokenizer(), "text", 10, "Who?", 0.5)


def test_dense_runs_do_not_change_the_model(example, random_model):
    from stem_flex.integrations import hf_versions

    model, _, _ = example.load(None, torch.device("cpu"))
    assert hf_versions.implementation(model.config) == "sdpa"


def test_the_parallel_example_reads_its_arguments_before_it_waits(monkeypatch, capsys):
    """Without torchrun too: --help helps, and a start without ranks says how to start it."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_: pytest.fail("waits for the others"))
    for arguments, said in ((["--help"], "--tokens"), ([], "torchrun --nproc-per-node 2")):
        monkeypatch.setattr(sys, "argv", ["context_parallel.py", *arguments])
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / "examples" / "context_parallel.py"), run_name="__main__")
        found = capsys.readouterr()
        assert said in found.out + found.err
