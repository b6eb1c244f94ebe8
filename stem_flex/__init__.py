"""Stem's block selection for FlexAttention: BlockMasks for sparse prefill, straight from q, k and v."""

from stem_flex import layout
from stem_flex.attention import explain, stem_attention
from stem_flex.budget import tpd_budget
from stem_flex.composition import compose
from stem_flex.config import StemConfig
from stem_flex.diagnostics import block_density
from stem_flex.integrations.hf_calibrate import calibrate
from stem_flex.mask import stem_block_mask
from stem_flex.score import oam_scores

__all__ = [
    "StemConfig",
    "block_density",
    "calibrate",
    "compose",
    "explain",
    "layout",
    "oam_scores",
    "stem_attention",
    "stem_block_mask",
    "tpd_budget",
]
