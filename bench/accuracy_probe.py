"""What a selection loses inside the model: output error and mass by layer, blocks by head, error by position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stem_flex.plumbing.tables import block_classes
from stem_flex.select import forced_blocks
from stem_flex.selectors.oracle import block_mass

from . import attend
from .ruler import Batch

STRONG = 0.25  # attention of one token on a block that counts as strong


@dataclass
class Probe:
    """Dense attention that also measures, in every layer, what each policy would lose there.

    Attributes:
        policies: by name; all see the same dense q, k, v.
        answers: bool (B, 1, Qb, Kb), pairs of a row that predicts answer tokens and a block that holds a statement
            asked for.
        losses: by name, one dict a layer: relative L2 error of the output and attention mass kept (means over
            batch and heads), share of strong pairs that are kept, forced ones left out.
        needles: by layer, (heads, 1 + policies) counts: strong answer pairs, then those that each policy keeps.
    """

    policies: Mapping[str, attend.Sparse]
    answers: Tensor
    losses: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    needles: list[list[list[int]]] = field(default_factory=list)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        dense = attend.Dense()(layer, q, k, v, scale)
        config = next(iter(self.policies.values())).config
        mean, peak = block_mass(q, k, (config.query_block, config.key_block), scale=scale)
        strong = peak >= STRONG
        wanted = strong & self.answers
        counts = [wanted.sum((0, 2, 3))]
        forced = None
        for name, policy in self.policies.items():
            mask = policy.block_mask(q, k, v)
            kept = block_classes(mask) > 0
            if forced is None:
                bound: Any = mask.structure  # type: ignore[attr-defined]
                forced = forced_blocks(bound, bound.dense_classes(), config)
            free = strong & ~forced
            out = attend.attend(q, k, v, mask, scale)
            error = (out - dense).float().norm(dim=(2, 3)) / dense.float().norm(dim=(2, 3))
            self.losses.setdefault(name, []).append({
                "error": error.mean().item(),
                "mass": ((mean * kept).sum((2, 3)) / mean.sum((2, 3))).mean().item(),
                "strong_kept": ((free & kept).sum() / free.sum().clamp(min=1)).item(),
                "strong": int(free.sum()),
            })  # fmt: skip
            counts.append((wanted & kept).sum((0, 2, 3)))
        self.needles.append(torch.stack(counts, 1).tolist())
        return dense


def answer_pairs(batch: Batch, block: int, device: torch.device) -> Tensor:
    """bool (B, 1, Qb, Kb): rows that predict an answer token, blocks of the statements that hold the answer."""
    blocks = batch.ids.shape[1] // block
    pairs = torch.zeros(len(batch), 1, blocks, blocks, dtype=torch.bool)
    for row, example in enumerate(batch.examples):
        first, last = (example.answer_start - 1) // block, (example.answer_start + len(example.scored) - 2) // block
        for start, end in example.asked:
            pairs[row, 0, first : last + 1, start // block : (end - 1) // block + 1] = True
    return pairs.to(device)


@torch.inference_mode()
def probe(model: Any, batch: Batch, policies: Mapping[str, attend.Sparse]) -> Probe:
    """Run ``batch`` densely and measure the policies in every layer."""
    config = next(iter(policies.values())).config
    found = Probe(policies, answer_pairs(batch, config.query_block, model.device))
    with attend.attending(found):
        model(batch.ids.to(model.device), use_cache=False, logits_to_keep=1)
    return found


@torch.inference_mode()
def divergence(
    model: Any, windows: Tensor, policies: Mapping[str, attend.Sparse], block: int
) -> dict[str, list[float]]:
    """KL divergence in nats of the next-token distributions from the dense ones, by position, mean of each block."""
    ids = windows.to(model.device)
    with attend.attending(attend.Dense()):
        dense = model(ids, use_cache=False).logits
    found = {}
    for name, policy in policies.items():
        with attend.attending(policy):
            logits = model(ids, use_cache=False).logits
        parts = []
        for rows, others in zip(dense.split(2048, 1), logits.split(2048, 1), strict=True):
            p, r = rows.float().log_softmax(-1), others.float().log_softmax(-1)
            parts.append((p.exp() * (p - r)).sum(-1))
        by_block = torch.cat(parts, 1).unflatten(1, (-1, block)).mean((0, 2))
        found[name] = by_block.tolist()
    return found
