"""Stem on anybody's scores: budgets that decay along the prompt, and value magnitude in the ranking.

A trained sparse attention (DeepSeek's DSA, InfLLM-v2) brings scores of tokens or blocks of its own and keeps the same
number of keys for every query. Stem's two ideas apply to any such scores (arXiv 2603.06274): the number decays from
``keep`` to ``mu * keep`` along the prompt (TPD), and a key is worth more the larger its value vector is (OAM).
:func:`refine` does both to rows of scores, as few at a time as the caller likes; :mod:`.dsa` and :mod:`.infllm` use it.

Measured on the shipped model, not taken for granted (``python -m bench.refine``, bench/results/refine.md): the decay
saves what it promises, and rows of the first half of a prompt lose less by it than by a uniform cut of the same size (a
smaller ``keep`` with ``mu=1``). Late rows lose more, and the layers' error over a whole prompt is 1.027 [1.024, 1.029]
times the uniform cut's for DSA, 1.048 [1.039, 1.056] times for InfLLM-v2 (95 % intervals). A threshold on the method's
own mass (``budget=``, see :func:`refine`) spends a saving better: 17.1 % of DSA's tokens for 0.947 [0.945, 0.949] times
the error of a uniform cut of that size, 19.6 % of InfLLM-v2's blocks for 0.837 [0.828, 0.847] times.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import NamedTuple

import torch
from einops import rearrange, reduce
from torch import Tensor

from stem_flex.budget import Mass, row_budget
from stem_flex.config import StemConfig
from stem_flex.layout import Layout, causal
from stem_flex.plumbing.binding import BoundLayout
from stem_flex.plumbing.checks import check_config, check_positive
from stem_flex.select import order_of

UNITS = ("logit", "mass")
_EPS = 1e-6  # inside the logarithm and beside the deviation, as in stem_flex.score


class Refined(NamedTuple):
    """Rows of scores after :func:`refine`.

    Attributes:
        scores: float32 (float64 for float64 scores) (B, H, R, K), -inf where the layout allows nothing.
        counts: int32 (1 or B, 1 or H, R), what each row keeps of its allowed keys, the best first.
        allowed: bool (1 or B, 1, R, K).
    """

    scores: Tensor
    counts: Tensor
    allowed: Tensor

    def keep(self, most: int) -> Tensor:
        """The ``counts`` best allowed keys of every row, bool (B, H, R, K); no count is above ``most``.

        Ties go to the lower index, -0.0 equals 0.0, NaN comes last: as in :func:`stem_flex.select.top_blocks`, but by
        the ``most`` best of each row instead of the order of all.
        """
        return best(self.scores, self.allowed, self.counts, most)


class Saved(NamedTuple):
    """What a decaying budget saves of a prompt's constant one, from :func:`saved`.

    Attributes:
        native: pairs of a query and a key (token or block) that the constant budget computes, causality considered.
        kept: those of the decaying one.
        share: 1 - kept / native.
    """

    native: int
    kept: int
    share: float


def refine(
    scores: Tensor,
    v: Tensor,
    config: StemConfig | None = None,
    *,
    keep: int,
    size: tuple[int, int] = (1, 1),
    layout: Layout | BoundLayout | None = None,
    q_offset: int | Tensor = 0,
    prompt_len: int | Tensor | None = None,
    kv_len: int | Tensor | None = None,
    unit: str = "logit",
    magnitude: Tensor | None = None,
    budget: Mass | None = None,
) -> Refined:
    """Put Stem's value magnitude into rows of scores, and say how many keys each row keeps.

    Args:
        scores: float (B, H, R, K), of R rows of ``size[0]`` queries for all K = ceil(Lk / size[1]) keys or blocks of
            keys. Rows are independent: a prompt may come in strips of any number of rows.
        v: (B, Hkv, Lk, Dv). H is a multiple of Hkv or divides it: heads that share a score are one long vector.
        config: ``value_weight``, ``metric``, ``stride`` (:func:`key_magnitude`), ``mu`` and ``schedule``
            (:func:`decayed_budget`); the rest is not looked at. None means ``StemConfig()``.
        keep: what the method keeps of every row without Stem, in units of ``size[1]`` tokens.
        size: tokens of a row and of a key.
        layout: None (causal), or any layout that gives each query one interval of keys. Or one that :func:`bind_rows`
            bound, which brings the three lengths below with it.
        q_offset: keys before the first of these rows, int or int (B,).
        prompt_len: tokens of the whole prompt, which budgets follow, int or int (B,). None: all valid ones of v.
        kv_len: valid keys of v, int or int (B,). None: all.
        unit: "logit": scores are logarithms of attention up to a constant, and the weighted magnitude is added.
            "mass": they are attention, and are multiplied by its exponential, which leaves 0 and +inf as they are.
        magnitude: :func:`key_magnitude` of v, computed once for all strips. None: computed here.
        budget: of what the decay leaves, a row keeps only the keys whose own share of attention exceeds
            ``budget.threshold``, at least ``floor`` and at most ``cap`` of them. The share is the score itself
            (``unit="mass"``) or the softmax of the row's scores ("logit"), without the magnitude. With ``mu=1`` it
            alone decides what is saved, and spends it on the rows that need it.

    Raises:
        TypeError, ValueError: naming the argument, what was expected, what came, and the fix.
    """
    config = check_config(config)
    _check(scores, v, keep, size, unit, budget)
    if isinstance(layout, BoundLayout):
        bound = layout
    else:
        rows = scores.shape[2]
        bound = bind_rows(
            scores, v, layout, rows=rows, size=size, q_offset=q_offset, prompt_len=prompt_len, kv_len=kv_len
        )
    if bound.q_blocks != scores.shape[2] or bound.block_size != tuple(size):
        raise ValueError(
            f"layout must be bound to the {scores.shape[2]} rows of scores and size {size}, got {bound.q_blocks} of "
            f"{bound.block_size}; bind it anew"
        )
    counts = decayed_budget(bound.position, bound.prompt_blocks, config, keep=keep)[:, None]
    scores = scores.detach() if scores.dtype == torch.float64 else scores.detach().float()
    allowed = bound.allowed()
    if budget is not None:
        counts = torch.minimum(counts, _by_mass(scores, allowed, budget, unit))
    if config.value_weight:
        given = key_magnitude(v, config, bound, heads=scores.shape[1]) if magnitude is None else magnitude
        bonus = config.value_weight * given[:, :, None].to(scores.dtype)
        scores = scores + bonus if unit == "logit" else scores * bonus.exp()
    return Refined(scores.masked_fill(~allowed, -math.inf), counts, allowed)


def _by_mass(scores: Tensor, allowed: Tensor, budget: Mass, unit: str) -> Tensor:
    """Keys of each row whose share of attention exceeds the budget's threshold, (B, H, R)."""
    shares = scores.masked_fill(~allowed, -math.inf)
    if unit == "logit":
        shares = shares.softmax(-1).nan_to_num(0.0)  # NaN where a row is allowed nothing
    return (shares > budget.threshold).sum(-1, dtype=torch.int32).clamp(min=budget.floor, max=budget.cap)


