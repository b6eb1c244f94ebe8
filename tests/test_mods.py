"""The parts that mask_mods of bound layouts are made of."""

from __future__ import annotations

import pytest
import torch

from stem_flex.plumbing.mods import below, of_blocks

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_indices_past_the_length_are_the_last(device):
    index = torch.arange(256, device=device)
    assert torch.equal(below(200, index.device)(index), index.clamp(max=199))
    assert torch.equal(below(200, index.device, 64)(index), index.clamp(max=199) // 64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("heads", [1, 2])
def test_tables_are_read_by_block_whatever_they_are_shared_by(batch, heads, device):
    table = torch.randint(100, (batch, heads, 4, 7), device=device)
    read = of_blocks(table, (200, 210), (64, 32))
    b, h = torch.arange(3, device=device)[:, None, None, None], torch.arange(2, device=device)[:, None, None]
    q, kv = torch.arange(256, device=device)[:, None], torch.arange(224, device=device)
    expected = table.expand(3, 2, 4, 7)[b, h, q.clamp(max=199) // 64, kv.clamp(max=209) // 32]
    assert torch.equal(read(b, h, q, kv).expand(3, 2, -1, -1), expected)


def test_sizes_may_be_symbols():
    @torch.compile(fullgraph=True, dynamic=True, backend="eager")
    def read(table, b, h, q, kv):
        return of_blocks(table, (200, 210), (64, 32))(b, h, q, kv)

    index = [torch.tensor([i, i]) for i in (1, 1, 130, 70)]
    for batch in (2, 3):
        table = torch.randint(100, (batch, 2, 4, 7))
        assert torch.equal(read(table, *index), table[1, 1, 2, 2].expand(2))
