"""What ran sparse, how densely and how long, counted without waiting for the device."""

from __future__ import annotations

import functools
import os
import time
from collections import deque
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from stem_flex.integrations.vllm import logger

_HELP = {
    "chunks": "Prefill chunks that ran sparse",
    "tokens": "Prompt tokens that ran sparse",
    "calls": "Attention calls (chunks times layers) that ran sparse",
    "allowed": "Pairs of blocks that causality allows in those calls, all heads",
    "computed": "Pairs of blocks that those calls computed, all heads",
    "seconds": "Time of those calls, choice of blocks and gathering included",
}


class Counters:
    """Counts of this process. Computed blocks are summed on the device and read once they have arrived."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start again from zero (not what Prometheus has been told)."""
        self._host: dict[str, Any] = dict.fromkeys(_HELP, 0)
        self._told = dict(self._host)  # what Prometheus knows
        self._logged = dict(self._host)
        self._logged_at = time.monotonic()
        self._sum: Tensor | None = None
        self._copy: tuple[Any, Tensor, dict] | None = None
        self._timed: deque[tuple[Any, Any]] = deque()

    def start(self, tensor: Tensor) -> Any:
        """The beginning of sparse work on the device of ``tensor``: give it to :meth:`stop`."""
        return _event() if tensor.is_cuda else time.perf_counter()

    def stop(self, started: Any) -> None:
        """The end of sparse work."""
        if isinstance(started, float):
            self._host["seconds"] += time.perf_counter() - started
        else:
            self._timed.append((started, _event()))

    def add(self, mask: BlockMask, allowed: int, queries: int, heads: int, first_layer: bool) -> None:
        """Count one sparse call: ``allowed`` pairs of blocks a head, what ``mask`` keeps of them."""
        self._host["calls"] += 1
        self._host["allowed"] += allowed * heads
        if first_layer:
            self._host["chunks"] += 1
            self._host["tokens"] += queries
        computed = mask.kv_num_blocks.sum(dtype=torch.int64)
        if mask.full_kv_num_blocks is not None:
            computed = computed + mask.full_kv_num_blocks.sum(dtype=torch.int64)
        if self._sum is None:
            self._sum = torch.zeros((), dtype=torch.int64, device=computed.device)
        self._sum += computed

    def poll(self) -> None:
        """Tell the log and Prometheus what has arrived from the device since the last call. Never waits."""
        if self._copy is None and self._host["calls"] != self._told["calls"]:
            self._copy = self._send()
        if self._copy is not None and (self._copy[0] is None or self._copy[0].query()):
            _, value, host = self._copy
            self._copy = None
            self._tell(host | {"computed": int(value)})

    def read(self) -> dict[str, Any]:
        """Everything until now, waiting for the device.

        Returns:
            chunks, tokens, calls, allowed, computed, seconds (ints, and a float) and ``density``, computed / allowed,
            None before the first call.
        """
        if self._timed:
            torch.cuda.synchronize()
            self._elapsed()
        computed = 0 if self._sum is None else int(self._sum)
        counts = self._host | {"computed": computed}
        return counts | {"density": computed / counts["allowed"] if counts["allowed"] else None}

    def _send(self) -> tuple[Any, Tensor, dict]:
        assert self._sum is not None
        if not self._sum.is_cuda:
            return None, self._sum, dict(self._host)
        value = torch.empty((), dtype=torch.int64, device="cpu", pin_memory=True)
        value.copy_(self._sum, non_blocking=True)
        self._elapsed()
        return _event(), value, dict(self._host)

    def _elapsed(self) -> None:
        while self._timed and self._timed[0][1].query():
            started, stopped = self._timed.popleft()
            self._host["seconds"] += started.elapsed_time(stopped) / 1000

    def _tell(self, counts: dict) -> None:
        for name, metric in _metrics().items():
            metric.inc(counts[name] - self._told[name])
        self._told = counts
        now, interval = time.monotonic(), float(os.environ.get("VLLM_LOG_STATS_INTERVAL", 10))
        if now - self._logged_at < interval and self._logged["calls"]:
            return
        new = {name: counts[name] - self._logged[name] for name in _HELP}
        logger().info(
            "stem_flex: %d chunks of %d prompt tokens ran sparse, density %.1f%%, %.2f ms a layer and chunk",
            new["chunks"],
            new["tokens"],
            100 * new["computed"] / max(new["allowed"], 1),
            1000 * new["seconds"] / max(new["calls"], 1),
        )
        self._logged, self._logged_at = counts, now


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@functools.cache
def _metrics() -> dict[str, Any]:
    """Counters of prometheus_client, which vLLM depends on; their names end in ``_total``."""
    from prometheus_client import Counter

    return {name: Counter(f"stem_flex_{name}", text) for name, text in _HELP.items()}


counters = Counters()
