"""Every stage again, slow and dense: the oracle of the tests and the definition in code.

Plain PyTorch and Python loops, on the CPU, in float64 of whatever float dtype comes in. Nothing here is
shared with the fast path but :class:`stem_flex.StemConfig`; a layout object is read through its public
attributes. Memory is that of dense attention, so keep sequences short (a few thousand tokens).
"""

from stem_flex.reference.attention import (
    block_density,
    block_mask_of,
    compose,
    masked_attention,
    mean_corrected_attention,
    stem_attention,
    stem_block_mask,
)
from stem_flex.reference.selection import (
    block_keep,
    forced_blocks,
    oam_scores,
    rank,
    tpd_budget,
    value_magnitude,
)
from stem_flex.reference.sketch import sketch_scores
from stem_flex.reference.structure import (
    block_classes,
    dense_blocks,
    dense_mask,
    row_places,
    token_mask,
)

__all__ = [
    "block_classes",
    "block_density",
    "block_keep",
    "block_mask_of",
    "compose",
    "dense_blocks",
    "dense_mask",
    "forced_blocks",
    "masked_attention",
    "mean_corrected_attention",
    "oam_scores",
    "rank",
    "row_places",
    "sketch_scores",
    "stem_attention",
    "stem_block_mask",
    "token_mask",
    "tpd_budget",
    "value_magnitude",
]
