"""The threshold of a budget by mass for a wanted loss, measured on one's own model and text."""

from __future__ import annotations

import inspect
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from stem_flex.config import StemConfig
from stem_flex.integrations.hf_settings import DEFAULT_DENSE_LAYERS, layer_numbers
from stem_flex.integrations.hf_text import documents_of, front_of, windows_of
from stem_flex.plumbing.checks import check_config

__all__ = ["Calibration", "CalibrationError", "Measured", "calibrate"]

THRESHOLDS = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3)
CONFIDENCE = 0.95
_ROWS_AT_ONCE = 2048  # of logits, in float32


@dataclass(frozen=True)
class Measured:
    """One threshold at one prompt length.

    Attributes:
        threshold: of the configuration.
        length: tokens of a prompt.
        density: computed part of the allowed block pairs, the mean over the layers that ran Stem and the windows.
        loss: nats a token added to dense attention, the mean over the windows.
        low, high: confidence interval of ``loss``, Student's for the windows' paired differences.
        differences: of each window, nats a token.
    """

    threshold: float
    length: int
    density: float
    loss: float
    low: float
    high: float
    differences: tuple[float, ...]


@dataclass(frozen=True)
class Calibration:
    """What :func:`calibrate` found; ``print(calibration)`` shows the table.

    Attributes:
        config: of the largest threshold that serves every length, ready for ``hf.apply``.
        by_length: the configuration of the largest threshold that serves each length.
        rows: everything measured, by length and threshold.
        dense: nats a token of dense attention, by length.
        wanted: nats a token that were allowed.
        confidence: of the intervals.
    """

    config: StemConfig
    by_length: dict[int, StemConfig]
    rows: tuple[Measured, ...]
    dense: dict[int, float]
    wanted: float
    confidence: float

    def __str__(self) -> str:
        best = {length: config.threshold for length, config in self.by_length.items()}
        lines = table(self.rows, self.confidence, best)
        said = f"threshold={self.config.threshold:g} adds at most {self.wanted:g} nats a token at every length"
        return "\n".join([*lines, said])


class CalibrationError(ValueError):
    """No threshold reaches the wanted loss at some length.

    Attributes:
        rows: everything measured, as :attr:`Calibration.rows`.
    """

    def __init__(self, message: str, rows: tuple[Measured, ...]):
        super().__init__(message)
        self.rows = rows


