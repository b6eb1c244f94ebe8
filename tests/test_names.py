"""No module bears the name of a public function or class: `stem_flex.documents` beside `layout.documents` misled."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

import stem_flex

INNER = {"plumbing", "kernels"}  # rooms that nobody is told to import from


def test_no_module_bears_the_name_of_a_public_function():
    found = {}
    for info in pkgutil.walk_packages(stem_flex.__path__, "stem_flex."):
        try:
            found[info.name] = importlib.import_module(info.name)
        except ImportError:  # of an extra that is not installed
            continue
    public = set()
    for module in (stem_flex, *found.values()):
        exported = {name: getattr(module, name) for name in getattr(module, "__all__", ())}
        public |= {name for name, held in exported.items() if not isinstance(held, ModuleType)}
    assert {"compose", "documents", "stem_attention", "block_density", "layouts", "tpd_budget"} <= public
    outer = [name for name in found if not INNER & set(name.split("."))]
    assert not [name for name in outer if name.rpartition(".")[2] in public]
