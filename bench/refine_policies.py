"""How many keys each row keeps in ``python -m bench.refine``: the same for all, a decay, or by the row's own mass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from stem_flex.budget import Mass
from stem_flex.config import StemConfig
from stem_flex.selectors.refine import best, decayed_budget, refine

PLAIN = StemConfig(schedule="paper", mu=1.0, value_weight=0.0)
WEIGHTS = {"+oam": ("zscore", 0.2), "+oam log": ("log", 0.2)}
MU = {"dsa": 0.7, "infllm": 0.62}
STRIP = 64  # rows at a time
EQUAL = "uniform=mass"  # the uniform cut that keeps as many pairs of a prompt as "mass" does


@dataclass
class Policy:
    """How many keys each row keeps, and by which scores; with a ``budget``, ``counts`` is only the most."""

    name: str
    counts: Tensor
    config: StemConfig = PLAIN
    budget: Mass | None = None


@dataclass
class Method:
    """A selection: ``scores(layer, q, k, logits, rows, scale)`` of a strip, and the policies that use them."""

    name: str
    unit: str
    key_size: int
    keep: int
    floor: int
    policies: list[Policy]
    scores: Callable[..., Tensor]
    savings: dict[str, float] = field(default_factory=dict)

    def named(self, names: tuple[str, ...]) -> Method:
        """The same with these of its policies."""
        return replace(self, policies=[policy for policy in self.policies if policy.name in names])


def strips(length: int, every: int, first: int, size: int = STRIP) -> Iterator[slice]:
    """Rows of every ``every``-th strip."""
    for start in range(first * size, length, every * size):
        yield slice(start, min(length, start + size))


def uniform_counts(total: float, candidates: Tensor) -> Tensor:
    """One number for every row, with ``total`` as the sum of min(number, candidates): fractions are spread."""
    candidates = candidates.double().cpu()
    low, high = 0.0, float(candidates.max())
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if candidates.clamp(max=middle).sum().item() < total else (low, middle)
    wanted = candidates.clamp(max=high)
    return wanted.cumsum(0).round().diff(prepend=wanted.new_zeros(1)).clamp(min=1).int()


def policies(name: str, length: int, keep: int, key_size: int, floor: int) -> tuple[list[Policy], dict[str, float]]:
    """native, uniform, and decays, the cut ones at the same number of pairs; what each saves."""
    position = torch.arange(length) // key_size
    candidates = (position + 1).int()
    stem = replace(PLAIN, mu=MU[name])
    decay = decayed_budget(position, torch.full_like(position, -(-length // key_size)), stem, keep=keep)
    decay = decay.clamp(min=floor)
    uniform = uniform_counts(torch.minimum(decay, candidates).sum().item(), candidates)
    native = torch.full_like(decay, keep)
    found = [Policy("native", native), Policy("uniform", uniform), Policy("decay", decay)]
    for suffix, (metric, weight) in WEIGHTS.items():
        weighted = replace(PLAIN, metric=metric, value_weight=weight)
        found.append(Policy(f"decay{suffix}", decay, weighted))
    found.append(Policy("uniform+oam", uniform, replace(PLAIN, metric="zscore", value_weight=0.2)))
    all_pairs = torch.minimum(native, candidates).sum().item()
    savings = {p.name: 1 - torch.minimum(p.counts, candidates).sum().item() / all_pairs for p in found}
    return found, savings


def equal_cuts(found: list[Method], kept: dict[tuple[str, str], float], length: int, rows: list[slice]) -> list[Method]:
    """The methods that have "mass" with the uniform cut of its size alone.

    Args:
        kept: by method and policy, the pairs of ``rows`` that were kept, a head's and layer's mean.
        rows: those that were counted.
    """
    counted = torch.cat([torch.arange(part.start, part.stop) for part in rows])
    cuts = []
    for method in found:
        if (total := kept.get((method.name, "mass"))) is not None:
            counts = torch.zeros(length, dtype=torch.int32)
            counts[counted] = uniform_counts(total, counted // method.key_size + 1)
            like = method.policies[0].counts.device
            cuts.append(replace(method, policies=[Policy(EQUAL, counts.to(like))]))
    return cuts


def chosen(method: Method, policy: Policy, scores: Tensor, v: Tensor, rows: slice, length: int) -> Tensor:
    """The keys (tokens or blocks) a policy keeps of a strip, bool (heads, rows, keys).

    Values up to the strip's end count for z-scores, as in chunked prefill.
    """
    refined = refine(
        scores[None],
        v[:, :, : rows.stop],
        policy.config,
        keep=method.keep,
        size=(1, method.key_size),
        q_offset=rows.start,
        prompt_len=length,
        unit=method.unit,
        budget=policy.budget,
    )
    counts = policy.counts[rows] if policy.budget is None else refined.counts.clamp(min=method.floor)
    return best(refined.scores, refined.allowed, counts.to(scores.device).expand(refined.counts.shape), method.keep)[0]


def tokens(keep: Tensor, method: Method, heads: int, stop: int) -> Tensor:
    """Keys as tokens below ``stop`` and score heads as query heads; causality within a block is left to the caller."""
    keep = keep.repeat_interleave(method.key_size, -1)[..., :stop]
    return keep.repeat_interleave(heads // keep.shape[0], 0)


def best_shares(method: Method, scores: Tensor, rows: slice) -> Tensor:
    """The shares of attention of each row's ``keep`` best keys, 0 where it has fewer: (heads, rows, keep)."""
    own = torch.arange(rows.start, rows.stop, device=scores.device)[:, None] // method.key_size
    shares = scores.masked_fill(torch.arange(scores.shape[-1], device=scores.device) > own, -math.inf)
    shares = shares.softmax(-1) if method.unit == "logit" else shares
    top = shares.topk(min(method.keep, shares.shape[-1]), sorted=False).values.clamp(min=0)
    return torch.nn.functional.pad(top, (0, method.keep - top.shape[-1]))


def saving(shares: Tensor, candidates: Tensor, threshold: float, floor: int) -> float:
    """What ``Mass(threshold, floor, cap=keep)`` saves of rows with these :func:`best_shares`, (N, rows, keep)."""
    counts = (shares > threshold).sum(-1).clamp(min=floor)
    native = candidates.clamp(max=shares.shape[-1]).sum() * shares.shape[0]
    return 1 - (torch.minimum(counts, candidates).sum() / native).item()


def threshold_for(shares: Tensor, candidates: Tensor, floor: int, wanted: float) -> float:
    """The least threshold, to a part in ten thousand, that saves ``wanted``.

    Args:
        shares: (N, rows, keep), see :func:`best_shares`; N of layers and heads.
        candidates: (rows,), keys that each row may keep.

    Raises:
        ValueError: no threshold saves so much with this floor.
    """
    low, high = -30.0, 0.999 * math.log(Mass.most_share)
    if saving(shares, candidates, math.exp(high), floor) < wanted:
        raise ValueError(f"floor must leave a saving of {wanted:.1%}, got {floor} of {shares.shape[-1]}; lower it")
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if saving(shares, candidates, math.exp(middle), floor) < wanted else (low, middle)
    return math.exp(high)
