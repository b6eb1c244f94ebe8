"""StemConfig: presets, immutability, and every error it documents."""

from __future__ import annotations

import dataclasses
import pickle
from unittest import mock

import pytest
import torch

from stem_flex import StemConfig, block_density, stem_block_mask


def test_presets_are_the_published_variants():
    assert StemConfig.operator() == StemConfig(schedule="operator")
    assert StemConfig.paper() == StemConfig(schedule="paper", metric="log")
    assert (StemConfig().value_weight, StemConfig().mu, StemConfig().stride) == (0.2, 0.7, 8)
    assert (StemConfig().sink_blocks, StemConfig().local_blocks, StemConfig().block_size) == (4, 4, 128)


def test_configs_are_immutable_hashable_and_keyword_only():
    config = StemConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.mu = 0.5
    assert hash(config) == hash(StemConfig())
    with pytest.raises(TypeError):
        StemConfig(128)


def test_configs_are_compared_as_dataclasses_are():
    config = StemConfig()
    assert config == mock.ANY
    assert config != dataclasses.astuple(config)
    compared = torch.compile(
        lambda x: x + (config == StemConfig.operator()) + (config in (StemConfig(),)), fullgraph=True
    )
    assert compared(torch.zeros(1)) == 1
    for item in dataclasses.fields(config):
        other = dataclasses.replace(config)
        object.__setattr__(other, item.name, "another")
        assert config != other
    assert pickle.loads(pickle.dumps(config)) == config


def test_one_block_is_not_all_of_them():
    one, all_of_them = (StemConfig(schedule="fixed", k_start=k) for k in (1, 1.0))
    assert one != all_of_them
    assert len({one, all_of_them, dataclasses.replace(one)}) == 2
    x = torch.randn(1, 1, 2048, 16)
    sparse, dense = (stem_block_mask(x, x, x, config) for config in (one, all_of_them))  # of one binding
    assert block_density(sparse) < block_density(dense) == 1


def test_block_sizes_of_queries_and_keys():
    assert (StemConfig(block_size=64).query_block, StemConfig(block_size=64).key_block) == (64, 64)
    both = StemConfig(block_size=(256, 128))
    assert (both.query_block, both.key_block) == (256, 128)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"block_size": 96}, ValueError, "block_size must be powers of two .* got 96"),
        ({"block_size": 8}, ValueError, "block_size must be powers of two of at least 16, got 8"),
        ({"block_size": 128.0}, TypeError, r"block_size must be an int or .* got 128\.0"),
        ({"block_size": (128, 64, 32)}, TypeError, "block_size must be an int or a .* pair"),
        ({"block_size": True}, TypeError, "block_size must be an int"),
        ({"stride": 3}, ValueError, "stride must divide block_size 128, got 3"),
        ({"stride": 64, "block_size": (128, 32)}, ValueError, "stride must divide block_size"),
        ({"stride": 0}, ValueError, "stride must divide block_size 128, got 0"),
        ({"stride": 8.0}, TypeError, r"stride must be an int, got 8\.0"),
        ({"metric": "max"}, ValueError, "metric must be one of .* got 'max'"),
        ({"schedule": "linear"}, ValueError, "schedule must be one of .* got 'linear'"),
        ({"value_weight": float("nan")}, ValueError, "value_weight must be a finite number, got nan"),
        ({"value_weight": "0.2"}, TypeError, "value_weight must be a finite number, got '0.2'"),
        ({"mu": 0}, ValueError, r"mu must be a number in \(0, 1\], got 0"),
        ({"mu": 1.5}, ValueError, r"mu must be a number in \(0, 1\], got 1\.5"),
        ({"mu": None}, TypeError, "mu must be .* got None"),
        ({"sink_blocks": -1}, ValueError, "sink_blocks must be 0 or more, got -1"),
        ({"local_blocks": 2.0}, TypeError, r"local_blocks must be an int, got 2\.0"),
        ({"k_start": 7}, ValueError, "k_start must be None with schedule='envelope', got 7"),
        ({"k_start": 7, "schedule": "paper"}, ValueError, "k_start must be None with schedule='paper', got 7"),
        ({"schedule": "fixed"}, TypeError, "k_start must be an int or a float with schedule='fixed', got None"),
        ({"schedule": "fixed", "k_start": 0}, ValueError, "k_start must be at least 1 block, got 0"),
        ({"schedule": "fixed", "k_start": 1.2}, ValueError, r"k_start as a fraction must be in \(0, 1\], got 1\.2"),
        ({"schedule": "fixed", "k_start": True}, TypeError, "k_start must be an int or a float"),
        ({"keep_ratio": 0.2}, TypeError, "keep_ratio"),
    ],
)
def test_wrong_options_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        StemConfig(**options)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"routing": "tokens"}, ValueError, "routing must be one of .* got 'tokens'"),
        ({"budget": "share"}, ValueError, "budget must be one of .* got 'share'"),
        ({"routing": "oam", "coarse": None}, ValueError, "budget='mass' needs scores that are masses"),
        ({"threshold": 0}, ValueError, r"threshold must be a number in \(0, 2\], got 0"),
        ({"threshold": 1.5, "budget": "peak", "coarse": None}, ValueError, r"threshold must be .* \(0, 1\], got 1\.5"),
        ({"threshold": 1e-31}, ValueError, r"threshold must be at least 1e-30 with coarse=\(4, 1\), got 1e-31; coarse"),
        ({"floor": 2.0}, TypeError, r"floor must be an int, got 2\.0"),
        ({"cap": 0}, ValueError, "cap must be 1 or more, got 0"),
        ({"floor": 9, "cap": 8}, ValueError, "cap must be at least floor=9, got 8"),
        ({"sketch": (4, 8, 4)}, TypeError, "sketch must be four ints"),
        ({"sketch": (16, 3, 4, 8)}, ValueError, "means that are powers of two up to the blocks"),
        ({"sketch": (129, 8, 4, 8)}, ValueError, "at most as many outliers as a block has tokens"),
        ({"coarse": 4}, TypeError, "coarse must be two ints .* got 4"),
        ({"coarse": (4, 5)}, ValueError, r"coarse must have at most the sketch's outliers \(16, 4\), got \(4, 5\)"),
        ({"budget": "coverage"}, ValueError, "coarse needs budget='mass', .* got 'coverage'"),
    ],
)
def test_wrong_options_of_a_mass_budget_are_refused(options, error, match):
    given = {"routing": "sketch", "budget": "mass", "coarse": (4, 1)}
    with pytest.raises(error, match=match):
        StemConfig(**(given | options))


def test_the_least_threshold_of_a_coarse_sketch():
    given = {"routing": "sketch", "budget": "mass"}
    assert StemConfig(**given, coarse=(4, 1), threshold=1e-30).coarse == (4, 1)
    assert StemConfig(**given, threshold=1e-31).coarse is None
