"""Triton kernels of the mask build and the operators over them, nothing else.

Importing this package imports Triton; the rest of `stem_flex` imports it only where ``impl="triton"`` is asked for.

==================  ====================================================================================
`pool`              one pass over q, k, v: phase means of every block, value magnitudes of every group of keys
`magnitude`         group magnitudes of a whole sequence -> one bias per key block
`scores`            phase means -> block scores (a GEMM), in row chunks under a fixed workspace
`select`            block scores -> compact ascending index tables
`topk`              the k largest of a row, for `select`
`cells`             logits of cells reduced by block: XAttention, CoSA, FlashPrefill, the oracle and others
`tail`              attention of the last queries by key and by diagonal: MInference, FlexPrefill
`above`             the largest entries of a head within a part of its sum: FlexPrefill
`selector_ops`      ``torch.ops.stem_flex.{cell_mass,cell_peaks,query_logs,tail_sums,largest_bound}`` over those three
`ops`               ``torch.ops.stem_flex.{tables,scores,select}`` over the first four
`sketch_proxies`    the block sketch: outliers and group means of every block, in one pass over q or k
`sketch_sums`       proxies -> exponentials summed by key block (a GEMM)
`sketch_mass`       the sums -> mean and largest mass of block pairs, and counts above a threshold, in row chunks
`sketch_fine`       the masses of only those pairs that a coarse sketch proposed
`sketch_chunks`     the four of them in row chunks under a fixed workspace
`sketch_ops`        ``torch.ops.stem_flex.sketch_scores`` over those
`sketch_tables`     ``torch.ops.stem_flex.sketch_tables``: scores, counts and selection, streamed
==================  ====================================================================================
"""

from stem_flex.kernels.ops import stem_scores, stem_select, stem_tables

__all__ = ["stem_scores", "stem_select", "stem_tables"]
