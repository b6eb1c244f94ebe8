"""Pretrained models by name; what the opt-in ones say once `python -m bench.models NAME` has fetched them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="models run by transformers")

import transformers

from bench import attend, families, models, ruler, tasks
from stem_flex import StemConfig
from stem_flex.integrations import hf

SMOLLM2 = models.CACHE / "smollm2"
absent = pytest.mark.skipif(
    not (SMOLLM2 / "config.json").exists(), reason="needs a pretrained model: python -m bench.models smollm2"
)


def fetched(test):
    """Opt in: the model must be there."""
    return pytest.mark.pretrained(absent(test))


def test_names_and_folders(tmp_path, monkeypatch):
    """The shipped model by name, a folder as it is, everything else with a way out."""
    assert models.model_folder("needle_lm") == models.model_folder(models.SHIPPED) == models.SHIPPED
    with pytest.raises(ValueError, match=r"model must be needle_lm, smollm2 or a Hugging Face folder .* got 'nothing'"):
        models.model_folder("nothing")
    monkeypatch.setattr(models, "CACHE", tmp_path)
    with pytest.raises(ValueError, match=r"must be fetched first: python -m bench\.models smollm2"):
        models.model_folder("smollm2")
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "config.json").write_text("{}")
    assert models.model_folder("smollm2") == tmp_path / "smollm2"


def test_benches_refuse_unknown_models(capsys):
    """argparse says what a model may be."""
    with pytest.raises(SystemExit):
        ruler.parse(["--model", "nothing"])
    assert "model must be needle_lm" in capsys.readouterr().err


def test_pieces_are_joined_in_order(tmp_path):
    """Pieces make the file again; wrong ones are named."""
    whole = b"GGUF" + bytes(range(256)) * 3
    pieces = []
    for i in range(3):
        pieces.append(tmp_path / str(i))
        pieces[i].write_bytes(whole[i * 300 : (i + 1) * 300])
    assert models.join(pieces, tmp_path).read_bytes() == whole
    assert models.join(pieces[:1], tmp_path) == pieces[0]
    with pytest.raises(ValueError, match="gguf must begin with b'GGUF', 1 does not"):
        models.join(pieces[1:], tmp_path)
    with pytest.raises(ValueError, match=r"gguf must be files, got .*9"):
        models.join([tmp_path / "9"], tmp_path)


def test_a_frame_is_the_chat_template():
    """A prompt in its frame spells what the template makes of the question, then the beginning of the answer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(models.SHIPPED)
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}<assistant>"
    task = families.make_task("fact_place", 3)
    frame = tasks.chat_frame(tokenizer)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    spelled = tokenizer.decode([*frame.before, *frame.tail(task.question, encode)])
    asked, begun = task.question.split("\nAnswer: ")
    assert spelled == f"<user>{asked}</><assistant>{begun}"
    assert task.lines == (f"{begun} {task.values[0]}.",)
    tokenizer.chat_template = "nothing"
    with pytest.raises(ValueError, match="chat template must hold the user's message"):
        tasks.chat_frame(tokenizer)


# ---- opt in ----


@pytest.fixture(scope="module")
def smollm2():
    """(model, tokenizer) with transformers' own attention, float32 on the CPU."""
    model = transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(SMOLLM2)


@fetched
def test_its_tokenizer(smollm2):
    """Text comes back whole, digits stand alone, the chat's marks are single tokens."""
    tokenizer = smollm2[1]
    text = "def f(x):\n    return x * 12   # één, 漢字\n\n   7"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert not [token for token in tokenizer.convert_ids_to_tokens(ids) if sum(c.isdigit() for c in token) > 1]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert len(tokenizer.encode("<|im_start|><|im_end|>")) == 2


@fetched
def test_it_reads_with_stem(smollm2):
    """hf.apply on a real model: keeping every block generates what it generates by itself, and finds the fact."""
    model, tokenizer = smollm2
    corpus = ruler.read_corpus(tokenizer, 50_000)
    example = tasks.assemble("fact_place", 1, 1000, corpus.encode, corpus.tokens, corpus.breaks, frame=corpus.frame)
    ids = torch.from_numpy(example.ids[: example.answer_start])[None]

    def generated() -> str:
        out = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        return tokenizer.decode(out[0, ids.shape[1] :])

    expected = generated()
    assert example.values[0] in expected
    hf.apply(model, StemConfig(schedule="fixed", k_start=1.0), dense_layers=(), min_tokens=0)
    with hf.trace() as seen:
        assert generated() == expected
    assert len(seen.layers("stem")) == model.config.num_hidden_layers
    hf.apply(model, StemConfig(schedule="fixed", k_start=0.6, sink_blocks=1, local_blocks=2), min_tokens=0)
    assert generated().strip()
    hf.remove(model)


@fetched
@pytest.mark.slow
def test_the_main_job_reads_with_it(monkeypatch, tmp_path):
    """examples/prefill.py FILE --model smollm2."""
    pytest.importorskip("matplotlib", reason="the example draws")
    path = Path(__file__).resolve().parent.parent / "examples" / "prefill.py"
    monkeypatch.syspath_prepend(path.parent)
    spec = importlib.util.spec_from_file_location("example_prefill_pretrained", path)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = example
    spec.loader.exec_module(example)
    arguments = [str(models.SHIPPED / "document.txt"), "--model", "smollm2", "--length", "2048", "--selector", "sketch"]
    result = example.main([*arguments, "--density", "0.6", "--picture", str(tmp_path / "blocks.png")])
    assert result["trained"]
    assert "Oslo" in result["runs"]["dense"].answer


# ---- budget rules ----


def test_a_rule_falls_as_it_falls(make_qkv):
    """A threshold that everything exceeds is dense; the measured density is the table's; the tail stays dense."""
    from stem_flex import selectors
    from stem_flex.budget import Mass
    from stem_flex.plumbing.tables import block_classes

    config = StemConfig(block_size=32, sink_blocks=1, local_blocks=1)
    q, k, v = make_qkv(2, 4, 2, 320, 16)
    sketch = selectors.get("sketch")
    everything = attend.Sparse(sketch, config, 1.0, rule=Mass(1e-30))
    everything.block_mask(q, k, v)
    assert everything.computed(320) == pytest.approx(1.0)

    some = attend.Sparse(sketch, config, 1.0, dense_tail=64, rule=Mass(0.5))
    kept = block_classes(some.block_mask(q, k, v)) > 0
    assert kept[:, :, 8:].sum((2, 3)).eq(9 + 10).all()
    assert some.computed(320) == pytest.approx(float(kept[:, :, :8].sum((2, 3)).float().mean()) / 36)
    assert 0.2 < some.computed(320) < 0.9


def test_rules_by_name():
    """own, NAME:THRESHOLD, nothing for scores that are no mass, an error for the rest."""
    from stem_flex import selectors

    sketch, stem = selectors.get("sketch"), selectors.get("stem")
    assert attend.rule_named("mass:0.05", sketch).threshold == 0.05
    assert attend.rule_named("own", stem) is None
    assert attend.rule_named("mass:0.05", stem) is None
    with pytest.raises(ValueError, match="a budget rule must be own or NAME:THRESHOLD"):
        attend.rule_named("mass", sketch)
