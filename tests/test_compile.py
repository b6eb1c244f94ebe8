"""Every kernel compiles for an H100, also where there is none: what the interpreter cannot tell."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")


@pytest.fixture(scope="module")
def kernels():
    script = Path(__file__).with_name("compile_for_hopper.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(script.parents[1])
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_every_kernel_compiles(kernels):
    assert {line["kernel"] for line in kernels} == {
        "_pool_kernel", "_magnitude_kernel", "_scores_kernel", "_select_kernel", "_cells_kernel",
        "_rows_kernel", "_proxies_kernel", "_sums_kernel", "_read_kernel", "_fine_kernel", "_normalisers_kernel",
        "_tail_sums_kernel", "_above_kernel", "_narrow_kernel",
    }  # fmt: skip
    assert all(line["cubin"] > 0 for line in kernels)


def test_selection_turns_no_row_over_in_shared_memory(kernels):
    # Triton 3.6 did, for a store in two dimensions; 3.9 would not, so with it this tells less
    widths = {line["BLOCK"]: line["shared"] for line in kernels if line["kernel"] == "_select_kernel"}
    assert 2048 in widths
    # one word for 32 candidates, and the warps' partial sums
    assert all(shared < 4 * width for width, shared in widths.items() if width > 256), widths


def test_tiles_fit_a_multiprocessor_twice(kernels):
    """But for those of long products, whose columns are 256."""
    wide = {line["kernel"] for line in kernels if 2 * line["shared"] > 227 * 1024 or line.get("BLOCK_N", 0) > 128}
    assert wide == {"_cells_kernel"}
    assert all(line["shared"] <= 227 * 1024 for line in kernels)
    assert all(2 * line["shared"] <= 227 * 1024 for line in kernels if line.get("BLOCK_N", 0) <= 128)


def test_products_of_cells_run_on_tensor_cores(kernels):
    products = [line for line in kernels if line["kernel"] == "_cells_kernel"]
    assert [line["tensor_cores"] for line in products] == [line["BLOCK_D"] >= 64 for line in products]


def test_sketched_products_run_on_tensor_cores(kernels):
    sums = [line for line in kernels if line["kernel"] == "_sums_kernel"]
    assert {line["EDGE"] for line in sums} == {False, True}
    assert [line["tensor_cores"] for line in sums] == [line["BLOCK_D"] >= 64 for line in sums]  # all but float32's


def test_products_of_the_last_queries_run_on_tensor_cores(kernels):
    products = [line for line in kernels if line["kernel"] in ("_normalisers_kernel", "_tail_sums_kernel")]
    assert {line["tensor_cores"] for line in products if line["BLOCK_R"] == 64} == {True}
    assert {line["BLOCK_R"] for line in products} == {32, 64}  # 32: float32's
