"""Stem as vLLM's attention backend CUSTOM, over FlashAttention's classes, which serve what Stem does not."""

from __future__ import annotations

from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from stem_flex.integrations.vllm.cache import gather_pages
from stem_flex.integrations.vllm.sparse import SparseBuilder, SparseImpl


class StemFlashBuilder(SparseBuilder, FlashAttentionMetadataBuilder):
    stem_own = True


class StemFlashImpl(SparseImpl, FlashAttentionImpl):
    stem_gather = staticmethod(gather_pages)


class StemFlashBackend(FlashAttentionBackend):
    """FlashAttention, and Stem for long prefill."""

    supports_kv_cache_update_bypass = False  # 0.33: prompts without a cached prefix read the keys that forward gets

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        return StemFlashImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        return StemFlashBuilder