def bind_rows(
    scores: Tensor,
    v: Tensor,
    layout: Layout | None,
    *,
    rows: int,
    size: tuple[int, int],
    q_offset: int | Tensor,
    prompt_len: int | Tensor | None,
    kv_len: int | Tensor | None,
) -> BoundLayout:
    """``layout`` (None: causal) for ``rows`` rows and the keys of v, as blocks of ``size`` tokens.

    Of ``scores``, (B, H, ...), only the batch, the heads and the device count.

    Raises:
        TypeError, ValueError: no layout, or one that is no interval of keys for each query.
    """
    layout = causal() if layout is None else layout
    if not isinstance(layout, Layout):
        raise TypeError(f"layout must come from stem_flex.layout or be None, got {type(layout).__name__}")
    sizes = scores.shape[0], scores.shape[1], rows * size[0], v.shape[2]
    bind = functools.partial(
        layout.bind, *sizes, q_offset=q_offset, kv_len=kv_len, block_size=size, device=scores.device
    )
    bound = bind(prompt_len=prompt_len)
    if bound.classes is not None:
        raise ValueError("layout must give each query one interval of keys, got a mask of its own; use a built-in one")
    documents = any(part.document_spans() is not None for part in layout.parts())
    if prompt_len is None and not documents:  # strips and chunks alike follow all the keys there are
        start, end = bound.key_start, bound.key_end
        bound = bind(prompt_len=v.shape[2] if start is None or end is None else end - start)
    return bound


