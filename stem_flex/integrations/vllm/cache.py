"""Keys and values of one request out of vLLM's paged cache."""

from __future__ import annotations

from torch import Tensor


def gather_pages(cache: Tensor, pages: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """K and V of FlashAttention's, Triton's and FlexAttention's cache.

    Args:
        cache: (blocks, Hkv, block, 2 D), any strides: a token's K, then its V.
        pages: int (pages,), the request's blocks in order.
        tokens: of the request, at most pages * block.

    Returns:
        k, v (1, Hkv, tokens, D): views of one copy, a token's K beside its V.
    """
    head_dim = cache.shape[3] // 2
    both = cache.transpose(0, 1).index_select(1, pages)
    both = both.view(1, cache.shape[1], -1, 2 * head_dim)[:, :, :tokens]
    return both[..., :head_dim], both[..., head_dim:]


def gather_cpu_pages(cache: Tensor, pages: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """K and V of CPU_ATTN's cache: a block's K transposed, (D, block), then its V (block, D).

    Arguments and result as in :func:`gather_pages`; k and v are copies of their own.
    """
    blocks, heads, block, width = cache.shape
    head_dim = width // 2
    both = cache.view(blocks, heads, 2, block * head_dim).transpose(0, 1).index_select(1, pages)
    k = both[:, :, 0].view(heads, -1, head_dim, block).transpose(2, 3).reshape(1, heads, -1, head_dim)
    v = both[:, :, 1].reshape(1, heads, -1, head_dim)
    return k[:, :, :tokens], v[:, :, :tokens]
