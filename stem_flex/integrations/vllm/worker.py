"""What vLLM's workers can be asked: ``LLM.collective_rpc("stem_flex_stats")``."""

from __future__ import annotations

from typing import Any

from stem_flex.integrations.vllm.counters import counters


class StemWorkerExtension:
    """vLLM's ``worker_extension_cls`` where none was given: its workers inherit from it."""

    def stem_flex_stats(self) -> dict[str, Any]:
        """Counts of this worker since its start, see :meth:`~.counters.Counters.read`."""
        return counters.read()
