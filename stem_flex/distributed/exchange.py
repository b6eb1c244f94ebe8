"""Rows of all ranks on every rank, by point-to-point sends straight to where they belong."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from stem_flex.distributed.agreement import TIMEOUT, Meeting
from stem_flex.distributed.split import Split


def unshard(
    x: Tensor, split: Split, *, dim: int = 2, group: dist.ProcessGroup | None = None, timeout: float = TIMEOUT
) -> Tensor:
    """All rows of a tensor of which every rank holds its own: the inverse of :meth:`Split.shard`. Collective.

    Args:
        x: the rank's rows in dimension ``dim``, of one dtype and otherwise one shape on all ranks.
        split: which rows they are.
        group: process group, None is the default one; its backend must serve x's device.
        timeout: seconds to wait for the other ranks.

    Returns:
        The rows in their order, on every rank, in memory by rows: contiguous once ``dim`` is moved to the front.

    Raises:
        TypeError, ValueError: naming the argument, what was expected, what came.
        RuntimeError: another rank failed, or did not come in time.
    """
    group = group_of(group)

    def prepare() -> Tensor:
        check_group(group, split, x.device)
        if x.shape[dim] != split.rows(dist.get_rank(group)):
            raise ValueError(
                f"x must have the rank's {split.rows(dist.get_rank(group))} rows in dimension {dim}, "
                f"got {tuple(x.shape)}"
            )
        return placed(x, split, dist.get_rank(group), dim)

    def facts(whole: Tensor) -> dict[str, object]:
        return {"split": fingerprint(split), "shape but for rows": tuple(whole.shape), "dtype": whole.dtype}

    whole = Meeting.of(group).agree("unshard", timeout, prepare, facts)
    exchange([whole], split, group)
    return whole.movedim(0, dim)


def placed(x: Tensor, split: Split, rank: int, dim: int = 2) -> Tensor:
    """Memory for the rows of all ranks, rows first, (tokens, ...), with this rank's in their places."""
    rows = x.detach().movedim(dim, 0)
    whole = rows.new_empty((split.tokens, *rows.shape[1:]))
    done = 0
    for start, end in split.ranges[rank]:
        whole[start:end] = rows[done : done + end - start]
        done += end - start
    return whole


def exchange(wholes: Sequence[Tensor], split: Split, group: dist.ProcessGroup) -> None:
    """Fill in the other ranks' rows of ``wholes``, contiguous (tokens, ...) each.

    Every rank sends its ranges to every other, all in one batch and in both directions at once; each range of rows is
    one message and lands in its place, whatever the ranges' lengths. NCCL's are queued on the current stream.
    """
    rank = dist.get_rank(group)
    batch = []
    for step in range(1, split.world):
        to, source = (rank + step) % split.world, (rank - step) % split.world
        for whole in wholes:
            batch += [_message(dist.isend, whole[a:b], to, group) for a, b in split.ranges[rank]]
            batch += [_message(dist.irecv, whole[a:b], source, group) for a, b in split.ranges[source]]
    if batch:
        for work in dist.batch_isend_irecv(batch):
            work.wait()


def _message(way, rows: Tensor, peer: int, group: dist.ProcessGroup) -> dist.P2POp:
    return dist.P2POp(way, rows, group=group, group_peer=peer)


def group_of(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The process group that ``group`` stands for.

    Raises:
        RuntimeError, TypeError, ValueError: there is none, it is no group, or this process is not in it.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "torch.distributed must be initialised: start with torchrun and call init_process_group first"
        )
    if group is None:
        return dist.distributed_c10d._get_default_group()
    if not isinstance(group, dist.ProcessGroup):
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group must hold this process, which it does not; call it on the group's ranks only")
        raise TypeError(f"group must be a ProcessGroup or None, got {type(group).__name__}; mesh.get_group() of a mesh")
    return group


def check_group(group: dist.ProcessGroup, split: Split, device: torch.device) -> None:
    """Raise unless the split is for as many ranks as the group has, and the group's backend serves the device."""
    if not isinstance(split, Split):
        raise TypeError(
            f"split must be a Split, got {type(split).__name__}; stem_flex.distributed.balanced(tokens, world, config)"
        )
    world = dist.get_world_size(group)
    if split.world != world:
        raise ValueError(f"split must be over the group's {world} ranks, got {split.world}")
    try:
        group._get_backend(device)
    except RuntimeError as error:
        raise ValueError(
            f"group must have a backend for tensors on {device}, got {dist.get_backend(group)!r}; "
            "initialise it with 'nccl' for CUDA and 'gloo' for the CPU"
        ) from error
    if device.type == "cuda" and "nccl" not in type(group._get_backend(device)).__name__.lower():
        raise ValueError(f"group must move {device}'s tensors by NCCL, got {dist.get_backend(group)!r}; use 'nccl'")
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        raise ValueError(
            f"tensors must be on the current device cuda:{torch.cuda.current_device()}, got {device}; "
            "call torch.cuda.set_device(local_rank) first"
        )


def fingerprint(split: Split) -> str:
    """What tells one split from another, in short."""
    return f"{split.tokens} tokens, split {hash(split.ranges) & 0xFFFFFFFF:08x}"
