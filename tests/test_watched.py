"""A layout of a mask_mod is bound again once anything changed that the mask_mod could read."""

from __future__ import annotations

import enum
import functools
import sys
import types

import numpy
import pytest
import torch
from torch.nn.attention.flex_attention import and_masks, create_block_mask

from stem_flex import layout, reference, stem_block_mask
from stem_flex.plumbing.watched import watched_values


class Kind(enum.Enum):
    NARROW = 8
    WIDE = 40


class Holder:
    width = 8

    def __init__(self, **held):
        self.__dict__.update(held)

    @property
    def twice(self):
        return STATE.width

    def __call__(self, b, h, i, j):
        return i - j < self.width


class Finder:
    def __getattr__(self, name):
        return STATE.width


STATE = types.SimpleNamespace(width=8)
MODE = "narrow"
KIND = Kind.NARROW


def global_string(b, h, i, j):
    return i - j < (8 if MODE == "narrow" else 40)


def global_enum(b, h, i, j):
    return i - j < (8 if KIND is Kind.NARROW else 40)


def helper(i, j):
    return i - j < 8


def calls_a_global(b, h, i, j):
    return helper(i, j)


def imports(b, h, i, j):
    from tests import test_watched  # the module as others see it

    return i - j < getattr(sys.modules.get("watched_state", test_watched), "width", 8)


def string_of_an_object():
    held = Holder(mode="narrow")
    return lambda b, h, i, j: i - j < (8 if held.mode == "narrow" else 40), lambda: setattr(held, "mode", "wide")


def enum_of_an_object():
    held = Holder(kind=Kind.NARROW)
    return lambda b, h, i, j: i - j < held.kind.value, lambda: setattr(held, "kind", Kind.WIDE)


def none_of_an_object():
    held = Holder(limit=8)
    return lambda b, h, i, j: i - j < (held.limit or 40), lambda: setattr(held, "limit", None)


def string_in_a_cell():
    mode = "narrow"

    def change():
        nonlocal mode
        mode = "wide"

    return (lambda b, h, i, j: i - j < (8 if mode == "narrow" else 40)), change


def string_in_a_dict():
    held = {"mode": "narrow"}
    return lambda b, h, i, j: i - j < (8 if held["mode"] == "narrow" else 40), lambda: held.update(mode="wide")


def key_of_a_dict():
    held = {8: "limit"}
    return lambda b, h, i, j: i - j < min(held), lambda: (held.pop(8), held.update({40: "limit"}))


def length_of_a_list():
    held = [[0]] * 8
    return lambda b, h, i, j: i - j < len(held), lambda: held.extend([[0]] * 32)


def a_set():
    held = {8}
    return lambda b, h, i, j: i - j < max(held), lambda: held.add(40)


def keyword_of_a_partial():
    f = functools.partial(lambda b, h, i, j, mode: i - j < (8 if mode == "narrow" else 40), mode="narrow")
    return f, lambda: f.keywords.update(mode="wide")


def class_attribute(monkeypatch):
    held = Holder()
    return lambda b, h, i, j: i - j < held.width, lambda: monkeypatch.setattr(Holder, "width", 40)


def a_property(monkeypatch):
    held = Holder()
    return lambda b, h, i, j: i - j < held.twice, lambda: monkeypatch.setattr(STATE, "width", 40)


def looked_up(monkeypatch):
    held = Finder()
    return lambda b, h, i, j: i - j < held.anything, lambda: monkeypatch.setattr(STATE, "width", 40)


def a_callable(monkeypatch):
    held = Holder()
    return held, lambda: setattr(held, "width", 40)


def a_global_string(monkeypatch):
    return global_string, lambda: monkeypatch.setitem(globals(), "MODE", "wide")


def a_global_enum(monkeypatch):
    return global_enum, lambda: monkeypatch.setitem(globals(), "KIND", Kind.WIDE)


def a_global_function(monkeypatch):
    return calls_a_global, lambda: monkeypatch.setitem(globals(), "helper", lambda i, j: i - j < 40)


def the_code_of_a_function(monkeypatch):
    return calls_a_global, lambda: monkeypatch.setattr(helper, "__code__", (lambda i, j: i - j < 40).__code__)


def an_attribute_of_a_function():
    def f(b, h, i, j):
        return i - j < f.width

    f.width = 8
    return f, lambda: setattr(f, "width", 40)


def an_attribute_of_a_tensor():
    table = torch.zeros(64)
    table.width = 8
    return lambda b, h, i, j: i - j < table.width, lambda: setattr(table, "width", 40)


