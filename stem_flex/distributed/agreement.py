"""Ranks that agree before and after each collective, so that the failure of one is an error of all and no hang.

Every rank posts a word into the key-value store of its process group and reads the others'. That takes the hosts a
fraction of a millisecond and waits for no device: kernels that are queued go on running.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

TIMEOUT = 600.0  # seconds: a first call may compile for minutes on one rank and find a cache on another
_T = TypeVar("_T")
_GAVE_UP = json.dumps({"failed": "it gave up waiting for this rank"})
_meetings: weakref.WeakKeyDictionary[Any, Meeting] = weakref.WeakKeyDictionary()


class Meeting:
    """Where the ranks of one process group meet. All of them must go through the same meetings in the same order."""

    def __init__(self, group: dist.ProcessGroup):
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        own = getattr(group, "get_group_store", None)
        store = dist.distributed_c10d._get_default_store() if own is None else own()
        place = dist.PrefixStore(f"stem_flex.distributed/{group.group_name}", store)
        # a group that was destroyed may have left words in a store that outlives it
        generation = (place.add("came", 1) - 1) // self.world
        self.store = dist.PrefixStore(str(generation), place)
        self.turn = 0

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Meeting:
        """The group's meeting place."""
        if group not in _meetings:
            _meetings[group] = cls(group)
        return _meetings[group]

    def agree(self, what: str, timeout: float, work: Callable[[], _T], facts: Callable[[_T], Mapping[str, Any]]) -> _T:
        """``work()`` on every rank, or an error on every rank.

        Args:
            what: names the call in messages.
            timeout: seconds to wait for the other ranks.
            work: what may fail on one rank alone. It waits for other ranks at most where all have agreed to meet.
            facts: of its result, what must be the same on all ranks, as text or numbers.

        Raises:
            RuntimeError: another rank failed, with its message, or did not come in time.
            ValueError: ranks differ in a fact.
            Exception: what ``work`` raised on this rank.
        """
        try:
            result = work()
            word = {"facts": {name: str(value) for name, value in facts(result).items()}}
        except BaseException as error:
            self._meet(json.dumps({"failed": f"{type(error).__name__}: {error}"}), timeout, wait=False)
            raise
        words = [json.loads(word) for word in self._meet(json.dumps(word), timeout)]
        failed = [f"rank {rank}: {word['failed']}" for rank, word in enumerate(words) if "failed" in word]
        if failed:
            raise RuntimeError(f"{what} failed on another rank, so it is off on rank {self.rank} too; {failed[0]}")
        _compare(what, [word["facts"] for word in words])
        return result

    def _meet(self, word: str, timeout: float, wait: bool = True) -> list[bytes]:
        turn, self.turn = self.turn, self.turn + 1
        keys = [f"{turn}/{rank}" for rank in range(self.world)]
        self.store.set(keys[self.rank], word)
        if not wait:
            return []
        try:
            self.store.wait(keys, timedelta(seconds=timeout))
        except RuntimeError as error:
            missing = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
            self.store.set(keys[self.rank], _GAVE_UP)  # who comes late must not start alone
            if not missing:
                raise
            raise RuntimeError(
                f"ranks {missing} did not come within {timeout:g} s, says rank {self.rank}; they failed elsewhere, "
                "make other calls than this rank, or need a longer timeout"
            ) from error
        words = self.store.multi_get(keys)
        if turn >= 2:  # all who are here have read the words of the turn before
            self.store.delete_key(f"{turn - 2}/{self.rank}")
        return words


def _compare(what: str, facts: list[dict[str, str]]) -> None:
    for name, value in facts[0].items():
        for rank, other in enumerate(facts):
            if other.get(name) != value:
                raise ValueError(
                    f"{what} needs the same {name} on every rank, got {value} on rank 0 and {other.get(name)} on "
                    f"rank {rank}"
                )