def best(scores: Tensor, allowed: Tensor, counts: Tensor, most: int) -> Tensor:
    """The ``counts`` best allowed entries of each row, see :meth:`Refined.keep`; nothing waits for the device."""
    order = order_of(scores, allowed)
    top = order.topk(min(most, order.shape[-1]), dim=-1).values
    last = (counts.clamp(min=1, max=top.shape[-1]) - 1).long().expand(order.shape[:-1])[..., None]
    least = top.gather(-1, last)
    above, equal = order > least, order == least
    room = counts[..., None] - above.sum(-1, keepdim=True, dtype=torch.int32)
    return (above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))) & allowed


def decayed_budget(position: Tensor, prompt: Tensor, config: StemConfig, *, keep: int) -> Tensor:
    """Keys kept by the row at ``position`` of a prompt of ``prompt`` keys, elementwise; at least 1.

    With ``config.schedule="paper"`` ceil(keep - keep (1 - mu) position / prompt): the decay begins with the first
    row, as in the paper. Of n >= 2 keep keys, with r = keep / n, it saves at least (1 - mu) (1 - r^2) / (2 - r) of all,
    which is (1 - mu) / 2 or more, but for the half key a row that rounding up keeps (:func:`saved` counts). Any other
    schedule stands for the operator's: rows below ``keep`` have it all, and the decay goes from there to the end
    (:func:`stem_flex.tpd_budget` with ``schedule="fixed"``).

    Args:
        position, prompt: int, the same shape, in keys.
        keep: the budget of the first rows, an int of at least 1.

    Returns:
        int32, the shape of ``position``, between 1 and ``keep``.
    """
    check_positive("keep", keep)
    if config.schedule != "paper":
        return row_budget(position, prompt, replace(config, schedule="fixed", k_start=keep))
    gone = keep * (1 - config.mu) * position.double() / prompt.double().clamp(min=1)
    return torch.ceil(keep - gone).clamp(min=1, max=keep).int()


