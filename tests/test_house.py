"""The plan of the house: which rooms there are, and that imports run one way through them."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

import stem_flex
from stem_flex import layout

ROOT = Path(stem_flex.__file__).parent
STAGES = {"__init__", "config", "budget", "score", "select", "mask", "attention", "composition"}
# From the ground up: a room imports from rooms before it, and from its own.
ROOMS = (
    "config",
    "plumbing",
    "budget",
    "layout",
    "score",
    "select",
    "kernels",
    "selectors",
    "mask",
    "composition",
    "diagnostics",
    "attention",
    "reference",
    "testing",
    "distributed",
    "integrations",
)
LAZY = {("score", "kernels"), ("select", "kernels")}  # imported in the call that asks for Triton


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """Modules of the package that ``name`` imports anywhere, also in functions and for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{name} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    found = {x for x in found if x in MODULES and x != "stem_flex"}
    for other in tuple(found):  # a module brings its packages, but for those that `name` is in
        parent = other.rpartition(".")[0]
        while parent != "stem_flex" and parent:
            if not name.startswith(parent):
                found.add(parent)
            parent = parent.rpartition(".")[0]
    return found - {name}


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else "stem_flex"


def test_no_ring_of_imports():
    graph = {name: imports(name) for name in MODULES}
    # a package and its own modules count as one way, from the package down
    for name in graph:
        graph[name] = {x for x in graph[name] if not name.startswith(f"{x}.")}
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"modules import each other in a ring: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("name", [name for name in MODULES if name != "stem_flex"])
def test_rooms_import_downwards(name):
    own = ROOMS.index(room(name))
    above = {room(x) for x in imports(name) if ROOMS.index(room(x)) > own}
    assert not {x for x in above if (room(name), x) not in LAZY}


def test_the_root_holds_the_stages_and_no_more():
    assert {path.stem for path in ROOT.glob("*.py")} == STAGES


def test_nothing_is_imported_for_type_checkers_only():
    assert not [name for name, path in MODULES.items() if "TYPE_CHECKING" in path.read_text()]


def test_files_are_short():
    longest = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert not {name: lines for name, lines in longest.items() if lines > 350}


def test_every_kind_of_layout_in_the_folder_is_exported():
    """A new kind is one new file, and its line in the package's list."""
    for path in (ROOT / "layout").glob("_[a-z]*.py"):
        functions = [x.name for x in ast.parse(path.read_text()).body if isinstance(x, ast.FunctionDef)]
        public = [name for name in functions if not name.startswith("_")]
        assert path.stem == "_base" or len(public) == 1
        assert set(public) <= set(layout.__all__)
