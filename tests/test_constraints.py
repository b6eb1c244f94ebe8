"""constraints.txt: every package that the project needs, with the version that the tests ran with."""

from __future__ import annotations

import os
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
LINES = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
PINS = {str(canonicalize_name(name)): Version(version) for name, version in (line.split("==") for line in LINES)}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# flash-attn-4 needs a GPU, so that no run without one could test its version
EXTRAS = {extra: needed for extra, needed in PROJECT["optional-dependencies"].items() if extra != "flash"}
NAMED = [Requirement(line) for lines in (PROJECT["dependencies"], *EXTRAS.values()) for line in lines]


def reached(requirements: list[Requirement]) -> dict[str, Version]:
    """Installed packages that these need here, directly or not, by name; what is not installed is left out."""
    found: dict[str, Version] = {}
    pending = [(need, "") for need in requirements]
    visited = set()
    while pending:
        need, asked = pending.pop()
        name = str(canonicalize_name(need.name))
        if (name, asked, str(need)) in visited or (need.marker and not need.marker.evaluate({"extra": asked})):
            continue
        visited.add((name, asked, str(need)))
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        found[name] = Version(Version(package.version).public)  # a CPU build, 2.13.0+cpu, is 2.13.0
        for extra in ("", *need.extras):
            pending.extend((Requirement(line), extra) for line in package.requires or ())
    return found


def test_each_line_is_a_package_once_with_its_exact_version():
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", line) for line in LINES)
    assert len(PINS) == len(LINES)
    assert sorted(LINES, key=str.lower) == LINES


def test_every_package_that_the_project_names_is_pinned_to_a_version_it_allows():
    for need in NAMED:
        pin = PINS.get(str(canonicalize_name(need.name)))
        assert pin is not None, f"constraints.txt must pin {need.name}"
        assert need.specifier.contains(pin), f"{need} does not allow the tested {pin}"


def test_the_installed_packages_are_the_pinned_ones():
    """Fails under STEM_FLEX_CONSTRAINED=1, as CI sets it; elsewhere other versions are the user's own choice."""
    installed = reached(NAMED)
    assert {"torch", "pytest"} <= installed.keys()
    # what a CUDA build of torch brings is pinned by torch itself, each to one version
    cuda = re.compile(r"cuda-|nvidia-")
    wrong = [
        f"{name} {version} (pinned: {PINS.get(name, 'not at all')})"
        for name, version in sorted(installed.items())
        if PINS.get(name) != version and not cuda.match(name)
    ]
    if wrong and os.environ.get("STEM_FLEX_CONSTRAINED") != "1":
        pytest.skip(f"not installed with -c constraints.txt: {', '.join(wrong)}")
    assert not wrong
