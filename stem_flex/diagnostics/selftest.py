"""Does a backend honour block lists? Checked once, because one that does not is dense without a word."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from stem_flex.layout import causal
from stem_flex.mask import assemble
from stem_flex.plumbing.tables import compact, table_shape

_TOKENS, _BLOCK = 512, 128


def check_block_lists(run: Callable, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Run ``run(q, k, v, block_mask)`` on 512 tokens of q's kind, once for each kind, and check what it computed.

    Equal logits make each query's output the mean of the values it kept, so a block that should have been left
    out shows. Waits for the device the first time.

    Raises:
        RuntimeError: the backend attended outside the block lists.
    """
    kind = (q.device, q.dtype, q.shape[1], k.shape[1], q.shape[3], v.shape[3])
    _check(run, kind)


@functools.cache
def _check(run: Callable, kind: tuple) -> None:
    device, dtype, heads, kv_heads, dim, value_dim = kind
    mode = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
    if mode:
        torch.cuda.set_sync_debug_mode("default")
    try:
        q = torch.zeros(1, heads, _TOKENS, dim, dtype=dtype, device=device)
        k = torch.zeros(1, kv_heads, _TOKENS, dim, dtype=dtype, device=device)
        v = torch.linspace(-1, 1, _TOKENS, dtype=torch.float32, device=device).to(dtype)[None, None, :, None]
        v = v.expand(1, kv_heads, _TOKENS, value_dim).contiguous()
        out = run(q, k, v, _own_blocks(heads, device))
        count = torch.arange(1, _BLOCK + 1, device=device)
        blocks = v[0, 0, :, 0].float().view(-1, _BLOCK)
        expected = (blocks.cumsum(1) / count).flatten()[None, None, :, None]
        if not torch.allclose(out.float(), expected.expand_as(out), atol=2e-2):
            raise RuntimeError(
                "flex_attention's FLASH kernel attended outside the block lists of a self-test; "
                "use backend='triton', or another version of flash-attn-4 or torch"
            )
    finally:
        if mode:
            torch.cuda.set_sync_debug_mode(mode)


def _own_blocks(heads: int, device: torch.device):
    """Causal attention within each block: a quarter of what the causal mask_mod alone would allow."""
    bound = causal().bind(1, heads, _TOKENS, _TOKENS, block_size=(_BLOCK, _BLOCK), device=device)
    keep = torch.eye(_TOKENS // _BLOCK, dtype=torch.bool, device=device).expand(1, heads, -1, -1)
    width, partial_columns = table_shape(bound, _TOKENS // _BLOCK)
    return assemble(compact(keep, bound.dense_classes(), width, partial_columns), bound)
