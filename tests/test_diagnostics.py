"""Density, recall, output error and pictures against dense arithmetic."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

import stem_flex
from stem_flex import StemConfig, layout, stem_block_mask
from stem_flex.diagnostics import block_density, output_error, plot_block_mask, plot_heads, recall

SMALL = StemConfig(block_size=16, stride=4, schedule="fixed", k_start=2, mu=1.0, sink_blocks=1, local_blocks=1)


def make(B=2, Hq=4, Hkv=2, Lq=150, Lk=150, D=16, dtype=torch.float64):
    torch.manual_seed(0)
    return (
        torch.randn(B, Hq, Lq, D, dtype=dtype),
        torch.randn(B, Hkv, Lk, D, dtype=dtype),
        torch.randn(B, Hkv, Lk, D, dtype=dtype),
    )


def kept_tokens(mask: BlockMask, B: int, H: int) -> torch.Tensor:
    """Token pairs in listed blocks, read naively."""
    Lq, Lk = mask.seq_lengths
    block_q, block_k = mask.BLOCK_SIZE
    kept = torch.zeros(B, H, Lq, Lk, dtype=torch.bool)
    for b in range(B):
        for h in range(H):
            at = (min(b, mask.kv_num_blocks.shape[0] - 1), min(h, mask.kv_num_blocks.shape[1] - 1))
            for i in range(mask.kv_num_blocks.shape[2]):
                for counts, indices in (
                    (mask.kv_num_blocks, mask.kv_indices),
                    (mask.full_kv_num_blocks, mask.full_kv_indices),
                ):
                    if counts is not None:
                        for j in indices[at][i, : counts[at][i]].tolist():
                            rows, columns = slice(i * block_q, (i + 1) * block_q), slice(j * block_k, (j + 1) * block_k)
                            kept[b, h, rows, columns] = True
    return kept


def dense_weights(q, k, allowed):
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).masked_fill(~allowed, -torch.inf)
    return logits.softmax(-1).nan_to_num(0.0)


def structure_of(mask: BlockMask, B: int, H: int) -> torch.Tensor:
    bound = getattr(mask, "structure", mask)
    return create_mask(bound.mask_mod, B, H, *mask.seq_lengths, device="cpu")


LAYOUTS = {
    "causal": None,
    "window": layout.sliding_window(40),
    "padding": layout.padding([150, 61], side="left"),
    "documents": layout.documents([0, 33, 100, 150]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_recall_and_error_equal_dense_arithmetic(name):
    q, k, v = make()
    mask = stem_block_mask(q, k, v, SMALL, layout=LAYOUTS[name])
    allowed = structure_of(mask, 2, 4)
    weights = dense_weights(q, k, allowed)
    kept = weights * kept_tokens(mask, 2, 4)
    torch.testing.assert_close(recall(q, k, mask), kept.sum((2, 3)) / weights.sum((2, 3)))
    values = v.repeat_interleave(2, 1)
    dense = weights @ values
    sparse = (kept / kept.sum(-1, keepdim=True)).nan_to_num(0.0) @ values
    expected = (sparse - dense).norm(dim=(2, 3)) / dense.norm(dim=(2, 3))
    torch.testing.assert_close(output_error(q, k, v, mask), expected)
    given = output_error(q, k, v, sparse, mask_mod=mask.structure.mask_mod)
    torch.testing.assert_close(given, expected)


def test_measures_do_not_depend_on_the_chunk(monkeypatch):
    q, k, v = make()
    mask = stem_block_mask(q, k, v, SMALL)
    whole = recall(q, k, mask), output_error(q, k, v, mask)
    monkeypatch.setattr("stem_flex.diagnostics.measures._PAIRS_AT_ONCE", 150 * 7)
    torch.testing.assert_close(recall(q, k, mask), whole[0])
    torch.testing.assert_close(output_error(q, k, v, mask), whole[1])


def test_keep_all_loses_nothing():
    q, k, v = make(B=1)
    mask = stem_block_mask(q, k, v, SMALL, budget=100)
    assert block_density(mask) == 1.0
    torch.testing.assert_close(recall(q, k, mask), torch.ones(1, 4, dtype=torch.float64))
    assert output_error(q, k, v, mask).max() < 1e-14


@pytest.mark.parametrize("name", LAYOUTS)
def test_density_equals_counting(name):
    q, k, v = make()
    mask = stem_block_mask(q, k, v, SMALL, layout=LAYOUTS[name])
    allowed = structure_of(mask, 2, 4)
    padded = torch.nn.functional.pad(allowed, (0, 10, 0, 10)).view(2, 4, 10, 16, 10, 16)
    pairs = padded.any(5).any(3).sum()
    computed = mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()
    assert block_density(mask) == pytest.approx(float(computed / pairs))
    bare = BlockMask.from_kv_blocks(
        mask.kv_num_blocks,
        mask.kv_indices,
        mask.full_kv_num_blocks,
        mask.full_kv_indices,
        BLOCK_SIZE=mask.BLOCK_SIZE,
        mask_mod=mask.mask_mod,
        seq_lengths=mask.seq_lengths,
        compute_q_blocks=False,
    )
    assert block_density(bare) == block_density(mask)


def test_density_of_other_block_masks():
    def causal(b, h, q, kv):
        return q >= kv

    def by_head(b, h, q, kv):
        return (q >= kv) & (kv % 64 >= 16 * h)

    assert block_density(create_block_mask(causal, None, None, 300, 300, device="cpu")) == 1.0
    assert block_density(create_block_mask(by_head, 2, 3, 300, 300, device="cpu", BLOCK_SIZE=32)) == 1.0
    half = create_block_mask(causal, None, None, 512, 512, device="cpu")
    half.full_kv_num_blocks = torch.zeros_like(half.full_kv_num_blocks)
    assert block_density(half) == 4 / 10


def test_exact_mask_mod_keeps_the_structure():
    q, k, v = make()
    plain = stem_block_mask(q, k, v, SMALL)
    exact = stem_block_mask(q, k, v, SMALL, mask_mod="exact")
    assert block_density(exact) == block_density(plain) < 1
    torch.testing.assert_close(recall(q, k, exact), recall(q, k, plain))


def test_chunk_behind_a_prefix():
    q, k, v = make(Lq=40)
    mask = stem_block_mask(q, k, v, SMALL, q_offset=110)
    weights = dense_weights(q, k, structure_of(mask, 2, 4))
    kept = weights * kept_tokens(mask, 2, 4)
    torch.testing.assert_close(recall(q, k, mask), kept.sum((2, 3)) / weights.sum((2, 3)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k, v, m: block_density(3), "block_mask must be a BlockMask, got int"),
        (lambda q, k, v, m: recall(q, k, v), "block_mask must be a BlockMask, got Tensor"),
        (lambda q, k, v, m: recall(q[0], k, m), r"q must have 4 dimensions"),
        (lambda q, k, v, m: recall(q[:, :3], k, m), "k must have q's batch and head size"),
        (lambda q, k, v, m: recall(q[:, :, :50], k, m), r"block_mask must be for lengths \(50, 150\)"),
        (lambda q, k, v, m: recall(q[:1, :2], k[:1], m), "block_mask must have 1 or"),
        (lambda q, k, v, m: output_error(q, k, v, None), "sparse must be a BlockMask or an output tensor"),
        (lambda q, k, v, m: output_error(q, k, v, q[..., :3]), "sparse must be an output of shape"),
        (lambda q, k, v, m: output_error(q, k, v[:, :1], m), "v must have k's shape"),
        (lambda q, k, v, m: plot_heads(v, "x.png", title=""), "values must be"),
    ],
)
def test_errors_name_the_argument(call, message):
    q, k, v = make()
    mask = stem_block_mask(q, k, v, SMALL)
    with pytest.raises((TypeError, ValueError), match=message):
        call(q, k, v, mask)


def test_pictures(tmp_path):
    image = pytest.importorskip("matplotlib.image", reason="matplotlib is not installed")
    q, k, v = make()
    mask = stem_block_mask(q, k, v, SMALL)
    for index, options in enumerate(({}, {"heads": [3], "batch": 1, "config": SMALL, "title": "one head"})):
        path = plot_block_mask(mask, tmp_path / f"{index}.png", **options)
        assert image.imread(path).std() > 0.05
    heat = plot_heads(recall(q, k, mask), tmp_path / "heads.png", title="recall")
    assert image.imread(heat).std() > 0.05
    with pytest.raises(ValueError, match=r"heads must be in \[0, 4\)"):
        plot_block_mask(mask, tmp_path / "no.png", heads=[4])
    other = create_block_mask(mask.mask_mod, None, None, 150, 150, device="cpu")
    with pytest.raises(ValueError, match="config must be None"):
        plot_block_mask(other, tmp_path / "no.png", config=SMALL)


def test_forced_cells_are_the_sink_and_the_diagonal():
    pictures = pytest.importorskip("stem_flex.diagnostics.pictures")
    q, k, v = make(B=1)
    mask = stem_block_mask(q, k, v, SMALL)
    reader = stem_flex.diagnostics.inspection.MaskReader(mask, 1, 4)
    cells, step, density = pictures._cells(mask, reader, 0, 0, SMALL)
    assert step == 1
    assert 0 < density < 1
    forced = (cells == 4) | (cells == 5)
    expected = torch.eye(10, dtype=torch.bool)
    expected[:, 0] = True
    assert torch.equal(forced, expected)
    assert (cells.diagonal() == 4).all(), "causal diagonal blocks are partial"


def test_pictures_without_matplotlib_say_what_to_install():
    program = (
        "import sys; sys.modules['matplotlib'] = None; sys.modules['matplotlib.figure'] = None\n"
        "import torch; from stem_flex.diagnostics import plot_heads\n"
        "try: plot_heads(torch.ones(2, 2), 'x.png', title='')\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert "pip install 'stem-flex[plot]'" in done.stdout, done.stderr


def test_32k_tokens_stay_in_bounded_memory():
    """One query chunk and one head at a time: the peak grows with the chunk, not with N squared."""
    from stem_flex.diagnostics.measures import _PAIRS_AT_ONCE, _streamed

    q, k, _ = make(B=1, Hq=1, Hkv=1, Lq=32768, Lk=32768, D=8, dtype=torch.float32)
    mask = stem_flex.mask.layout_block_mask(layout.causal(), 1, 1, 32768, 32768)
    part = next(iter(_streamed(q, k, mask, None)))
    assert part.weights.numel() <= _PAIRS_AT_ONCE
