"""Profiles, markers and small inputs shared by the tests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where Triton is first imported, whichever test that is

_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}

# ci repeats the same few hundred examples everywhere and reports a failure as it found it, for shrinking one
# takes minutes; deep looks for new examples and shrinks them: pytest --hypothesis-profile=deep
_QUICK = (Phase.explicit, Phase.generate)
settings.register_profile("ci", max_examples=30, derandomize=True, phases=_QUICK, **_COMMON)
settings.register_profile("deep", max_examples=2000, **_COMMON)
settings.load_profile("ci")

torch.set_printoptions(threshold=20, edgeitems=1)  # of the inputs drawn for a failure, shapes say enough


def pytest_addoption(parser: pytest.Parser) -> None:
    """``pytest -m gpu --record FILE`` leaves what it found, where and with what, for bench/results."""
    parser.addoption("--record", type=Path, help="write counts, failures and environment of this run as JSON")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Write the record that ``--record`` asks for."""
    path = config.getoption("record")
    if path is None:
        return
    from bench.report import environment

    stats = terminalreporter.stats
    files: dict[str, int] = {}
    for report in stats.get("passed", ()):
        name = report.nodeid.split("::")[0]
        files[name] = files.get(name, 0) + 1
    found = {
        "environment": environment() | {"command": f"python -m pytest {' '.join(config.invocation_params.args)}"},
        **{kind: len(stats.get(kind, ())) for kind in ("passed", "failed", "error", "skipped")},
        "passed_by_file": dict(sorted(files.items())),
        "not_passed": [report.nodeid for kind in ("failed", "error") for report in stats.get(kind, ())],
        "skipped_because": sorted({report.longrepr[2] for report in stats.get("skipped", ())}),
    }
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests, and say why, where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, torch.cuda.is_available() is False")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def make_qkv() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """``make_qkv(B, Hq, Hkv, Lq, D, ...)``: normal q, k, v with a mean, so that blocks differ."""

    def make(
        B: int = 2,
        Hq: int = 4,
        Hkv: int = 2,
        Lq: int = 200,
        D: int = 16,
        *,
        Lk: int | None = None,
        Dv: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        seed: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        Lk = Lq if Lk is None else Lk
        shapes = ((B, Hq, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, D if Dv is None else Dv))
        q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) + 0.2 for shape in shapes)
        v = v * torch.rand(*v.shape[:-1], 1, generator=generator, dtype=torch.float64).mul(3).exp()
        return q.to(device, dtype), k.to(device, dtype), v.to(device, dtype)

    return make


@pytest.fixture
def llama():
    """A tiny random Llama."""
    from tests.hf_models import tiny_model

    return tiny_model("llama")


@pytest.fixture
def exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluate the block lists and mask_mods of models token by token, instead of compiling flex_attention."""
    from stem_flex.integrations import hf_attention
    from tests.hf_models import dense_sparse_prefill

    monkeypatch.setattr(hf_attention, "sparse_prefill", dense_sparse_prefill)


@pytest.fixture
def selections(monkeypatch: pytest.MonkeyPatch) -> list:
    """Every call of stem_block_mask by a model's layers: (q, k, v, keywords, BlockMask)."""
    from stem_flex.integrations import hf_attention

    calls = []
    build = hf_attention.stem_block_mask

    def spy(q, k, v, config, **keywords):
        mask = build(q, k, v, config, **keywords)
        calls.append((q, k, v, keywords, mask))
        return mask

    monkeypatch.setattr(hf_attention, "stem_block_mask", spy)
    return calls


@pytest.fixture
def poisoned() -> Iterator[None]:
    """PyTorch fills what the launchers allocate with NaN and the largest int: whatever they forget to write shows."""
    import torch.utils.deterministic

    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
