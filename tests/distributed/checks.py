"""What four ranks of a gloo group check together; `test_context.py` starts them and reads what they found."""

from __future__ import annotations

import json
import os
import runpy
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from stem_flex import StemConfig, attention, layout, reference, selectors, stem_attention, stem_block_mask
from stem_flex.budget import Blocks, Budget
from stem_flex.distributed import Split, agreement, balanced, context_prefill, prefill, unshard, zigzag
from stem_flex.plumbing.classes import FULL, PARTIAL
from stem_flex.plumbing.tables import block_classes

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = StemConfig(block_size=16, stride=4, schedule="fixed", k_start=3, sink_blocks=1, local_blocks=1)


@cache
def pair() -> dist.ProcessGroup:
    """The first two ranks as a group of their own."""
    return dist.new_group([0, 1])


def qkv(B: int = 2, Hq: int = 4, Hkv: int = 2, L: int = 333, D: int = 8, Lk: int | None = None, Dv: int | None = None):
    """The same whole q, k, v on every rank."""
    generator = torch.Generator().manual_seed(L)
    shapes = ((B, Hq, L, D), (B, Hkv, Lk or L, D), (B, Hkv, Lk or L, Dv or D))
    return tuple(torch.randn(shape, generator=generator).add(0.2) for shape in shapes)


class Seen:
    """Masks that context_prefill made on this rank, attention under them evaluated pair by pair."""

    def __init__(self) -> None:
        self.masks: list[Any] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, *, scale=None, return_lse=False, **other: Any):
        self.masks.append(mask)
        out, lse = reference.masked_attention(q, k, v, tokens(mask), scale=scale)
        return (out.to(q.dtype), lse.float()) if return_lse else out.to(q.dtype)


@contextmanager
def exactly(attend: Any):
    """Attention by ``attend`` in place of a compiled kernel."""
    before, prefill.sparse_prefill = prefill.sparse_prefill, attend
    try:
        yield attend
    finally:
        prefill.sparse_prefill = before


