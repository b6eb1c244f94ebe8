"""What importing and installing the package promises."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import stem_flex

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_takes_no_triton_no_extras_and_no_gpu():
    out = run(
        "import sys\n"
        "for name in ('triton', 'transformers', 'matplotlib', 'hypothesis', 'flash_attn', 'rich'):\n"
        "    sys.modules[name] = None\n"
        "import torch, stem_flex, stem_flex.diagnostics, stem_flex.reference\n"
        "q = torch.randn(1, 2, 300, 16)\n"
        "mask = stem_flex.stem_block_mask(q, q, q)\n"
        "assert not torch.cuda.is_initialized()\n"
        "print(stem_flex.block_density(mask))"
    )
    assert out == "1.0"


def test_triton_asked_for_and_missing_says_so():
    out = run(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, stem_flex\n"
        "q = torch.randn(1, 2, 300, 16)\n"
        "try: stem_flex.stem_block_mask(q, q, q, impl='triton')\n"
        "except (ImportError, ValueError) as error: print(type(error).__name__, error)"
    )
    assert "impl='triton'" in out


def test_import_is_fast():
    """Under 1 s beyond torch; processor time and the best of three, since other work shares the machine."""
    program = "import time, torch; t = time.process_time(); import stem_flex; print(time.process_time() - t)"
    best = min(float(run(program)) for _ in range(3))
    assert best < 1.0


def test_public_names():
    assert len(stem_flex.__all__) <= 10
    assert all(hasattr(stem_flex, name) for name in stem_flex.__all__)
    assert list(stem_flex.__all__) == sorted(stem_flex.__all__)


def test_metadata():
    assert PROJECT["name"] == "stem-flex"
    assert PROJECT["version"] == "0.1.0"
    assert PROJECT["license"] == "BSD-3-Clause"
    assert {"test", "bench", "plot", "hf", "flash"} <= PROJECT["optional-dependencies"].keys()
    assert (ROOT / "stem_flex" / "py.typed").exists()
    try:
        assert metadata.version("stem-flex") == PROJECT["version"]
    except metadata.PackageNotFoundError:
        pytest.skip("the package is not installed here, it runs from the checkout")


def test_no_module_is_longer_than_400_lines():
    lines = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "stem_flex").rglob("*.py")}
    assert not {name: count for name, count in lines.items() if count > 400}