def calibrate(
    model: Any,
    text: Any,
    *,
    tokenizer: Any = None,
    loss: float = 0.01,
    thresholds: Sequence[float] = THRESHOLDS,
    lengths: Sequence[int] = (8192,),
    windows: int = 8,
    config: StemConfig | None = None,
    dense_layers: Iterable[int] | Callable[[int], bool] = DEFAULT_DENSE_LAYERS,
    before: Sequence[int] | None = None,
    confidence: float = CONFIDENCE,
    every: bool = False,
    progress: bool = True,
) -> Calibration:
    """Find the largest threshold that adds no more than ``loss`` to the model's loss on ``text``.

    Thresholds are tried upwards at every length, and the first whose upper confidence limit exceeds ``loss`` ends the
    search: a sequence of tests in a fixed order, so that a recommended threshold loses more than ``loss`` with a
    probability of at most (1 - confidence) / 2, however many are tried (arXiv 2110.01052, fixed sequence testing).
    The loss is that of the second half of every window's tokens, with and without Stem on the same windows.

    Args:
        model: a transformers causal model in evaluation mode that ``hf.apply`` serves and did not prepare; it is left
            as it was.
        text: what the model is to read: a string or a list of strings (documents), or tokens, an int tensor (tokens,)
            or (documents, tokens) or a list of such (tokens,). Windows do not overlap and lie in one document.
        tokenizer: of strings.
        loss: wanted nats a token over dense attention, above 0.
        thresholds: to try, see :class:`stem_flex.budget.Mass`.
        lengths: tokens of prompts. The loss grows with the length, so give the longest you mean to serve.
        windows: at each length, 2 or more. More of them narrow the interval.
        config: with a budget by mass; its threshold is not read. None means ``StemConfig.mass()``.
        dense_layers: as for ``hf.apply``.
        before: tokens put in front of every window, such as a beginning of text, part of its length. None: what the
            tokenizer puts in front, or nothing.
        confidence: of the two-sided intervals.
        every: also measure the thresholds past the first that loses too much.
        progress: show a bar where rich is installed.

    Raises:
        ImportError: transformers is not installed: ``pip install 'stem-flex[hf]'``.
        TypeError, ValueError: naming the argument, what was expected, what came, and the fix.
        CalibrationError: no threshold reaches ``loss``: at which length, and what the best was.
    """
    config = StemConfig.mass() if config is None else check_config(config)
    tried = _checked(config, loss, thresholds, lengths, windows, confidence)
    hf = _integration(model)
    model_layers = dense_layers if callable(dense_layers) else tuple(layer_numbers(dense_layers))
    front = front_of(tokenizer) if before is None else [int(token) for token in before]
    documents = documents_of(text, tokenizer)
    prompts = {length: windows_of(documents, length, windows, front) for length in lengths}
    rows: list[Measured] = []
    dense: dict[int, float] = {}
    best: dict[int, float] = {}
    with _bar(progress, len(lengths) * (1 + len(tried)) * windows) as advance:
        for length, ids in prompts.items():
            plain = [advance(_text_loss(model, window)) for window in ids]
            dense[length] = statistics.fmean(plain)
            for threshold in tried:
                used = replace(config, threshold=threshold)
                with _applied(hf, model, used, model_layers):
                    found = [advance(_sparse_loss(hf, model, window)) for window in ids]
                row = _measured(threshold, length, plain, found, confidence)
                serves = row.high <= loss and not any(r.high > loss for r in rows if r.length == length)
                rows.append(row)
                if serves:
                    best[length] = threshold
                elif not every:
                    break
    _refuse_unreached(best, rows, loss, prompts)
    by_length = {length: replace(config, threshold=best[length]) for length in prompts}
    least = min(best.values())  # tried at every length, for all below a length's best were
    return Calibration(replace(config, threshold=least), by_length, tuple(rows), dense, loss, confidence)


def table(rows: Iterable[Measured], confidence: float, best: dict[int, float] | None = None) -> list[str]:
    """Lines of aligned text; the best threshold of a length is marked."""
    best = best or {}
    lines = [f"{'tokens':>9}  {'threshold':>9}  {'density':>7}  loss over dense, {confidence:.0%} interval"]
    for row in rows:
        mark = "  *" if best.get(row.length) == row.threshold else ""
        cells = f"{row.length:9,}  {row.threshold:9g}  {row.density:7.1%}"
        lines.append(f"{cells}  {row.loss:+.4f} [{row.low:+.4f}, {row.high:+.4f}]{mark}")
    return lines


# ---- what is asked for -------------------------------------------------------------------------------------------


