"""Launches reuse what was compiled for the same kind of call, and the grid is of the kind."""

from __future__ import annotations

from stem_flex.kernels import launch as launching


class Compiled:
    """What a kernel compiles to: runs on the grid that its runner was taken for."""

    def __init__(self, runs: list[tuple]):
        self.runs = runs

    def __getitem__(self, grid):
        return lambda *args: self.runs.append((grid[0], *args))


class Kernel:
    """Stands for a compiled Triton function, and notes its compilations and runs."""

    arg_names = ("x", "SIZE")

    def __init__(self):
        self.compilations = 0
        self.runs: list[tuple] = []

    def __getitem__(self, grid):
        def compile_and_run(x, SIZE):
            self.compilations += 1
            self.runs.append((grid[0], x, SIZE))
            return Compiled(self.runs)

        return compile_and_run


def test_a_plan_runs_each_call_on_its_own_grid(monkeypatch):
    monkeypatch.setattr(launching, "JITFunction", Kernel)
    monkeypatch.setattr(launching, "_plans", {})
    kernel = Kernel()
    for programs, x in ((2, "a"), (8, "b"), (2, "c"), (8, "d")):
        launching.launch(kernel, programs, (x,), {"SIZE": 4}, launching.plan_of("kind"), "slot")
    assert kernel.runs == [(2, "a", 4), (8, "b", 4), (2, "c", 4), (8, "d", 4)]
    assert kernel.compilations == 2


def test_the_oldest_plan_makes_room(monkeypatch):
    monkeypatch.setattr(launching, "_plans", {})
    monkeypatch.setattr(launching, "MOST_PLANS", 2)
    first = launching.plan_of("a")
    assert launching.plan_of("a") is first
    launching.plan_of("b")
    launching.plan_of("c")
    assert launching.plan_of("a") is not first