def an_import(monkeypatch):
    held = types.ModuleType("watched_state")
    return imports, lambda: (setattr(held, "width", 40), monkeypatch.setitem(sys.modules, "watched_state", held))


def memory_of_numpy():
    held = numpy.array([8])
    table = torch.from_numpy(held)
    return lambda b, h, i, j: i - j < table[0], lambda: held.fill(40)


def another_memory():
    table = torch.tensor([8])
    return lambda b, h, i, j: i - j < table[0], lambda: setattr(table, "data", torch.tensor([40]))


def a_type():
    one = 8

    def change():
        nonlocal one
        one = 8.0

    return (lambda b, h, i, j: i - j < (8 if isinstance(one, int) else 40)), change


CHANGES = [
    string_of_an_object, enum_of_an_object, none_of_an_object, string_in_a_cell, string_in_a_dict, key_of_a_dict,
    length_of_a_list, a_set, keyword_of_a_partial, class_attribute, a_property, looked_up, a_callable, a_global_string,
    a_global_enum, a_global_function, the_code_of_a_function, an_attribute_of_a_function, an_attribute_of_a_tensor,
    an_import, memory_of_numpy, another_memory, a_type,
]  # fmt: skip


@pytest.mark.parametrize("make", CHANGES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("through", ["mask_mod", "and_masks", "block mask", "&"])
def test_blocks_follow_whatever_a_mask_mod_reads(monkeypatch, make, through):
    f, change = make(monkeypatch) if make.__code__.co_argcount else make()
    if through == "block mask":
        listed = create_block_mask(lambda b, h, i, j: i >= 0, None, None, 64, 64, BLOCK_SIZE=16, device="cpu")
        listed.kv_num_blocks, listed.full_kv_num_blocks = listed.full_kv_num_blocks, listed.kv_num_blocks
        listed.kv_indices, listed.full_kv_indices = listed.full_kv_indices, listed.kv_indices
        listed.mask_mod = f  # asked in every block
        structure = layout.from_block_mask(listed)
    else:
        mod = and_masks(lambda b, h, i, j: i >= j, f) if through == "and_masks" else f
        structure = layout.from_mask_mod(mod, None, None, 64, 64)
        structure = layout.causal() & structure if through == "&" else structure

    def classes():
        got = structure.bind(1, 1, 64, 64, block_size=(16, 16)).dense_classes()
        tokens = reference.token_mask(structure, 1, 1, 64, 64, 0, None)
        assert torch.equal(got, reference.block_classes(tokens, (16, 16)).expand_as(got))
        return got

    before = classes()
    change()
    assert not torch.equal(before, classes())


def test_what_can_be_watched_is_bound_once():
    limit, table, pair = 20, torch.arange(64) // 16, (8, "narrow")
    held = {"mode": "narrow", "tables": [table]}

    def watched(b, h, i, j):
        near = torch.where(table[i] == held["tables"][0][j], i - j < limit, i == j)
        return near & (i >= j) & (pair[1] == held["mode"]) & torch.isfinite(i * 1.0)

    structure = layout.from_mask_mod(and_masks(watched, lambda b, h, i, j: abs(i - j) < max(3, 9)), None, None, 64, 64)
    every = create_block_mask(lambda b, h, i, j: (i >= j) & (table[i] == table[j]), None, None, 64, 64, device="cpu")
    for one in (structure, layout.from_block_mask(every), structure & layout.padding([64]) & layout.causal()):
        assert one.bind(1, 1, 64, 64) is one.bind(1, 1, 64, 64)


def test_what_cannot_be_watched_can_be_bound_by_hand(make_qkv):
    q, k, v = make_qkv(B=1, Lq=64)
    held, calls = Holder(mode="narrow"), []

    def mask_mod(b, h, i, j):
        calls.append(held.mode)
        return (i >= j) & (i - j < 40)

    structure = layout.from_mask_mod(mask_mod, None, None, 64, 64)
    bound = structure.bind(1, 4, 64, 64)
    assert watched_values(mask_mod) is None
    asked = len(calls)
    assert stem_block_mask(q, k, v, layout=bound).structure is bound
    assert len(calls) == asked
    stem_block_mask(q, k, v, layout=structure)
    assert len(calls) > asked


def test_reading_the_default_dtype_is_watched():
    structure = layout.from_mask_mod(lambda b, h, i, j: (i / 3.0 - j / 3.0) < 1e-4, None, None, 64, 64)
    bound = structure.bind(1, 1, 64, 64)
    torch.set_default_dtype(torch.float16)
    try:
        assert structure.bind(1, 1, 64, 64) is not bound
    finally:
        torch.set_default_dtype(torch.float32)