def _checked(
    config: StemConfig,
    loss: float,
    thresholds: Sequence[float],
    lengths: Sequence[int],
    windows: int,
    confidence: float,
) -> list[float]:
    """The thresholds, ascending."""
    if config.budget == "tpd":
        raise ValueError("config must have a budget with a threshold, got budget='tpd'; use StemConfig.mass()")
    for name, value, most in (("loss", loss, math.inf), ("confidence", confidence, 1.0)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not 0 < value < most:
            raise ValueError(f"{name} must be above 0 and below {most:g}, got {value}")
    if not lengths or len(set(lengths)) != len(lengths):
        raise ValueError(f"lengths must be one or more different numbers of tokens, got {list(lengths)}")
    for name, value, least in (("windows", windows, 2), *(("lengths", length, 4) for length in lengths)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must hold ints, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    tried = sorted(set(thresholds))
    if not tried:
        raise ValueError("thresholds must hold one number or more, got none")
    for threshold in tried:
        replace(config, threshold=threshold)  # refuses by name
    return tried


def _integration(model: Any) -> Any:
    """``stem_flex.integrations.hf``, and the refusal of models that it can't take."""
    try:
        from stem_flex.integrations import hf, hf_versions
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("transformers"):
            raise
        raise ImportError("stem_flex.calibrate needs transformers; pip install 'stem-flex[hf]'") from error
    from transformers import AttentionInterface, PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    if model.training:
        raise ValueError("model must be in evaluation mode; call model.eval()")
    name = hf_versions.implementation(model.config.get_text_config(decoder=True))
    if "stem_flex" in getattr(AttentionInterface().get(name), "__module__", ""):
        raise ValueError(
            f"model must attend densely, got attention {name!r}, under which nothing would be dense to compare with; "
            "call stem_flex.integrations.hf.remove(model), or load it without attn_implementation"
        )
    return hf


# ---- what is measured --------------------------------------------------------------------------------------------


@contextmanager
def _applied(hf: Any, model: Any, config: StemConfig, dense_layers: Any) -> Iterator[None]:
    """The model under Stem, however short the prompt."""
    hf.apply(model, config, dense_layers=dense_layers, min_tokens=0)
    try:
        yield
    finally:
        hf.remove(model)


@torch.no_grad()
def _text_loss(model: Any, ids: Tensor) -> float:
    """Mean nats of the second half of a prompt's tokens."""
    ids = ids.to(model.device)
    scored = ids.shape[1] - ids.shape[1] // 2
    few = {"logits_to_keep": scored + 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits = model(ids, use_cache=False, **few).logits[0, -scored - 1 : -1]
    parts = zip(logits.split(_ROWS_AT_ONCE), ids[0, -scored:].split(_ROWS_AT_ONCE), strict=True)
    total = torch.stack([cross_entropy(rows.float(), said, reduction="sum").double() for rows, said in parts]).sum()
    return float(total) / scored


def _sparse_loss(hf: Any, model: Any, ids: Tensor) -> tuple[float, float]:
    """The same under Stem, and the mean density of the layers that ran it."""
    with hf.trace(density=True) as seen:
        loss = _text_loss(model, ids)
    densities = [call.density for call in seen.calls if call.path == "stem"]
    if not densities:
        raise ValueError(
            f"model must have a layer that runs Stem, its layers took the paths {sorted(seen.count())}; give fewer "
            "dense_layers, or another model: window layers are exact in any case"
        )
    return loss, statistics.fmean(densities)


def _measured(
    threshold: float, length: int, dense: list[float], found: list[tuple[float, float]], confidence: float
) -> Measured:
    differences = [sparse - plain for (sparse, _), plain in zip(found, dense, strict=True)]
    mean = statistics.fmean(differences)
    half = statistics.stdev(differences) / math.sqrt(len(differences)) * student(confidence, len(differences) - 1)
    density = statistics.fmean(density for _, density in found)
    return Measured(threshold, length, density, mean, mean - half, mean + half, tuple(differences))


def student(confidence: float, degrees: int) -> float:
    """t with P(|T| <= t) = ``confidence`` under Student's distribution (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""

    def inside(t: float) -> float:
        angle = math.atan(t / math.sqrt(degrees))
        odd = degrees % 2
        term = total = math.cos(angle) ** odd
        for step in range(2 + odd, degrees - 1, 2):
            term *= math.cos(angle) ** 2 * (step - 1) / step
            total += term
        if not odd:
            return math.sin(angle) * total
        return 2 / math.pi * (angle + (math.sin(angle) * total if degrees > 1 else 0.0))

    low, high = 0.0, 1.0
    while inside(high) < confidence:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < confidence else (low, middle)
    return high


def _refuse_unreached(best: dict[int, float], rows: list[Measured], loss: float, lengths: Iterable[int]) -> None:
    for length in lengths:
        if length in best:
            continue
        least = min((row for row in rows if row.length == length), key=lambda row: row.high)
        raise CalibrationError(
            f"loss={loss:g} is not reached at {length:,} tokens: the best is threshold={least.threshold:g}, which adds "
            f"{least.loss:+.4f} nats a token, at most {least.high:+.4f}, at a density of {least.density:.1%}; allow "
            "more loss, or give smaller thresholds, more windows or more dense_layers",
            tuple(rows),
        )


@contextmanager
def _bar(wanted: bool, total: int) -> Iterator[Callable[[Any], Any]]:
    """A function that hands its argument on and moves the bar by one window."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        wanted = False
    if not wanted:
        yield lambda found: found
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:  # pyright: ignore[reportPossiblyUnboundVariable]
        task = bar.add_task("calibrate", total=total)

        def advance(found: Any) -> Any:
            bar.advance(task)
            return found

        yield advance
