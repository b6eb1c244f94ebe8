"""What a mask_mod reads, wherever it holds it: a layout made of it is bound again once that changed."""

from __future__ import annotations

import functools
import types

import pytest
import torch
from torch.nn.attention.flex_attention import and_masks

from stem_flex import layout, reference
from stem_flex.plumbing.captured import captured_values, code_of

WINDOW = torch.tensor(8)


def in_window(b, h, i, j):
    return i - j < WINDOW


def test_a_mask_mod_is_read_again_once_what_it_reads_changed(monkeypatch):
    limit = 32
    table = torch.ones(64, dtype=torch.bool)

    def mask_mod(b, h, i, j, table=table):
        return (j < limit) & in_window(b, h, i, j) & table[j]

    structure = layout.from_mask_mod(mask_mod, None, None, 64, 64)

    def classes():
        got = structure.bind(1, 1, 64, 64, block_size=(16, 16)).dense_classes()
        tokens = reference.token_mask(structure, 1, 1, 64, 64, 0, None)
        assert torch.equal(got, reference.block_classes(tokens, (16, 16)).expand_as(got))
        return got

    first = classes()
    assert structure.bind(1, 1, 64, 64, block_size=(16, 16)) is structure.bind(1, 1, 64, 64, block_size=(16, 16))
    limit = 48  # a closure's number
    second = classes()
    monkeypatch.setitem(globals(), "WINDOW", torch.tensor(40))  # another global tensor
    third = classes()
    WINDOW.fill_(20)  # the same, changed in place
    fourth = classes()
    table[16:32] = False  # a default argument
    assert len({tuple(x.flatten().tolist()) for x in (first, second, third, fourth, classes())}) == 5


class Table:
    def __init__(self, ids):
        self.ids = ids

    def __call__(self, b, h, i, j):
        return self.ids[i] == self.ids[j]


def same(ids, b, h, i, j):
    return ids[i] == ids[j]


class Inherited(Table):
    pass


class Slots:
    __slots__ = ("ids",)

    def __init__(self, ids):
        self.ids = ids

    def mod(self, score, b, h, i, j):
        return score * self.ids


class Module(torch.nn.Module):
    def __init__(self, ids):
        super().__init__()
        self.register_buffer("ids", ids)


BOUND = functools.partial(same, torch.zeros(64, dtype=torch.long))


def through_a_global(b, h, i, j):
    return (lambda: BOUND(b, h, i, j))()


HOLDERS = {
    "buffer": lambda ids: (lambda module: lambda b, h, i, j: module.ids[i] == module.ids[j])(Module(ids)),
    "inherited call": Inherited,
    "attribute": lambda ids: (lambda table: lambda b, h, i, j: table.ids[i] == table.ids[j])(Table(ids)),
    "and_masks": lambda ids: and_masks(lambda b, h, i, j: i >= j, lambda b, h, i, j: ids[i] == ids[j]),
    "partial": lambda ids: functools.partial(same, ids),
    "object": Table,
    "object in a closure": lambda ids: (lambda table: lambda b, h, i, j: table(b, h, i, j))(Table(ids)),
    "dict": lambda ids: (lambda held: lambda b, h, i, j: held["ids"][i] == held["ids"][j])({"ids": ids}),
    "list": lambda ids: (lambda held: lambda b, h, i, j: held[0][i] == held[0][j])([ids]),
    "slots": lambda ids: (lambda held: lambda b, h, i, j: held.ids[i] == held.ids[j])(Slots(ids)),
    "keyword default": lambda ids: lambda b, h, i, j, *, t=ids: t[i] == t[j],
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_tensor_is_found_wherever_a_mask_mod_holds_it(holder):
    ids = torch.arange(64) // 16
    structure = layout.from_mask_mod(HOLDERS[holder](ids), None, None, 64, 64)
    before = structure.bind(1, 1, 64, 64, block_size=(16, 16)).dense_classes()
    ids.fill_(0)
    after = structure.bind(1, 1, 64, 64, block_size=(16, 16)).dense_classes()
    tokens = reference.token_mask(structure, 1, 1, 64, 64, 0, None)
    assert torch.equal(after, reference.block_classes(tokens, (16, 16)).expand_as(after))
    assert not torch.equal(before, after)


def test_numbers_of_modules_and_slots_are_found(monkeypatch):
    monkeypatch.setattr(types, "WIDTH", 7, raising=False)
    assert 7 in captured_values(lambda b, h, i, j: i - j < types.WIDTH)
    assert captured_values(Slots(0.5).mod) == (0.5,)


def test_numbers_of_a_dict_are_told_apart_by_its_keys():
    def reads(held):
        return code_of(lambda score, b, h, i, j: score * held[0] + held[1], (float,)).numbers

    assert reads({0: 0.5, 1: 0.25}) == reads({1: 0.25, 0: 0.5}) != reads({1: 0.5, 0: 0.25})


def test_a_global_partial_read_in_an_inner_function_is_found():
    structure = layout.from_mask_mod(through_a_global, None, None, 64, 64)
    before = structure.bind(1, 1, 64, 64, block_size=(16, 16)).dense_classes()
    BOUND.args[0].copy_(torch.arange(64) // 16)
    assert not torch.equal(before, structure.bind(1, 1, 64, 64, block_size=(16, 16)).dense_classes())
