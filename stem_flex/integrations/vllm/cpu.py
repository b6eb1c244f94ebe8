"""Stem in the place of vLLM's CPU_ATTN, whose classes serve what Stem does not."""

from __future__ import annotations

from typing import Any

from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from stem_flex.integrations.vllm.cache import gather_cpu_pages
from stem_flex.integrations.vllm.options import asked
from stem_flex.integrations.vllm.sparse import SparseBuilder, SparseImpl

_LAYOUTS = ("vec", "vec16")  # instruction sets whose cache is laid out as gather_cpu_pages reads it


class StemCPUBuilder(SparseBuilder, CPUAttentionMetadataBuilder):
    stem_own = True

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if self.stem_settings is not None and self.isa not in _LAYOUTS:
            raise NotImplementedError(
                f"stem_flex reads the CPU's KV cache of the instruction sets {_LAYOUTS}, got {self.isa!r}"
                + ("; set dtype='float32' or 'float16'" if self.isa == "amx" else "")
            )


class StemCPUImpl(SparseImpl, CPUAttentionBackendImpl):
    stem_gather = staticmethod(gather_cpu_pages)


class StemCPUBackend(CPUAttentionBackend):
    """CPU_ATTN, and Stem where the configuration asks for it."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return StemCPUImpl if asked(get_current_vllm_config_or_none()) else CPUAttentionBackendImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return StemCPUBuilder
