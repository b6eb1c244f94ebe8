"""Context parallel prefill on four processes against one: `checks.py` holds what they check together."""

from __future__ import annotations

from tests.distributed import ranks


def test_four_ranks(tmp_path):
    """One test, so that however tests are spread over workers the processes are started once."""
    assert len(ranks.agreed(4, "tests.distributed.checks", tmp_path)) == 17
