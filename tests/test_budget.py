"""TPD budgets, against formulas written apart from the package."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stem_flex import StemConfig, reference, testing, tpd_budget
from stem_flex.budget import largest_budget, row_budget

LENGTHS = range(1, 4097)
DECAYS = [(0.7, LENGTHS), (1.0, LENGTHS[::7]), (0.25, LENGTHS[::7])]  # every length for the published mu


def operator_k(n: int) -> int:
    if n < 56:
        return n
    return int(0.2 * n + 30) if n < 160 else int(0.1 * n) + 30


def decay(n: int, k: int, mu: float) -> torch.Tensor:
    """Rows below k keep k, the rest floor(linspace(k, mu k)) in float64, in [1, k]."""
    if n - k <= 1:
        return torch.full((n,), k)
    tail = torch.linspace(k, mu * k, n - k, dtype=torch.float64).floor().clamp(1, k)
    return torch.cat([torch.full((k,), k), tail.long()])


@pytest.mark.parametrize(("mu", "lengths"), DECAYS)
def test_operator_budgets_of_every_length(mu, lengths):
    config = StemConfig(schedule="operator", mu=mu)
    wrong = [n for n in lengths if not torch.equal(tpd_budget(n, config).long(), decay(n, operator_k(n), mu))]
    assert not wrong, f"{len(wrong)} lengths differ, first {wrong[:5]}"


def test_envelope_is_the_operators_rule_from_its_running_maximum():
    k, wrong = 0, []
    for n in LENGTHS:
        k = max(k, operator_k(n))
        if not torch.equal(tpd_budget(n, StemConfig()).long(), decay(n, k, 0.7)):
            wrong.append(n)
    assert not wrong, f"{len(wrong)} lengths differ, first {wrong[:5]}"


@pytest.mark.parametrize(("mu", "lengths"), DECAYS)
def test_paper_budgets_of_every_length(mu, lengths):
    config, wrong = StemConfig(schedule="paper", mu=mu), []
    for n in lengths:
        k = max(54.0, (0.2 if n <= 128 else 0.1) * n)
        rows = np.ceil(k - k * (1 - mu) * np.arange(n, dtype=np.float64) / n)
        if not np.array_equal(tpd_budget(n, config).numpy(), np.maximum(rows, 1)):
            wrong.append(n)
    assert not wrong, f"{len(wrong)} lengths differ, first {wrong[:5]}"


@pytest.mark.parametrize(
    ("n", "first", "last"),
    [
        (55, 55, 55),
        (64, 42, 29),
        (128, 55, 38),
        (159, 61, 42),
        (160, 46, 32),
        (256, 55, 38),
        (512, 81, 56),
        (1024, 132, 92),
    ],
)
def test_published_values_of_the_operator(n, first, last):
    rows = tpd_budget(n, StemConfig.operator())
    assert (rows[0], rows[-1]) == (first, last)


def test_operator_budget_falls_with_length_and_the_default_never_does():
    operator, default = StemConfig.operator(), StemConfig()
    assert tpd_budget(56, operator)[0] < tpd_budget(55, operator)[0]
    assert tpd_budget(160, operator)[0] < tpd_budget(159, operator)[0]
    shorter = tpd_budget(1, default)
    for n in range(2, 700):
        rows = tpd_budget(n, default)
        assert (rows[: n - 1] >= shorter).all(), f"a prompt of {n} blocks gets less than one of {n - 1}"
        shorter = rows


def test_default_is_the_operator_from_310_blocks_on():
    for n in (310, 311, 1000, 4096):
        assert torch.equal(tpd_budget(n, StemConfig()), tpd_budget(n, StemConfig.operator()))


@pytest.mark.parametrize("n", [1, 2, 7, 40, 300])
@pytest.mark.parametrize("mu", [0.1, 0.7, 1.0])
@pytest.mark.parametrize(
    ("k_start", "blocks"), [(1, lambda n: 1), (5, lambda n: 5), (0.3, lambda n: max(1, int(0.3 * n)))]
)
def test_fixed_budgets(n, mu, k_start, blocks):
    config = StemConfig(schedule="fixed", k_start=k_start, mu=mu)
    k = blocks(n)
    expected = decay(n, k, mu) if n > k else torch.full((n,), k)
    assert torch.equal(tpd_budget(n, config).long(), expected)


def test_mu_1_is_uniform_and_mu_is_the_ratio_of_last_to_first():
    assert tpd_budget(900, StemConfig(mu=1.0)).unique().tolist() == [120]
    rows = tpd_budget(900, StemConfig(mu=0.5))
    assert (rows[0], rows[-1]) == (120, 60)
    assert (rows.diff() <= 0).all()


@given(n=st.integers(1, 500), config=testing.stem_configs())
def test_reference_gives_the_same_budgets(n, config):
    rows = tpd_budget(n, config)
    assert rows.dtype == torch.int32
    assert torch.equal(rows, reference.tpd_budget(n, config))
    assert rows.min() >= 1
    assert rows.max() <= largest_budget(n, config)


@given(st.lists(st.integers(1, 600), min_size=1, max_size=8), testing.stem_configs())
def test_row_budget_is_tpd_budget_elementwise(lengths, config):
    position = torch.tensor([n // 2 for n in lengths], dtype=torch.int32)
    rows = row_budget(position, torch.tensor(lengths, dtype=torch.int32), config)
    assert rows.tolist() == [int(tpd_budget(n, config)[n // 2]) for n in lengths]


@pytest.mark.parametrize(
    ("num_blocks", "error"), [(0, ValueError), (-3, ValueError), (2.5, TypeError), (True, TypeError)]
)
def test_num_blocks_must_be_a_positive_int(num_blocks, error):
    with pytest.raises(error, match=r"num_blocks must be .* got"):
        tpd_budget(num_blocks, StemConfig())


@pytest.mark.gpu
def test_budgets_on_the_gpu_are_those_of_the_cpu():
    for config in (StemConfig(), StemConfig.operator(), StemConfig.paper()):
        for n in (*range(1, 400), 1024, 4096):
            on_gpu = tpd_budget(n, config, device="cuda")
            assert on_gpu.is_cuda
            assert torch.equal(on_gpu.cpu(), tpd_budget(n, config)), n