def tokens(mask: Any) -> Tensor:
    """The pairs that a BlockMask computes, bool (B, H, Lq, Lk)."""
    (Lq, Lk), (rows, columns) = mask.seq_lengths, mask.BLOCK_SIZE
    classes = block_classes(mask)
    b, h, i, j = (torch.arange(n).view(-1, *(1,) * (3 - at)) for at, n in enumerate((*classes.shape[:2], Lq, Lk)))
    listed = classes[:, :, torch.arange(Lq) // rows][..., torch.arange(Lk) // columns]
    return (listed == FULL) | ((listed == PARTIAL) & mask.mask_mod(b, h, i, j))


def kept(mask: Any) -> Tensor:
    return block_classes(mask) > 0


def same(q, k, v, config, split: Split, group=None, *, key_split: Split | None = None, **options) -> None:
    """This rank's part is that of one card: block lists equal, output within rounding."""
    rank = dist.get_rank(group)
    keys = split if key_split is None else key_split
    own = split.shard(q, rank), keys.shard(k, rank), keys.shard(v, rank)
    with exactly(Seen()) as seen:
        out = context_prefill(*own, config, split=split, key_split=key_split, group=group, **options)
    scale = options.pop("scale", None)
    whole = stem_block_mask(q, k, v, config, **options)
    block = whole.BLOCK_SIZE[0]
    rows = [slice(start // block, -(-end // block)) for start, end in split.ranges[rank]]
    assert len(seen.masks) == len(rows)
    for mask, part in zip(seen.masks, rows, strict=True):
        assert torch.equal(kept(mask), kept(whole)[:, :, part])
    exact, _ = reference.masked_attention(q, k, v, tokens(whole), scale=scale)
    assert isinstance(out, Tensor)
    assert (out - split.shard(exact, rank)).abs().max() < 1e-5
    gathered = unshard(out, split, group=group)
    assert (gathered - exact).abs().max() < 1e-5


def check_ragged_lengths_and_gqa(rank: int, world: int) -> None:
    for length, Hq, Hkv in ((64, 4, 2), (65, 7, 1), (333, 3, 3), (512, 4, 2)):
        q, k, v = qkv(1, Hq, Hkv, length, Dv=4)
        for split in (zigzag(length, world, 16), balanced(length, world, SMALL)):
            same(q, k, v, SMALL, split)


def check_two_ranks_of_four(rank: int, world: int) -> None:
    group = pair()
    if rank < 2:
        for length in (40, 333):
            same(*qkv(L=length), SMALL, balanced(length, 2, SMALL), group, scale=0.5)


def check_value_statistics_are_the_whole_prompts(rank: int, world: int) -> None:
    q, k, v = qkv(1, L=480)
    v[:, :, 300:] *= 50
    config = StemConfig(**{**vars(SMALL), "value_weight": 3.0})
    same(q, k, v, config, zigzag(480, world, 16))
    same(q, k, v, StemConfig(**{**vars(config), "metric": "log", "block_size": (32, 16)}), zigzag(480, world, 32))


def check_layouts(rank: int, world: int) -> None:
    length = 333
    q, k, v = qkv(L=length)
    split = balanced(length, world, SMALL)
    distance = layout.from_mask_mod(lambda b, h, i, j: (i >= j) & (i - j < 40 * (h + 1)), None, 4, length, length)
    for structure in (
        layout.documents([0, 100, 101, 250, length]),
        layout.documents(ids=torch.arange(length)[None].expand(2, -1) // torch.tensor([[50], [333]])),
        layout.padding([300, 90], "left"),
        layout.padding([300, 90], "right") & layout.sliding_window(64),
        layout.prefix(70),
        layout.full(),
        distance,
    ):
        same(q, k, v, SMALL, split, layout=structure)
    same(q, k, v, SMALL, split, kv_len=torch.tensor([200, 333]))


def check_chunks_over_a_cache(rank: int, world: int) -> None:
    q, k, v = qkv(L=400)
    first, second = balanced(160, world, SMALL, prompt_len=400), balanced(240, world, SMALL, q_offset=160)
    cut = [x[:, :, :160] for x in (q, k, v)]
    same(*cut, SMALL, first, prompt_len=400)
    same(q[:, :, 160:], k, v, SMALL, second, key_split=first.then(second), q_offset=160, prompt_len=400)


def check_budgets_and_selectors(rank: int, world: int) -> None:
    length = 333
    q, k, v = qkv(L=length)
    split = zigzag(length, world, 16)
    by_row = torch.arange(1, 22, dtype=torch.int32)

    class Threshold(Budget):
        needs_scores = True

        def counts(self, bound, config, batch, heads, scores=None):
            return (scores > scores.amax(-1, keepdim=True) - 0.02).sum(-1, dtype=torch.int32).clamp(min=1)

    for budget in (2, by_row, by_row.expand(2, 4, -1), Blocks(by_row), Threshold()):
        same(q, k, v, SMALL, split, budget=budget)
    for name in ("sam", "sketch", selectors.get("oracle")):
        same(q, k, v, SMALL, split, selector=name)


def check_the_example(rank: int, world: int) -> None:
    """Compiled attention too: every other check evaluates masks pair by pair."""
    if rank < 2:
        example = runpy.run_path(str(ROOT / "examples" / "context_parallel.py"))
        difference = example["main"](tokens=300, group=pair())
        assert difference < 1e-5


def check_lse(rank: int, world: int) -> None:
    q, k, v = qkv(L=200)
    split = zigzag(200, world, 16)
    before, prefill.choose = prefill.choose, lambda *args, **options: None  # no CPU kernel gives an lse
    try:
        with exactly(Seen()):
            _, lse = context_prefill(*(split.shard(x, rank) for x in (q, k, v)), SMALL, split=split, return_lse=True)
    finally:
        prefill.choose = before
    _, exact = reference.stem_attention(q, k, v, SMALL, return_lse=True)
    torch.testing.assert_close(lse, split.shard(exact, rank).float())


def check_the_benchmark(rank: int, world: int) -> None:
    from bench import distributed as bench

    out = Path(os.environ["RANKS_FOLDER"]) / "bench"
    before, attention.sparse_prefill = attention.sparse_prefill, Seen()
    try:
        with exactly(Seen()):
            rows = bench.main(
                "--no-cuda --tensor 128 --context 520 --heads 4 --kv-heads 4 --dim 8 --dtype fp32 --repeats 1 "
                f"--seconds 0 --out {out}".split()
            )
    finally:
        attention.sparse_prefill = before
    assert not [row["error"] for row in rows if "error" in row]
    assert [row["mode"] for row in rows] == ["tensor", "context"]
    assert rows[1]["parallel"]["rows_with_other_blocks"] == 0
    assert sum(rows[1]["parallel"]["rows"]) == 520
    if rank == 0:
        told = json.loads((out / "distributed.json").read_text())["a_rank_fails"]["errors"]
        assert all("q must have the 4096 rows that rank 3 holds of 16384, got 4095" in text for text in told)


# -- DTensors -------------------------------------------------------------------------------------------------------


def check_dtensors_spread_by_heads(rank: int, world: int) -> None:
    q, k, v = qkv(2, 8, 4, 150, Dv=4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "heads"))
    padded = layout.padding([150, 90])
    whole = stem_block_mask(q, k, v, SMALL, layout=padded)
    exact = reference.masked_attention(q, k, v, tokens(whole))[0]
    before, attention.sparse_prefill = attention.sparse_prefill, Seen()
    try:
        for placements in ([Replicate(), Shard(1)], [Shard(1), Shard(1)], [Replicate(), Replicate()]):
            spread = [distribute_tensor(x, mesh, placements) for x in (q, k, v)]
            mask = stem_block_mask(*spread, SMALL, layout=padded)
            out = stem_attention(*spread, SMALL, layout=padded)
            assert out.placements == tuple(placements)
            assert out.shape == exact.shape
            ways = placements.count(Shard(1))
            first = mesh.get_local_rank(1) if ways == 1 else 2 * mesh.get_local_rank(0) + mesh.get_local_rank(1)
            heads = slice(first * 8 // 2**ways, (first + 1) * 8 // 2**ways) if ways else slice(None)
            assert torch.equal(kept(mask), kept(whole)[:, heads])
            assert (out.full_tensor() - exact).abs().max() < 1e-5
    finally:
        attention.sparse_prefill = before


def check_other_dtensors_are_refused(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (4,))
    q, k, v = qkv(4, 8, 4, 64)

    def spread(*placements: Any, tensors: Any = (q, k, v)) -> list[Any]:
        return [distribute_tensor(x, mesh, [p]) for x, p in zip(tensors, placements * 3, strict=False)]

    few = spread(Shard(1), tensors=(q, k[:, :2], v[:, :2]))
    each = {"budget": torch.ones(8, 4, dtype=torch.int32)}
    by_head = layout.from_mask_mod(lambda b, h, i, j: i - j < 9 * (h + 1), None, 8, 64, 64)
    for error, message, tensors, options in (
        (ValueError, r"spread by heads.* got S\(2\).*context_prefill", spread(Shard(2)), {}),
        (ValueError, r"spread by heads.* got S\(0\).*to_local", spread(Shard(0)), {}),
        (ValueError, r"spread by heads.* got S\(3\).*redistribute", spread(Shard(3)), {}),
        (ValueError, "k must be placed as q is", spread(Shard(1), Replicate(), Shard(1)), {}),
        (TypeError, "v must be a DTensor as the others are, got Tensor", [*spread(Shard(1))[:2], v], {}),
        (ValueError, "k must have a multiple of the mesh's 4 ranks as heads, got 2", few, {}),
        (ValueError, "layout must not tell heads apart", spread(Shard(1)), {"layout": by_head}),
        (ValueError, "budget must not tell heads apart", spread(Shard(1)), each),
    ):
        for call in (stem_block_mask, stem_attention):
            with pytest.raises(error, match=message):
                call(*tensors, SMALL, **options)
    with pytest.raises(ValueError, match="score_mod must not tell heads apart"):
        stem_attention(*spread(Shard(1)), SMALL, score_mod=lambda score, b, h, i, j: score * h)
    partial = [DTensor.from_local(x, mesh, [Partial()]) for x in (q, k, v)]
    with pytest.raises(ValueError, match=r"got P.*redistribute to Shard\(1\)"):
        stem_attention(*partial, SMALL)
    split = zigzag(64, world, 16)
    with pytest.raises(TypeError, match="q must be a plain tensor here, got a DTensor"):
        context_prefill(*spread(Shard(2)), SMALL, split=split)


# -- a rank that fails ----------------------------------------------------------------------------------------------


def wrong(rank: int, at: int, own: Any, error: type, message: str, **options: Any) -> None:
    """Rank ``at`` raises ``error``, all others a RuntimeError that tells of it."""
    expected, match = (error, message) if rank == at else (RuntimeError, rf"rank {at}: {error.__name__}: {message}")
    with pytest.raises(expected, match=match):
        context_prefill(*own, SMALL, timeout=30, **options)


def check_one_ranks_wrong_arguments_are_every_ranks_error(rank: int, world: int) -> None:
    q, k, v = qkv(L=200)
    split = zigzag(200, world, 16)
    own = [split.shard(x, rank) for x in (q, k, v)]
    short = [own[0][:, :, 1:], *own[1:]] if rank == 2 else own
    wrong(rank, 2, short, ValueError, "q must have the 48 rows that rank 2 holds of 200, got 47", split=split)
    wrong(rank, 1, [None, *own[1:]] if rank == 1 else own, TypeError, "q must be a tensor, got NoneType", split=split)
    strange = 3 if rank == 3 else None
    wrong(rank, 3, own, TypeError, "layout must come from stem_flex.layout, got int", split=split, layout=strange)
    other = split if rank else zigzag(200, 2, 16)
    wrong(rank, 0, own, ValueError, "split must be over the group's 4 ranks, got 2", split=other)
    same(q, k, v, SMALL, split)


def check_ranks_that_differ_are_told_in_what(rank: int, world: int) -> None:
    split = zigzag(256, world, 16)
    own = [split.shard(x, rank) for x in qkv(L=256)]
    for name, value in (
        ("scale", 0.5),
        ("q_offset", 16),
        ("budget", 2),
        ("selector", "sam"),
        ("layout", layout.full()),
    ):
        options = {name: value} if rank == 3 else {}
        with pytest.raises(ValueError, match=f"context_prefill needs the same {name} on every rank, got .* on rank 3"):
            context_prefill(*own, SMALL, split=split, **options)
    uneven = Split(tuple(reversed(split.ranges)))
    with pytest.raises(ValueError, match=r"the same split on every rank, got 256 tokens, split .* on rank 1"):
        context_prefill(*own, SMALL, split=uneven if rank == 1 else split)
    with pytest.raises(ValueError, match="needs the same dtype on every rank"):
        unshard(own[0].double() if rank == 2 else own[0], split)


def check_a_rank_that_fails_midway_is_every_ranks_error(rank: int, world: int) -> None:
    q, k, v = qkv(L=200)
    split = zigzag(200, world, 16)
    own = [split.shard(x, rank) for x in (q, k, v)]

    def fails(*args: Any, **options: Any) -> Tensor:
        if rank == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return reference.masked_attention(*args[:3], tokens(args[3]))[0]

    with exactly(fails):
        wrong(rank, 2, own, torch.OutOfMemoryError, "CUDA out of memory", split=split)
    same(q, k, v, SMALL, split)


def check_a_rank_that_does_not_come_is_named(rank: int, world: int) -> None:
    split = zigzag(200, world, 16)
    own = [split.shard(x, rank) for x in qkv(L=200)]
    start = time.monotonic()
    if rank != 1:
        with pytest.raises(RuntimeError, match=r"ranks \[1\] did not come within 1 s, says rank"):
            context_prefill(*own, SMALL, split=split, timeout=1)
        assert time.monotonic() - start < 10
    dist.barrier()
    if rank == 1:  # late: it must not start what the others left
        with pytest.raises(RuntimeError, match=r"failed on another rank.*rank 0: it gave up waiting"):
            context_prefill(*own, SMALL, split=split, timeout=1)
    dist.barrier()
    same(*qkv(L=200), SMALL, split)


def check_words_of_a_group_that_is_gone_are_not_read(rank: int, world: int) -> None:
    split = zigzag(200, world, 16)
    before = agreement.Meeting.of(dist.group.WORLD)
    agreement._meetings.clear()  # as for a new group of the same name in the same store
    dist.barrier()
    same(*qkv(L=200), SMALL, split)
    assert agreement.Meeting.of(dist.group.WORLD).turn < before.turn


def check_what_every_rank_gets_wrong(rank: int, world: int) -> None:
    split = zigzag(200, world, 16)
    own = [split.shard(x, rank) for x in qkv(L=200)]
    for error, message, options in (
        (ValueError, "split must begin its ranges at multiples of the query block, 32", {"config": vars32()}),
        (TypeError, "split must be a Split, got int", {"split": 200}),
        (TypeError, "group must be a ProcessGroup or None, got str", {"group": "world"}),
        (ValueError, "return_lse must be False on the CPU", {"return_lse": True}),
        (ValueError, "backend='flash' needs CUDA tensors", {"backend": "flash"}),
    ):
        with pytest.raises(error, match=message):
            context_prefill(*own, **{"config": SMALL, "split": split, **options})
    with pytest.raises(ValueError, match="q, k and v must not need gradients"):
        context_prefill(own[0].requires_grad_(), *own[1:], SMALL, split=split)
    if rank >= 2:
        with pytest.raises(ValueError, match="group must hold this process"):
            context_prefill(*own, SMALL, split=split, group=pair())


def vars32() -> StemConfig:
    return StemConfig(**{**vars(SMALL), "block_size": 32})
