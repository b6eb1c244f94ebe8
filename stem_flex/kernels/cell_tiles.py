"""How the cells' products (:mod:`stem_flex.kernels.cells`) are cut, and by which tiles they are made."""

from typing import NamedTuple


class Cut(NamedTuple):
    """Tokens of a cell, rows (cells) of a query block, columns of a key block; powers of two."""

    tokens: int
    rows: int
    columns: int


class Tile(NamedTuple):
    """Tuning: rows, columns and dims of a product, warps, stages."""

    block_m: int
    block_n: int
    block_d: int
    warps: int
    stages: int


LONG_TILE = Tile(128, 256, 64, 8, 3)  # long products: fewer bytes from L2, one program a multiprocessor
HALF_TILE = Tile(128, 128, 64, 4, 3)
FLOAT_TILE = Tile(64, 64, 32, 4, 2)  # no tensor cores
LONG = 512  # multiply-adds of a logit
SUMS = 128  # of a thread, at most
SHARED_BYTES = 200 * 1024  # of an H100's 227 KB, for the operands in flight


def tile_of(item_size: int, cut: Cut, dim: int, *, by_query: bool = False) -> Tile:
    """The tile for inputs of ``item_size`` bytes an element and logits of ``cut.tokens * dim`` multiply-adds.

    A block of keys (``by_query``: of queries) lies in one tile; what else there is of it follows from that.
    """
    tile = FLOAT_TILE if item_size == 4 else LONG_TILE if cut.tokens * dim > LONG else HALF_TILE
    rows = max(tile.block_m, cut.rows) if by_query else tile.block_m
    columns = tile.block_n if by_query else max(tile.block_n, cut.columns)
    warps = tile.warps if rows * columns <= 32 * SUMS * tile.warps else max(8, tile.warps)
    if rows * columns > 32 * SUMS * warps:  # the other side gives way
        rows, columns = (rows, 32 * SUMS * warps // rows) if by_query else (32 * SUMS * warps // columns, columns)
    fits = SHARED_BYTES // ((rows + columns) * tile.block_d * item_size)
    return Tile(max(rows, 16), max(columns, 16), tile.block_d, warps, max(1, min(tile.stages, fits)))
