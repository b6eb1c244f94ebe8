"""What a block-sparse mask computes and what it loses: density, recall, output error, pictures.

The structural mask is what would be dense: of a mask built by :func:`stem_flex.stem_block_mask` its layout
(the mask's attribute ``structure``), of any other BlockMask the pairs that its mask_mod allows. Every measure
goes through the prompt a few hundred queries at a time, so memory stays bounded: 32K tokens take well under
1 GB beyond q, k and v. These functions read results on the host and are not for a hot path.
"""

from stem_flex.diagnostics.measures import block_density, output_error, recall
from stem_flex.diagnostics.pictures import plot_block_mask, plot_heads

__all__ = ["block_density", "output_error", "plot_block_mask", "plot_heads", "recall"]
