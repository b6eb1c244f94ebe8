"""The block sketch's scores in chunks of rows: proxies, coarse or whole sums, masses, and what was proposed again.

A chunk is the rows [row, row + count) of every head: its query proxies, sums and scores are alive together and
overwritten by the next chunk's. Key proxies are made once. Bytes at the peak (e = bytes an element, f = 2, or 4 of
float32 inputs), for a chunk of ``count`` rows and ``width`` key blocks, P and R proxies, with a coarse sketch those of
its P' and R':

    keys      e * B*Hkv*Kb * R*D'              and R' of them
    queries   e * B*Hq*count * P*D'            and P' of them
    sums      f * B*Hq*count * P*width         of the coarse sketch, where there is one
    tops      8 * B*Hq*count * P*width / BLOCK_J
    listed    4 * B*Hq*count * capacity        with a coarse sketch only
    found     f * B*Hq*count * places*P        with a coarse sketch only, and 4 bytes more for each tile and proxy
"""

import torch
from torch import Tensor

from stem_flex.kernels import sketch_fine, sketch_mass
from stem_flex.kernels.launch import Plan
from stem_flex.kernels.scores import Chunk, aligned, cut
from stem_flex.kernels.sketch_fine import Fine, decide, places
from stem_flex.kernels.sketch_mass import Sizes, Sketch
from stem_flex.kernels.sketch_proxies import Plane, proxies

WORKSPACE_BYTES = 192 * 2**20
"""Bytes that grow with a chunk's rows, unless ROWS rows of every head need more."""

MOST_WORKSPACE_BYTES = 512 * 2**20
"""Most such bytes (more only if 16 rows of every head need more)."""

ROWS = 128  # tuning: every chunk reads all key proxies again, from memory where they do not fit L2


def limits() -> tuple[int, int, int]:
    """The constants that chunks are cut by."""
    return WORKSPACE_BYTES, MOST_WORKSPACE_BYTES, ROWS


class Chunks:
    """Scores of the rows of one call, chunk by chunk.

    Args:
        q: (B, Hq, Lq, D); k: (B, Hkv, Lk, D).
        rows: int32 (B or 1, Qb, 8). restrictions: classes (int8, last stride 1), key_start, key_end, query_start,
            query_end, each may be None.
        sizes: of the sketch that decides.
        coarse: outliers of queries and of keys of the sketch that proposes, beside a block's mean; None: every pair is
            looked at by ``sizes``.
        capacity: most blocks of a row that are proposed.
        threshold: a number, or a float32 tensor of three dimensions that broadcasts to (B, Hq, Qb).
    """

    def __init__(
        self, q: Tensor, k: Tensor, rows: Tensor, restrictions: tuple[Tensor | None, ...], sizes: Sizes,
        coarse: tuple[int, int] | None, capacity: int, threshold: Tensor | float, causal_offset: int | None, plan: Plan,
    ) -> None:  # fmt: skip
        self.q, self.rows, self.restrictions, self.threshold, self.plan = q, rows, restrictions, threshold, plan
        self.sketches = (sizes,)
        self.capacity = 0
        if coarse is not None:
            self.sketches = (sizes, sizes._replace(sketch=Sketch(coarse[0], 1, coarse[1], 1)))
            self.capacity = min(capacity, sizes.k_blocks)
        self.cut = self._cut(q.element_size(), causal_offset)
        height = max(chunk.height for chunk in self.cut)
        self.keys = self._empty(k, [each.keys for each in self.sketches])
        self.queries = self._empty(q, [each.queries(height) for each in self.sketches])
        self.room = sketch_mass.room_for(self.sketches[-1], self.cut, q)
        lists = sizes.heads * height
        of_proxies = lists * sum(sizes.sketch[:2])
        self.listed = torch.empty(lists * self.capacity, dtype=torch.int32, device=q.device)
        found = of_proxies * places(self.capacity)
        self.found_sums = torch.empty(found, dtype=self.room.sums.dtype, device=q.device)
        self.found_tops = torch.empty(found // sketch_fine.TILE, dtype=torch.float32, device=q.device)
        _, key_start, key_end, _, _ = restrictions
        planes = [each.keys for each in self.sketches]
        self._make(k, key_start, key_end, self.keys, planes, 0, sizes.k_blocks, "keys")

    def score(
        self, chunk: Chunk, out: Tensor, head_stride: int, row_stride: int, *, full: bool, counts: Tensor | None = None
    ) -> None:
        """Score one chunk into float32 ``out``: rows ``row_stride`` elements apart, heads (of B*Hq) ``head_stride``.

        Args:
            full: write every pair of the chunk, -inf where the layout does not allow it; else only the allowed pairs.
            counts: int32 (B, Hq, Qb), contiguous, or None: gets how many allowed pairs of each of the chunk's rows
                score above the threshold.
        """
        _, _, _, query_start, query_end = self.restrictions
        planes = [each.queries(chunk.height) for each in self.sketches]
        self._make(self.q, query_start, query_end, self.queries, planes, chunk.row, chunk.height, "queries")
        places = chunk, head_stride, row_stride
        sketch_mass.score_rows(
            self.queries[-1], self.keys[-1], self.rows, self.restrictions, out, *places, self.sketches[-1], self.room,
            self.plan, full=full, counts=None if self.capacity else counts, threshold=self.threshold,
        )  # fmt: skip
        if self.capacity:
            decide(
                self.queries[0], self.keys[0], *self.room, self.rows, self.restrictions, out, self.listed,
                self.found_sums, self.found_tops, *places, Fine(*self.sketches, self.capacity), self.plan,
                counts=counts, threshold=self.threshold,
            )  # fmt: skip

    def _cut(self, item_size: int, causal_offset: int | None) -> tuple[Chunk, ...]:
        sizes, summed = self.sketches[0], self.sketches[-1]
        item = 4 if item_size == 4 else 2
        column = sizes.heads * sum(summed.sketch[:2]) * item
        found = sum(sizes.sketch[:2]) * places(self.capacity)
        row = sizes.heads * (4 * self.capacity + item * found + 4 * found // sketch_fine.TILE)
        most = ROWS * (row + column * aligned(sizes.k_blocks))
        workspace = max(WORKSPACE_BYTES, min(MOST_WORKSPACE_BYTES, most))
        blocks = sizes.q_blocks, sizes.k_blocks, sizes.block_q, sizes.block_k
        return cut(*blocks, causal_offset, row, column, workspace)

    def _empty(self, like: Tensor, planes: list[Plane]) -> list[Tensor]:
        sizes = [like.shape[0] * plane.heads * plane.stride_h for plane in planes]
        return [torch.empty(size, dtype=like.dtype, device=like.device) for size in sizes]

    def _make(
        self, x: Tensor, start: Tensor | None, end: Tensor | None, made: list[Tensor], planes: list[Plane], row: int,
        count: int, slot: str,
    ) -> None:  # fmt: skip
        coarse = (made[1], planes[1]) if len(planes) == 2 else None
        proxies(x, start, end, made[0], planes[0], self.plan, row=row, count=count, slot=slot, coarse=coarse)
