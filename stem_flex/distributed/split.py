"""Which rows of a prompt each rank holds: two chunks each, one from the front and one from the back, as in a zigzag.

Late rows of a causal prompt see more keys than early ones, and Stem's budget decays along the prompt, so that a rank
with one row from the front for each from the back has its share of both. How long the two chunks are follows from the
blocks that the budget keeps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from stem_flex.budget import Budget, rule_of
from stem_flex.config import StemConfig
from stem_flex.layout import Layout, causal
from stem_flex.plumbing.checks import check_config, check_positive
from stem_flex.selectors import Selector, resolve

_NEAR = 0.005  # a rank's kept pairs may miss their share by this part, for the sake of equal token counts

Range = tuple[int, int]


@dataclass(frozen=True)
class Split:
    """The tokens of a prompt by rank; :func:`zigzag` and :func:`balanced` make one, the same on every rank.

    Attributes:
        ranges: for each rank the token ranges [start, end) it holds, in the order of its memory. Together they are
            every token of the prompt once.

    Raises:
        TypeError, ValueError: a rank without tokens, a token that no rank or more than one holds.
    """

    ranges: tuple[tuple[Range, ...], ...]

    def __post_init__(self) -> None:
        everything = sorted(part for own in self.ranges for part in own)
        follow = all(a[1] == b[0] for a, b in pairwise(everything))
        if not everything or everything[0][0] != 0 or not follow or any(a >= b for a, b in everything):
            raise ValueError(f"ranges must hold every token from 0 on once, in ranges [start, end), got {self.ranges}")
        empty = [rank for rank, own in enumerate(self.ranges) if not own]
        if empty:
            raise ValueError(f"ranges must give every rank tokens, got none for ranks {empty}")

    @property
    def world(self) -> int:
        """Ranks."""
        return len(self.ranges)

    @property
    def tokens(self) -> int:
        """Tokens of the whole prompt."""
        return max(end for own in self.ranges for _, end in own)

    def rows(self, rank: int) -> int:
        """Tokens of one rank."""
        return sum(end - start for start, end in self.ranges[rank])

    def positions(self, rank: int, device: torch.device | str | None = None) -> Tensor:
        """Where the rank's tokens stand in the prompt, int64 (rows,): the ``position_ids`` of a model."""
        return torch.cat([torch.arange(start, end, device=device) for start, end in self.ranges[rank]])

    def shard(self, x: Tensor, rank: int, dim: int = 2) -> Tensor:
        """The rank's rows of a tensor that holds all of them in dimension ``dim``."""
        if x.shape[dim] != self.tokens:
            raise ValueError(f"x must have the split's {self.tokens} tokens in dimension {dim}, got {tuple(x.shape)}")
        parts = [x.narrow(dim, start, end - start) for start, end in self.ranges[rank]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def then(self, chunk: Split) -> Split:
        """The split of the keys once ``chunk``, a split of the tokens that follow, stands behind in every rank's cache.

        For chunked prefill: ``key_split=first.then(second)`` with ``split=second``.
        """
        if chunk.world != self.world:
            raise ValueError(f"chunk must be split over {self.world} ranks as the tokens before, got {chunk.world}")
        first = self.tokens
        moved = [tuple((first + start, first + end) for start, end in own) for own in chunk.ranges]
        return Split(tuple(own + more for own, more in zip(self.ranges, moved, strict=True)))


def zigzag(tokens: int, world: int, block: int = 128) -> Split:
    """Cut a prompt into 2 * world chunks of equally many query blocks; rank r holds chunks r and 2 * world - 1 - r.

    Args:
        tokens: of the prompt, any number.
        world: ranks.
        block: tokens of a query block, ``config.query_block``.

    Raises:
        TypeError, ValueError: the prompt has fewer query blocks than there are ranks.
    """
    blocks = _blocks(tokens, world, block)
    each, more = divmod(blocks, 2 * world)
    edges = [0, *accumulate(each + (chunk < more) for chunk in range(2 * world))]
    chunks = list(pairwise(edges))
    return _of_blocks([(chunks[rank], chunks[2 * world - 1 - rank]) for rank in range(world)], tokens, block)


def balanced(
    tokens: int,
    world: int,
    config: StemConfig | None = None,
    *,
    layout: Layout | None = None,
    q_offset: int = 0,
    prompt_len: int | None = None,
    selector: str | Selector | None = None,
    budget: int | Tensor | Budget | None = None,
) -> Split:
    """A zigzag whose chunks are as long as it takes for every rank to keep equally many pairs of blocks.

    A row keeps its budget and the forced blocks, and no more than the layout allows, which cuts the first rows short.
    Ranks get equally many tokens too where both can be had (with two ranks they can), else the kept pairs go first.

    Where only the device knows what rows keep (rules that read scores, layouts and budgets in CUDA tensors, arbitrary
    mask_mods) this is :func:`zigzag`. Nothing waits for a device.

    Args:
        tokens: of the prompt, or of the chunk in chunked prefill.
        world: ranks.
        config, layout, prompt_len, selector, budget: as given to :func:`context_prefill`.
        q_offset: keys before the first query.

    Raises:
        TypeError, ValueError: as :func:`zigzag`, and wrong options by name.
    """
    config = check_config(config)
    selector = resolve(selector, config)
    config = selector.configured(config)
    blocks = _blocks(tokens, world, config.query_block)
    rule = rule_of(selector.budget if budget is None else budget, config)
    kept = _kept(tokens, config, causal() if layout is None else layout, rule, q_offset, prompt_len)
    if kept is None:
        return zigzag(tokens, world, config.query_block)
    assert len(kept) == blocks
    return _of_blocks(_shells(kept, world), tokens, config.query_block)


def _blocks(tokens: int, world: int, block: int) -> int:
    for name, value in (("tokens", tokens), ("world", world), ("block", block)):
        check_positive(name, value)
    blocks = -(-tokens // block)
    if blocks < world:
        raise ValueError(
            f"tokens must fill at least one query block of {block} tokens for each of the {world} ranks, "
            f"got {tokens}; use fewer ranks"
        )
    return blocks


def _of_blocks(chunks: list[tuple[Range, Range]], tokens: int, block: int) -> Split:
    """Ranges of tokens from each rank's two ranges of blocks; what is empty goes, neighbours become one."""
    ranges = []
    for front, back in chunks:
        parts = [(front[0], back[1])] if front[1] == back[0] else [front, back]
        ranges.append(tuple((a * block, min(b * block, tokens)) for a, b in parts if a < b))
    return Split(tuple(ranges))


def _kept(
    tokens: int, config: StemConfig, layout: Layout, rule: Budget, q_offset: int, prompt_len: int | None
) -> list[float] | None:
    """Blocks that each row of query blocks keeps, over all batch rows; None: only the device knows."""
    parts = layout.parts()
    given: Any = getattr(rule, "blocks", None)
    reads = layout.reads()
    if reads is None:  # a mask_mod
        return None
    on_device = any(isinstance(x, Tensor) and x.device.type != "cpu" for x in (*reads, given))
    if rule.needs_scores or on_device or any(part.sizes()[1] > 1 or _is_mask_mod(part) for part in parts):
        return None
    wide = given.shape if isinstance(given, Tensor) else ()
    heads = wide[-2] if len(wide) >= 2 else 1
    batch = max([part.sizes()[0] for part in parts] + [wide[0] if len(wide) == 3 else 1])
    bound = layout.bind(
        batch,
        heads,
        tokens,
        q_offset + tokens,
        q_offset=q_offset,
        prompt_len=prompt_len,
        block_size=(config.query_block, config.key_block),
    )
    wanted = rule.counts(bound, config, batch, heads) + config.sink_blocks + config.local_blocks
    kept = torch.minimum(wanted, (bound.hi - bound.lo)[:, None]).expand(batch, heads, -1)
    return kept.double().mean((0, 1)).tolist()


def _is_mask_mod(part: Layout) -> bool:
    return type(part).token_mask is not Layout.token_mask


def _shells(kept: list[float], world: int) -> list[tuple[Range, Range]]:
    """Each rank's front and back rows, from the outside of the prompt inwards."""
    before = torch.tensor([0.0, *accumulate(kept)], dtype=torch.float64, device="cpu")
    low, high = 0, len(kept)
    found = []
    for rank in range(world):
        others = world - rank - 1
        share = float(before[high] - before[low]) / (others + 1)
        count = _count(before, low, high, share, others)
        front = _front(before, low, high, count, share)
        found.append(((low, low + front), (high - (count - front), high)))
        low, high = low + front, high - (count - front)
    return found


def _count(before: Tensor, low: int, high: int, share: float, others: int) -> int:
    """Rows for a rank: an equal part of those left, more or fewer only where no choice of them keeps ``share``."""
    most = high - low - others  # every other rank needs a row
    if not others:
        return most

    def reach(count: int) -> tuple[float, float]:
        sums = _sums(before, low, high, count)
        return float(sums.min()), float(sums.max())

    count = max(1, min(most, round((high - low) / (others + 1))))
    fewest, largest = reach(count)
    if largest < share * (1 - _NEAR):
        return _least(lambda n: reach(n)[1] >= share, count, most)
    if fewest > share * (1 + _NEAR):
        return max(1, _least(lambda n: reach(n)[0] > share, 1, count) - 1)
    return count


def _least(holds, low: int, high: int) -> int:
    """The least number in [low, high] for which ``holds``, which stays true once it is; high if there is none."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _sums(before: Tensor, low: int, high: int, count: int) -> Tensor:
    """Kept blocks of the first n and the last ``count`` - n rows of [low, high), for n from 0 to ``count``."""
    front = before[low : low + count + 1] - before[low]
    back = before[high] - before[high - count : high + 1]
    return front + back


def _front(before: Tensor, low: int, high: int, count: int, share: float) -> int:
    """How many of a rank's rows come from the front, the most even split of those that keep nearest to ``share``."""
    miss = (_sums(before, low, high, count) - share).abs()
    near = (miss <= float(miss.min()) + 1e-9 * max(1.0, share)).nonzero().flatten().tolist()
    return min(near, key=lambda n: math.fabs(n - count / 2))
