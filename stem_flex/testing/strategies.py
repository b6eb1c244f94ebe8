"""Hypothesis strategies: inputs, configurations, layouts and mask_mods that find what examples miss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stem_flex import layout as layout_module
from stem_flex.config import METRICS, StemConfig

BlockSize = int | tuple[int, int]


def _strategies() -> Any:
    try:
        from hypothesis import strategies
    except ImportError as error:
        message = "stem_flex.testing's strategies need hypothesis: pip install 'stem-flex[test]'"
        raise ImportError(message) from error
    return strategies


def qkv(
    *,
    batch: tuple[int, int] = (1, 3),
    kv_heads: tuple[int, int] = (1, 2),
    groups: Sequence[int] = (1, 2, 4, 7),
    q_len: tuple[int, int] = (1, 200),
    past: tuple[int, int] = (0, 0),
    head_dims: Sequence[int] = (8, 16),
    value_dims: Sequence[int] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    ties: bool | None = None,
    device: torch.device | str = "cpu",
) -> Any:
    """Strategy of ``(q, k, v)``: q (B, Hq, Lq, D), k (B, Hkv, Lk, D), v (B, Hkv, Lk, Dv).

    Args:
        batch, kv_heads, q_len: smallest and largest size.
        groups: query heads of a key/value head.
        past: smallest and largest number of keys before the first query: Lk = Lq + past, and past is the
            ``q_offset`` to give.
        value_dims: sizes of v's last dimension, None: that of q.
        ties: True draws small integers, whose scores are exact in any float dtype and often equal; False
            draws a normal distribution whose scale varies between tokens; None draws either.
    """
    st = _strategies()

    @st.composite
    def draw_qkv(draw: Callable) -> tuple[Tensor, Tensor, Tensor]:
        B, Hkv = draw(st.integers(*batch)), draw(st.integers(*kv_heads))
        Hq = Hkv * draw(st.sampled_from(list(groups)))
        Lq = draw(st.integers(*q_len))
        Lk = Lq + draw(st.integers(*past))
        D = draw(st.sampled_from(list(head_dims)))
        Dv = D if value_dims is None else draw(st.sampled_from(list(value_dims)))
        dtype = draw(st.sampled_from(list(dtypes)))
        integers = draw(st.booleans()) if ties is None else ties
        generator = torch.Generator("cpu").manual_seed(draw(st.integers(0, 2**31 - 1)))
        shapes = ((B, Hq, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, Dv))
        q, k, v = (_values(shape, integers, generator).to(device, dtype) for shape in shapes)
        return q, k, v

    return draw_qkv()


def _values(shape: tuple[int, ...], integers: bool, generator: torch.Generator) -> Tensor:
    if integers:
        return torch.randint(-2, 3, shape, generator=generator, device="cpu").float()
    scale = torch.rand(*shape[:-1], 1, generator=generator, dtype=torch.float32, device="cpu").mul(2).exp()
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") * scale


def stem_configs(
    *,
    block_sizes: Sequence[BlockSize] = (16, 32, (32, 16), (16, 32)),
    strides: Sequence[int] = (1, 4, 8, 16, 32),
    schedules: Sequence[str] = ("fixed", "fixed", "fixed", "envelope", "operator", "paper"),
    max_blocks: int = 8,
) -> Any:
    """Strategy of :class:`StemConfig`, mostly with budgets small enough to leave blocks out.

    Args:
        strides: those that divide the drawn block size are used.
        schedules: the published ones keep everything in prompts of fewer than 55 blocks.
        max_blocks: largest k_start in blocks.
    """
    st = _strategies()

    @st.composite
    def draw_config(draw: Callable) -> StemConfig:
        size = draw(st.sampled_from(list(block_sizes)))
        smallest = size if isinstance(size, int) else min(size)
        schedule = draw(st.sampled_from(list(schedules)))
        start = st.integers(1, max_blocks) | st.floats(0.05, 1.0)
        return StemConfig(
            block_size=size,
            stride=draw(st.sampled_from([s for s in strides if smallest % s == 0])),
            metric=draw(st.sampled_from(list(METRICS))),
            value_weight=draw(st.sampled_from([0.0, 0.2, 1.0])),
            schedule=schedule,  # type: ignore[arg-type]
            k_start=draw(start) if schedule == "fixed" else None,
            mu=draw(st.floats(0.1, 1.0)),
            sink_blocks=draw(st.integers(0, 3)),
            local_blocks=draw(st.integers(0, 3)),
        )

    return draw_config()


def mask_mods(q: Tensor | None = None, k: Tensor | None = None) -> Any:
    """Strategy of mask_mods ``f(b, h, q_idx, kv_idx) -> bool`` as published collections have them.

    Causal, sliding window, prefix-LM, dilated, global tokens and window, 2-D neighbourhoods (NATTEN), windows
    that depend on the head; given q and k also a random document table and a random block table for each
    batch row and head. All may be evaluated past the lengths. Their ``__name__`` tells their parameters.
    """
    st = _strategies()

    @st.composite
    def draw_mask_mod(draw: Callable) -> Callable:
        makers = [_window, _prefix_lm, _dilated, _global_window, _natten, _head_window, _causal]
        if q is not None and k is not None:
            makers += [_document_table, _block_table]
        make = draw(st.sampled_from(makers))
        size, seed = draw(st.integers(1, 40)), draw(st.integers(0, 2**31 - 1))
        return make(size, seed, q, k)

    return draw_mask_mod()


def _named(f: Callable, name: str) -> Callable:
    f.__name__ = f.__qualname__ = name
    return f


def _causal(size: int, seed: int, q: Any, k: Any) -> Callable:
    return _named(lambda b, h, i, j: i >= j, "causal")


def _window(size: int, seed: int, q: Any, k: Any) -> Callable:
    return _named(lambda b, h, i, j: (i >= j) & (i - j < size), f"sliding_window_{size}")


def _prefix_lm(size: int, seed: int, q: Any, k: Any) -> Callable:
    return _named(lambda b, h, i, j: (j < size) | (i >= j), f"prefix_lm_{size}")


def _dilated(size: int, seed: int, q: Any, k: Any) -> Callable:
    rate = size % 5 + 2
    return _named(
        lambda b, h, i, j: (i >= j) & ((i - j) % rate == 0) & (i - j < 8 * size), f"dilated_{rate}_{8 * size}"
    )


def _global_window(size: int, seed: int, q: Any, k: Any) -> Callable:
    return _named(
        lambda b, h, i, j: (i >= j) & ((j < size) | (i < size) | (i - j < 2 * size)),
        f"global_{size}_window_{2 * size}",
    )


def _natten(size: int, seed: int, q: Any, k: Any) -> Callable:
    width, reach = size % 12 + 4, size % 3 + 1

    def natten(b: Any, h: Any, i: Any, j: Any) -> Any:
        rows, columns = i // width - j // width, i % width - j % width
        return (rows <= reach) & (rows >= -reach) & (columns <= reach) & (columns >= -reach)

    return _named(natten, f"natten_{width}_{reach}")


def _head_window(size: int, seed: int, q: Any, k: Any) -> Callable:
    return _named(lambda b, h, i, j: (i >= j) & (i - j < size * (h + 1)), f"head_window_{size}")


def _uniform(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")


def _document_table(size: int, seed: int, q: Tensor, k: Tensor) -> Callable:
    tokens = max(q.shape[2], k.shape[2])
    ids = _uniform((tokens,), seed).lt(1 / size).cumsum(0).to(q.device)
    last = tokens - 1
    return _named(lambda b, h, i, j: (ids[i.clamp(max=last)] == ids[j.clamp(max=last)]) & (i >= j), f"documents_{size}")


def _block_table(size: int, seed: int, q: Tensor, k: Tensor) -> Callable:
    (B, H, Lq, _), Lk = q.shape, k.shape[2]
    rows, columns = -(-Lq // 16), -(-Lk // 16)
    kept = _uniform((B, H, rows, columns), seed).lt(0.6).to(q.device)

    def block_table(b: Any, h: Any, i: Any, j: Any) -> Any:
        return kept[b, h, (i // 16).clamp(max=rows - 1), (j // 16).clamp(max=columns - 1)]

    return _named(block_table, "block_table_16")


def layouts(
    q: Tensor | None = None,
    k: Tensor | None = None,
    *,
    max_parts: int = 3,
    mask_mod: bool = True,
    causal_only: bool = False,
) -> Any:
    """Strategy of layouts, intersections of up to ``max_parts``.

    Without q and k only layouts that fit any sizes are drawn: causal, full, sliding window, prefix. With them
    also documents (both forms), padding on either side, mask_mods and BlockMasks.

    Args:
        q: (B, Hq, Lq, D). k: (B, Hkv, Lk, D). Only their shapes and device are used.
        mask_mod: False leaves out from_mask_mod and from_block_mask, whose class tables cost B H Lq Lk.
        causal_only: every layout drawn is causal.
    """
    st = _strategies()

    @st.composite
    def draw_layout(draw: Callable) -> Any:
        longest = 200 if k is None else k.shape[2]
        kinds = ["causal", "window", "prefix"]
        kinds += [] if causal_only else ["full"]
        if q is not None and k is not None:
            kinds += ["documents", "ids", "padding", "padding"]
            kinds += ["mask_mod", "block_mask"] if mask_mod and not causal_only else []
        drawn = layout_module.causal() if causal_only else None
        for _ in range(draw(st.integers(1, max_parts))):
            part = _part(draw, st, draw(st.sampled_from(kinds)), q, k, longest, causal_only)
            drawn = part if drawn is None else drawn & part
        return drawn

    return draw_layout()


def _part(draw: Callable, st: Any, kind: str, q: Any, k: Any, longest: int, causal_only: bool) -> Any:
    if kind == "causal":
        return layout_module.causal()
    if kind == "full":
        return layout_module.full()
    if kind == "window":
        return layout_module.sliding_window(draw(st.integers(1, longest)))
    if kind == "prefix":
        return layout_module.prefix(draw(st.integers(1, longest)))
    if kind in ("mask_mod", "block_mask"):
        return _from_mask_mod(draw, st, kind, q, k)
    B, causal = q.shape[0], causal_only or draw(st.booleans())
    if kind == "padding":
        lengths = draw(st.lists(st.integers(0, longest), min_size=B, max_size=B))
        side = draw(st.sampled_from(["left", "right"]))
        return layout_module.padding(torch.tensor(lengths, dtype=torch.int64, device=q.device), side, causal=causal)
    if kind == "documents":
        cuts = sorted(draw(st.lists(st.integers(0, longest), max_size=5)))
        bounds = torch.tensor([0, *cuts, longest], dtype=torch.int64, device=q.device)
        return layout_module.documents(bounds, causal=causal)
    rows = [sorted(draw(st.lists(st.integers(0, longest), max_size=5))) for _ in range(B)]
    tokens = torch.arange(longest, device=q.device)
    cuts = [torch.tensor(row, dtype=torch.int64, device=q.device) for row in rows]
    ids = torch.stack([torch.bucketize(tokens, row) for row in cuts])
    return layout_module.documents(ids=ids, causal=causal)


def _from_mask_mod(draw: Callable, st: Any, kind: str, q: Tensor, k: Tensor) -> Any:
    (B, H, Lq, _), Lk = q.shape, k.shape[2]
    f = draw(mask_mods(q, k))
    if kind == "mask_mod":
        return layout_module.from_mask_mod(f, B, H, Lq, Lk)
    from torch.nn.attention.flex_attention import create_block_mask

    size = draw(st.sampled_from([16, (16, 32), 64]))
    block_mask = create_block_mask(f, B, H, Lq, Lk, device=q.device, BLOCK_SIZE=size)
    return layout_module.from_block_mask(block_mask)
