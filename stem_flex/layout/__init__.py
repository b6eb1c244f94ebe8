"""Structure of the attention mask: which pairs of blocks a prompt allows, known before any score.

A layout says everything about structure and nothing about sizes: those come from q and k when it is bound.
Layouts intersect with ``&``. Built once per prompt, a layout is bound once and reused by every layer.
One file of this folder a kind of layout: its constructor and what it tells `stem_flex.plumbing.binding`.

True means keep. Position ``p = q_offset + i`` is where local query ``i`` stands among the keys.
"""

from stem_flex.layout._base import And, Interval, Layout
from stem_flex.layout._block_mask import FromBlockMask, from_block_mask
from stem_flex.layout._causal import Causal, causal
from stem_flex.layout._documents import Documents, documents
from stem_flex.layout._full import Full, full
from stem_flex.layout._mask_mod import MaskMod, from_mask_mod
from stem_flex.layout._padding import Padding, padding
from stem_flex.layout._prefix import Prefix, prefix
from stem_flex.layout._sliding_window import SlidingWindow, sliding_window

__all__ = [
    "And",
    "Causal",
    "Documents",
    "FromBlockMask",
    "Full",
    "Interval",
    "Layout",
    "MaskMod",
    "Padding",
    "Prefix",
    "SlidingWindow",
    "causal",
    "documents",
    "from_block_mask",
    "from_mask_mod",
    "full",
    "padding",
    "prefix",
    "sliding_window",
]
