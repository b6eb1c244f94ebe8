"""Context parallel prefill on four processes against one: `checks.py` holds what they check together."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.distributed import ranks

CHECKS = "tests.distributed.checks"
NAMES = [
    node.name
    for node in ast.parse(Path(__file__).with_name("checks.py").read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return ranks.start(4, CHECKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", NAMES)
def test_four_ranks(found, name):
    failed = {rank: text for rank, text in enumerate(found.get(name, ["it never began"])) if text is not None}
    assert not failed, "\n".join(f"rank {rank}: {text}" for rank, text in failed.items())
