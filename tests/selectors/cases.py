"""Inputs that the selectors' tests share, and the fast path's choice as booleans."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from stem_flex import StemConfig, layout, selectors, stem_block_mask
from stem_flex.budget import Budget
from stem_flex.plumbing.tables import block_classes
from stem_flex.reference import selectors as loops
from stem_flex.selectors import Selector

CONFIG = StemConfig(block_size=16, stride=8, sink_blocks=0, local_blocks=0)

# batch, query heads, KV heads, Lq, Lk, layout, q_offset
ONE_PROMPT = {
    "aligned": (1, 2, 2, 192, 192, None, 0),
    "ragged, GQA, batch": (2, 4, 2, 171, 171, None, 0),
    "chunk": (1, 2, 1, 75, 203, None, 128),
    "chunk off the blocks": (2, 2, 1, 70, 133, None, 63),
    "offsets by batch row": (2, 2, 1, 64, 160, None, torch.tensor([96, 48], dtype=torch.int32)),
    "padded left": (2, 2, 1, 150, 150, layout.padding([101, 150]), 0),
    "padded right": (2, 2, 1, 150, 150, layout.padding([150, 87], side="right"), 0),
    "window": (1, 2, 1, 170, 170, layout.sliding_window(70), 0),
}
DOCUMENTS = {"documents": (1, 2, 1, 180, 180, layout.documents([0, 77, 90, 180]), 0)}
EVERY = ONE_PROMPT | DOCUMENTS | {"prefix": (1, 2, 1, 120, 120, layout.prefix(40), 0)}


def inputs(case: tuple, seed: int = 0, dim: int = 16, sharpness: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """float64 q, k, v of a case, with a few directions in common so that attention is not flat."""
    batch, heads, kv_heads, q_len, k_len = case[:5]
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, q_len, dim), (batch, kv_heads, k_len, dim), (batch, kv_heads, k_len, dim))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return sharpness * q + 0.3, k + 0.3, v


def chosen(name: str, case: tuple, qkv: tuple[Tensor, Tensor, Tensor], *, config: StemConfig = CONFIG,
           budget: Budget | None = None, **options) -> tuple[Tensor, StemConfig]:  # fmt: skip
    """bool (B, Hq, Qb, Kb) that the fast path keeps with a registered selector's settings, and its configuration."""
    known = selectors.get(name)
    selector = Selector(
        name, partial(known.scores, **options), known.note, known.settings, budget=budget or known.budget
    )
    mask = stem_block_mask(*qkv, config, layout=case[5], q_offset=case[6], selector=selector)
    own = {key: value for key, value in known.settings.items() if key in ("stride", "sink_blocks", "local_blocks")}
    return block_classes(mask) > 0, replace(config, **own)


def agree(name, case, rule, qkv=None, *, fast=None, config=CONFIG, budget=None, **options):
    """The fast path's choice is the loop's; says how much is kept."""
    qkv = inputs(case) if qkv is None else qkv
    kept, used = chosen(name, case, qkv, config=config, budget=budget, **(options if fast is None else fast))
    expected = loops.kept(rule, *qkv, used, layout=case[5], q_offset=case[6], **options)
    assert torch.equal(kept, expected), f"{int((kept != expected).sum())} of {kept.numel()} differ"
    return kept


def longer(case: str) -> tuple:
    """A case of ONE_PROMPT past the 256 keys up to which FlexPrefill is dense."""
    batch, heads, kv_heads, q_len, k_len, given, offset = ONE_PROMPT[case]
    if given is not None:
        given, offset = layout.padding([261, 310]), 0
    return batch, heads, kv_heads, q_len + 160, k_len + 160, given, offset