def saved(prompt_len: int, config: StemConfig | None = None, *, keep: int, key_size: int = 1, floor: int = 0) -> Saved:
    """Exactly what Stem's decay saves of a causal prompt of ``prompt_len`` tokens, over every query token.

    Args:
        keep: the constant budget, in keys of ``key_size`` tokens; both budgets are cut to what causality leaves.
        floor: keys that are kept whatever the budget says.
    """
    check_positive("prompt_len", prompt_len)
    position = torch.arange(prompt_len, device="cpu") // key_size
    prompt = torch.full_like(position, -(-prompt_len // key_size))
    counts = decayed_budget(position, prompt, check_config(config), keep=keep).clamp(min=floor)
    native = int((position + 1).clamp(max=max(keep, floor)).sum())
    kept = int(torch.minimum(position + 1, counts).sum())
    return Saved(native, kept, 1 - kept / native)


def key_magnitude(v: Tensor, config: StemConfig, bound: BoundLayout, *, heads: int) -> Tensor:
    """Stem's value magnitude of keys of ``bound.block_size[1]`` tokens, for ``heads`` heads of scores.

    ``config.metric``: "zscore": the mean over the key's groups of ``min(stride, key)`` tokens of relu(z), z the
    normalised ln of the group's largest value norm over the complete groups of that batch row and head; "log":
    max(0, ln of the key's largest value norm). For blocks this is :func:`stem_flex.score.value_magnitude`. Where
    value heads share a score, the norm is that of their vectors end to end.

    Args:
        v: (B, Hkv, Lk, Dv).
        bound: from :func:`bind_rows`; its valid keys are counted, others have magnitude 0.
        heads: a multiple of Hkv, or a divisor.

    Returns:
        float32 (float64 for float64) (B, heads, K).
    """
    key_size, keys = bound.block_size[1], bound.k_blocks
    group = min(config.stride, key_size)
    if key_size % group:
        raise ValueError(f"config.stride must divide the {key_size} tokens of a key, got {config.stride}")
    norms = v.detach().norm(dim=-1, dtype=torch.float64 if v.dtype == torch.float64 else torch.float32)
    norms = torch.where(norms.isnan(), 0.0, norms)
    if v.shape[1] > heads:
        norms = reduce(norms.square(), "b (h g) n -> b h n", "sum", h=heads).sqrt()
    token = torch.arange(v.shape[2], device=v.device)
    valid = torch.ones_like(token, dtype=torch.bool)[None]
    if bound.key_start is not None and bound.key_end is not None:
        valid = (token >= bound.key_start[:, None]) & (token < bound.key_end[:, None])
    norms = torch.nn.functional.pad(norms * valid[:, None], (0, keys * key_size - v.shape[2]))
    if config.metric == "log":
        found = reduce(norms, "b h (k t) -> b h k", "max", k=keys).log().clamp(min=0)
    else:
        count = torch.nn.functional.pad(valid, (0, keys * key_size - v.shape[2]))
        count = reduce(count.double(), "b (g t) -> b 1 g", "sum", t=group)
        z = _standardised(reduce(norms, "b h (g t) -> b h g", "max", t=group), count, group)
        found = rearrange(z.relu(), "b h (k g) -> b h k g", k=keys).mean(-1).to(norms.dtype)
    return found.repeat_interleave(heads // found.shape[1], 1)


def _standardised(largest: Tensor, count: Tensor, group: int) -> Tensor:
    """z of ln(largest) over groups that are complete; 0 for groups without a token, or where one alone is complete."""
    logs = (largest + _EPS).log().double()
    complete = (count == group).double()
    number = complete.sum(-1, keepdim=True)
    mean = (logs * complete).sum(-1, keepdim=True) / number.clamp(min=1)
    square = ((logs - mean).square() * complete).sum(-1, keepdim=True)
    deviation = (square / (number - 1).clamp(min=1)).sqrt()
    z = ((logs - mean) / (deviation + _EPS)).nan_to_num(nan=0.0)
    return z * ((count > 0) & (number >= 2))


def _check(scores: Tensor, v: Tensor, keep: int, size: tuple[int, int], unit: str, budget: Mass | None) -> None:
    for name, x in (("scores", scores), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dim() != 4 or not x.is_floating_point():
            expected = "(B, H, R, K)" if name == "scores" else "(B, Hkv, Lk, Dv)"
            raise ValueError(f"{name} must be floats of shape {expected}, got {x.dtype} {tuple(x.shape)}")
    check_positive("keep", keep)
    for name, tokens in zip(("size[0]", "size[1]"), size, strict=True):
        check_positive(name, tokens)
    keys = -(-v.shape[2] // size[1])
    if scores.shape[3] != keys or scores.shape[0] != v.shape[0]:
        raise ValueError(
            f"scores must have v's batch of {v.shape[0]} and {keys} keys of {size[1]} of its {v.shape[2]} tokens, got "
            f"{tuple(scores.shape)}"
        )
    heads, kv_heads = scores.shape[1], v.shape[1]
    if heads % kv_heads and kv_heads % heads:
        raise ValueError(f"scores must have a multiple or a divisor of v's {kv_heads} heads, got {heads}")
    if unit not in UNITS:
        raise ValueError(f"unit must be one of {UNITS}, got {unit!r}")
    if budget is not None and type(budget) is not Mass:
        raise TypeError(f"budget must be a stem_flex.budget.Mass or None, got {type(budget).__name__}")
