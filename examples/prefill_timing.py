"""What examples/prefill.py measures: time and blocks of every layer's attention, by wrapping what computes it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from transformers import AttentionInterface

from stem_flex import block_density
from stem_flex.integrations import hf_attention
from stem_flex.plumbing.tables import block_classes


@dataclass
class Run:
    """What one prefill took and said; ``seeing`` counts the heads that computed the hidden sentence's block."""

    name: str
    logits: torch.Tensor
    answer: str
    seconds: float
    compile_seconds: float
    mask_ms: list[float] = field(default_factory=list)
    attention_ms: list[float] = field(default_factory=list)
    densities: list[float] = field(default_factory=list)
    seeing: int = 0
    heads: int = 0

    @property
    def layers(self) -> int:
        return len(self.attention_ms)

    @property
    def computed(self) -> float:
        """Computed part of the causal block pairs, over all layers."""
        return (sum(self.densities) + self.layers - len(self.densities)) / max(1, self.layers)


class Stopwatch:
    """Times attention and mask building by wrapping the functions that do it; keeps one layer's BlockMask.

    ``sentence``: the token whose block the last row should see, None if unknown.
    """

    def __init__(self, device: torch.device, kept_layer: int, advance: Callable[[], None], sentence: int | None = None):
        self.device, self.kept_layer, self.advance, self.sentence = device, kept_layer, advance, sentence
        self.seeing = self.heads = 0
        self.mask_ms: list[float] = []
        self.densities: list[float] = []
        self.block_mask: Any = None
        self._calls: dict[tuple[str, int], list[float]] = {}

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() * 1e3

    def mask(self, build: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            block_mask = build(*args, **kwargs)
            self.mask_ms.append(self.now() - start)
            self.densities.append(block_density(block_mask))
            if self.sentence is not None:
                last_row = block_classes(block_mask)[0, :, -1]
                self.seeing += int((last_row[:, self.sentence // block_mask.BLOCK_SIZE[1]] > 0).sum())
                self.heads += last_row.shape[0]
            if len(self.mask_ms) <= max(1, self.kept_layer):
                self.block_mask = block_mask
            return block_mask

        return timed

    def attention(self, attend: Callable, kind: str) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            query = next(x for x in args if torch.is_tensor(x) and x.dim() == 4)
            if query.shape[2] == 1:  # decode
                return attend(*args, **kwargs)
            start = self.now()
            out = attend(*args, **kwargs)
            # one BlockMask for all heads is another compilation than one of each head's own
            heads = args[3].kv_num_blocks.shape[1] if kind == "sparse" else 0
            self._calls.setdefault((kind, heads), []).append(self.now() - start)
            self.advance()
            return out

        return timed

    @property
    def attention_ms(self) -> list[float]:
        """Time of every layer, without the compilation that the first compiled call of a kind waits for."""
        return [ms for calls in self._calls.values() for ms in (calls if len(calls) == 1 else _steady(calls))]

    @property
    def compile_ms(self) -> float:
        """What the first calls took beyond the others."""
        return sum(sum(calls) - sum(_steady(calls)) for calls in self._calls.values() if len(calls) > 1)

    @contextmanager
    def installed(self, build: Callable) -> Iterator[None]:
        """Wrap while the block runs; ``build`` makes the BlockMasks."""
        sdpa = AttentionInterface._global_mapping["sdpa"]
        with ExitStack() as stack:
            for name, wrapped in (
                ("stem_block_mask", self.mask(build)),
                ("sparse_prefill", self.attention(hf_attention.sparse_prefill, "sparse")),
                ("dense_causal", self.attention(hf_attention.dense_causal, "dense")),
            ):
                stack.enter_context(mock.patch.object(hf_attention, name, wrapped))
            stack.callback(AttentionInterface.register, "sdpa", sdpa)
            AttentionInterface.register("sdpa", self.attention(sdpa, "dense"))
            yield


def _steady(calls: list[float]) -> list[float]:
    usual = statistics.median(calls[1:])
    return [min(calls[0], usual), *calls[1:]]
