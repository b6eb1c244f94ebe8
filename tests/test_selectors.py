"""Block selectors: the registry, what each returns, the oracle against loops in float64."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from stem_flex import StemConfig, layout, selectors
from stem_flex.plumbing.implementation import installed
from stem_flex.select import select_blocks
from stem_flex.selectors import oracle

CONFIG = StemConfig(block_size=32, stride=8, sink_blocks=1, local_blocks=1)
CASES = {  # Lq, Lk, q_offset
    "whole blocks": (128, 128, 0),
    "ragged": (101, 101, 0),
    "chunk of a longer prompt": (75, 203, 128),
    "one token": (1, 1, 0),
}


@pytest.fixture
def registry(monkeypatch) -> dict[str, selectors.Selector]:
    """A copy of the registry that the test may change."""
    copy = dict(selectors._SELECTORS)
    monkeypatch.setattr(selectors, "_SELECTORS", copy)
    return copy


def allowed_pairs(Lq: int, Lk: int, q_offset: int, block: int = 32) -> Tensor:
    """bool (Qb, Kb): some query of the block sees some key of the block."""
    rows = [min(Lq, first + block) - 1 + q_offset for first in range(0, Lq, block)]
    return torch.tensor([[first <= last for first in range(0, Lk, block)] for last in rows])


# ---- every selector ----


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", selectors.names())
def test_scores_are_finite_where_allowed(name, case, make_qkv):
    """float32 (B, Hq, Qb, Kb), finite where causality allows the pair and -inf elsewhere; q, k, v unchanged."""
    Lq, Lk, q_offset = CASES[case]
    q, k, v = make_qkv(2, 4, 2, Lq, 16, Lk=Lk)
    before = [x.clone() for x in (q, k, v)]
    selector = selectors.get(name)
    scores = selector.scores(q, k, v, selector.configured(CONFIG), q_offset=q_offset)
    allowed = allowed_pairs(Lq, Lk, q_offset).expand(2, 4, -1, -1)
    assert scores.dtype == torch.float32
    assert scores.shape == allowed.shape
    assert torch.isfinite(scores[allowed]).all()
    assert (scores[~allowed] == -math.inf).all()
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))


@pytest.mark.parametrize("name", selectors.names())
def test_batch_rows_and_heads_score_alone(name, make_qkv):
    """A batch row with one KV head's queries scores as it does among others: nothing leaks."""
    q, k, v = make_qkv(2, 4, 2, 160, 16)
    selector = selectors.get(name)
    config = selector.configured(CONFIG)
    alone = selector.scores(q[1:, 2:], k[1:, 1:], v[1:, 1:], config)
    torch.testing.assert_close(alone, selector.scores(q, k, v, config)[1:, 2:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", selectors.names())
def test_scores_become_tables(name, make_qkv):
    """select_blocks keeps each row's budget of a selector's best blocks."""
    q, k, v = make_qkv(1, 2, 1, 256, 16)
    config = StemConfig(block_size=32, stride=8, sink_blocks=0, local_blocks=0)
    scores = selectors.get(name).scores(q, k, v, config)
    bound = layout.causal().bind(1, 2, 256, 256, block_size=(32, 32))
    tables = select_blocks(scores, bound, config, budget=3)
    mask = tables.block_mask(bound.mask_mod, bound.seq_lengths, bound.block_size)
    kept = (mask.kv_num_blocks + mask.full_kv_num_blocks)[0]
    best = scores.sort(dim=-1, descending=True, stable=True).indices[0, ..., :3]
    expected = [[min(3, row + 1) + (row not in best[h, row]) for row in range(8)] for h in range(2)]
    assert kept.tolist() == expected  # the own block is always kept


@pytest.mark.parametrize("name", [name for name in selectors.names() if name != "oracle"])
def test_windows_are_obeyed(name, make_qkv):
    """With a sliding window the pairs outside it are -inf, those inside finite."""
    q, k, v = make_qkv(1, 2, 1, 192, 16)
    scores = selectors.get(name).scores(q, k, v, CONFIG, layout=layout.sliding_window(40))
    row = torch.arange(6)[:, None]
    column = torch.arange(6)
    inside = (column <= row) & (column >= row - 2)  # the block's first query, at 32 I, sees keys from 32 I - 39
    inside = inside.expand(1, 2, -1, -1)
    assert torch.equal(torch.isfinite(scores), inside)


# ---- the registry ----


def test_the_parts_of_stem_are_there():
    """The published method and its parts, by their settings."""
    settings = {name: dict(selectors.get(name).settings) for name in ("sam", "sam+tpd", "oam", "stem", "stem-log")}
    assert settings == {
        "sam": {"value_weight": 0.0, "mu": 1.0},
        "sam+tpd": {"value_weight": 0.0, "mu": 0.7},
        "oam": {"mu": 1.0},
        "stem": {"mu": 0.7},
        "stem-log": {"metric": "log", "mu": 0.7},
    }
    assert selectors.get("sam").configured(CONFIG).value_weight == 0.0
    assert selectors.get("sketch").experimental
    assert not selectors.get("stem").experimental


def test_settings_change_the_scores(make_qkv):
    """Value magnitude and its two forms tell sam, oam and stem-log apart; mu alone is about budgets."""
    q, k, v = make_qkv(1, 2, 1, 192, 16)
    found = {}
    for name in ("sam", "oam", "stem", "stem-log"):
        selector = selectors.get(name)
        found[name] = selector.scores(q, k, v, selector.configured(CONFIG))
    assert torch.equal(found["oam"], found["stem"])
    assert not torch.equal(found["sam"], found["oam"])
    assert not torch.equal(found["stem-log"], found["oam"])


def test_registering(registry):
    """A new name is found, listed last and keeps its settings; a taken one is refused."""
    made = selectors.register("mine", oracle.scores, "a test", experimental=True, mu=0.9)
    assert selectors.get("mine") is made
    assert selectors.names()[-1] == "mine"
    assert made.configured(CONFIG).mu == 0.9
    with pytest.raises(ValueError, match=r"name must be a new one, got 'stem', .* choose another"):
        selectors.register("stem", oracle.scores, "again")
    with pytest.raises(ValueError, match=r"selector must be one of \[.*'stem'.*\], got 'none'"):
        selectors.get("none")


def test_a_registered_selector_joins_the_table(registry, tmp_path, monkeypatch):
    """bench.ruler and bench.accuracy take it by name, and the table of a tiny model has its row."""
    transformers = pytest.importorskip("transformers", reason="the benchmark runs transformers models")
    pytest.importorskip("matplotlib", reason="the report draws")
    from bench import accuracy, models, ruler

    def first_blocks(q, k, v, config, *, layout=None, q_offset=0):
        scores = oracle.scores(q, k, v, config, layout=layout, q_offset=q_offset)
        return torch.where(scores == -math.inf, scores, -torch.arange(scores.shape[-1]).float())

    selectors.register("first-blocks", first_blocks, "the earliest blocks")
    assert ruler.parse(["--selector", "first-blocks"]).selector == "first-blocks"
    assert "first-blocks" in accuracy.parse([]).selectors

    config = transformers.Qwen3Config(
        vocab_size=4096, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, intermediate_size=32, max_position_embeddings=2048, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(models.SHIPPED)
    tokenizer.save_pretrained(tmp_path / "model")
    text = ruler.read_corpus(tokenizer, 100_000)
    monkeypatch.setattr(ruler, "read_corpus", lambda tokenizer: text)
    accuracy.main(["--model", str(tmp_path / "model"), "--device", "cpu", "--selectors", "stem,first-blocks", "--tiny",
                   "--length", "1K", "--densities", "0.6", "--rules", "mass:0.1", "--main-only", "--out",
                   str(tmp_path)])  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "accuracy.jsonl").read_text().splitlines()]
    assert not [row for row in rows if row["section"] == "failure"]
    by_name = {row["selector"]: row for row in rows if row["section"] == "main"}
    assert set(by_name) == {"dense", "stem", "first-blocks"}
    assert by_name["stem"]["computed"] == pytest.approx(by_name["first-blocks"]["computed"], abs=0.03)
    assert by_name["stem"]["loss"] != by_name["first-blocks"]["loss"]
    (ruled,) = [row for row in rows if row["section"] == "rules"]  # Stem's scores are no mass
    assert ruled["selector"] == "first-blocks"
    assert 0 < ruled["computed"] < 0.7
    assert "| first-blocks | mass:0.1 |" in (tmp_path / "accuracy.md").read_text()


# ---- the oracle ----


def brute_force_mass(q: Tensor, k: Tensor, block: tuple[int, int], q_offset: int) -> tuple[Tensor, Tensor]:
    """Mean and largest attention mass of every block pair, one query at a time."""
    batch, heads, q_len, dim = q.shape
    k_len, group = k.shape[2], q.shape[1] // k.shape[1]
    mean = torch.zeros(batch, heads, -(-q_len // block[0]), -(-k_len // block[1]), dtype=torch.float64)
    peak = torch.zeros_like(mean)
    for b in range(batch):
        for h in range(heads):
            for i in range(q_len):
                seen = k[b, h // group, : min(k_len, i + q_offset + 1)].double()
                weights = torch.softmax(seen @ q[b, h, i].double() / math.sqrt(dim), 0)
                row = i // block[0]
                tokens = min(q_len, (row + 1) * block[0]) - row * block[0]
                for j, part in enumerate(weights.split(block[1])):
                    mean[b, h, row, j] += part.sum() / tokens
                    peak[b, h, row, j] = max(float(peak[b, h, row, j]), float(part.sum()))
    return mean, peak


MASSES = [(96, 96, 0, (32, 32)), (70, 70, 0, (32, 16)), (41, 100, 59, (16, 32)), (20, 90, 33, (16, 16))]


@pytest.mark.parametrize(("Lq", "Lk", "q_offset", "block"), MASSES)
def test_oracle_mass_is_attention(Lq, Lk, q_offset, block, make_qkv):
    """Mean and largest mass equal a loop over single queries; the mean's rows sum to 1."""
    q, k, _ = make_qkv(2, 4, 2, Lq, 16, Lk=Lk)
    mean, peak = oracle.block_mass(q, k, block, q_offset=q_offset)
    expected = brute_force_mass(q, k, block, q_offset)
    torch.testing.assert_close((mean.double(), peak.double()), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mean.sum(-1), torch.ones(mean.shape[:3]), atol=1e-5, rtol=0)


def test_oracle_scores_are_the_largest_mass(make_qkv):
    """The selector returns the largest mass where causality allows the pair."""
    q, k, v = make_qkv(1, 2, 1, 100, 16)
    scores = oracle.scores(q, k, v, CONFIG)
    expected = brute_force_mass(q, k, (32, 32), 0)[1]
    allowed = allowed_pairs(100, 100, 0).expand_as(scores)
    torch.testing.assert_close(scores[allowed].double(), expected[allowed], atol=1e-6, rtol=1e-5)


def test_oracle_errors(make_qkv):
    """What it does not serve is named."""
    q, k, v = make_qkv(1, 2, 1, 64, 16)
    with pytest.raises(ValueError, match=r"layout must be None or causal\(\) for the oracle, got"):
        oracle.scores(q, k, v, CONFIG, layout=layout.sliding_window(8))
    with pytest.raises(ValueError, match="q_offset must be an int for the oracle, got a tensor"):
        oracle.scores(q, k, v, CONFIG, q_offset=torch.zeros(1, dtype=torch.int32))


def _compiled_kernels() -> str:
    """Why the kernel can't run on CPU tensors in this process; empty where it can."""
    if not installed("triton"):
        return "the kernel needs Triton"
    from stem_flex.kernels import pool

    return "" if pool.INTERPRETED else "the kernels of this process are compiled"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("Lq", "Lk", "q_offset", "block"), MASSES)
def test_mass_kernel_is_the_loop(device, Lq, Lk, q_offset, block, make_qkv):
    """The Triton kernel, heads of a dimension that is no power of two, q strided as BSHD."""
    if device == "cpu" and (reason := _compiled_kernels()):
        pytest.skip(reason)
    q, k, _ = make_qkv(1, 4, 2, Lq, 24, Lk=Lk)
    expected = brute_force_mass(q, k, block, q_offset)
    q, k = q.transpose(1, 2).contiguous().transpose(1, 2).to(device), k.to(device)
    assert not q.is_contiguous()
    mean, peak = oracle.block_mass(q, k, block, q_offset=q_offset, impl="triton")
    torch.testing.assert_close((mean.double().cpu(), peak.double().cpu()), expected, atol=2e-6, rtol=1e-5)
