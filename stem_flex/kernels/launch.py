"""Launch kernels cheaply: bind and specialise once for each kind of call, then reuse the compiled kernel.

Triton's launcher inspects every argument of every call, 30 microseconds and more for a kernel of 30 arguments. A plan
keeps, for one kind of call, the compiled kernel of each of its launches, and later calls hand the arguments straight to
it. The caller's key must hold everything that Triton specialises on: dtypes, integers, None, pointers' alignment. The
grid, which is bound too, is in the key of each launch.
"""

from collections.abc import Callable, Hashable

from triton.runtime.jit import JITFunction

Plan = dict[Hashable, tuple[Callable, tuple]]

MOST_PLANS = 512

_plans: dict[Hashable, Plan] = {}


def plan_of(key: Hashable) -> Plan:
    """The plan of a kind of call; a new key starts an empty one."""
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= MOST_PLANS:
            _plans.pop(next(iter(_plans)))
        plan = _plans[key] = {}
    return plan


def launch(kernel, programs: int, args: tuple, meta: dict[str, object], plan: Plan, slot: Hashable) -> None:
    """``kernel[(programs,)](*args, **meta)``; ``slot`` tells the plan's launches apart.

    ``args`` are the kernel's parameters in order, its constexprs, which come last, are in ``meta``.
    """
    known = plan.get((slot, programs))
    if known is not None:
        run, constants = known
        run(*args, *constants)
        return
    grid = (programs, 1, 1)
    compiled = kernel[grid](*args, **meta)
    if isinstance(kernel, JITFunction):  # the interpreter compiles nothing
        plan[slot, programs] = compiled[grid], tuple(meta[name] for name in kernel.arg_names if name in meta)
