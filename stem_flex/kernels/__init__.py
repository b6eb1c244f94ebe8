"""Triton kernels of the mask build and the operators over them, nothing else.

Importing this package imports Triton; the rest of `stem_flex` imports it only where ``impl="triton"`` is asked for.

=============  =========================================================================================
`pool`         one pass over q, k, v: phase means of every block, value magnitudes of every group of keys
`magnitude`    group magnitudes of a whole sequence -> one bias per key block
`scores`       phase means -> block scores (a GEMM), in row chunks under a fixed workspace
`select`       block scores -> compact ascending index tables
`topk`         the k largest of a row, for `select`
`mass`         the true attention mass of every block pair, for the oracle
`ops`          ``torch.ops.stem_flex.{tables,scores,select}`` over the first four
=============  =========================================================================================
"""

from stem_flex.kernels.ops import stem_scores, stem_select, stem_tables

__all__ = ["stem_scores", "stem_select", "stem_tables"]
