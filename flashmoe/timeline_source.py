"""Whose calls a timeline is of: workers of a group on the CPU, or blocks of ranks on GPUs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from . import _C, cuda_teams, groups
from .cuda_groups import CudaGroup
from .hosts import machine_id
from .timeline import EVENT, RankTrace
from .virtual_ranks import VirtualRanks

# Events of one worker and call. A GPU has a hundred blocks, whose memory is there whether used or not.
_EVENTS_OF_A_WORKER, _EVENTS_OF_A_BLOCK = 1 << 16, 1 << 13

_lock = threading.Lock()
_claimed: list[Any] = []


class Source(Protocol):
    """Calls that can be traced.

    Attributes:
        maker: what notes them, for one timeline at a time.
        name: for messages.
    """

    maker: Any
    name: str

    def start(self, max_events: int | None) -> None: ...
    def stop(self) -> None: ...
    def ranks(self) -> list[RankTrace]:
        """Of the last call since start: the ranks that this process holds."""


def source_of(group: Any) -> Source:
    """What makes the calls of ``group``: as of the layer, or a VirtualRanks; None: the layers of one process."""
    if isinstance(group, VirtualRanks):
        return _Blocks("VirtualRanks", group.team, group.device, range(group.ep_size))
    if group is None:
        with groups.local.lock:
            return _OneRank(None, groups.local.acquire())
    name = groups.name_of(group)
    found = groups.find(name)
    if isinstance(found, CudaGroup):
        return _Blocks(f"group {name!r}", found.team, found.device.index, [found.ep_rank])
    return _OneRank(name, found) if found.ep_size == 1 else _Workers(f"group {name!r}", found)


@contextlib.contextmanager
def claimed(source: Source) -> Iterator[None]:
    """
    Raises:
        RuntimeError: somebody else traces these calls, and would lose what was noted.
    """
    with _lock:
        if any(maker is source.maker for maker in _claimed):
            raise RuntimeError(f"trace: {source.name} is being traced already; leave that trace() before the next")
        _claimed.append(source.maker)
    try:
        yield
    finally:
        with _lock:
            _claimed[:] = [maker for maker in _claimed if maker is not source.maker]


def rank_of_blocks(lists: Sequence[tuple[bytes, int, int]], rank: int, clock: str) -> RankTrace:
    """A rank's lists (csrc/kernel/block_trace.h) by block: what arrived was seen by the first, the last published."""
    events = [np.frombuffer(kept, EVENT) for kept, _, _ in lists]
    *blocks, arrived, published = events
    blocks[0] = _by_end(blocks[0], arrived)
    blocks[-1] = _by_end(blocks[-1], published)
    lost = sum(count - len(kept) for (_, count, _), kept in zip(lists, events, strict=True))
    lanes = [f"SM {lists[block][2]}, block {block}" for block in range(len(blocks))]
    return RankTrace(rank, blocks, lost, lanes, clock)


class _Workers:
    def __init__(self, name: str, group: _C.Group) -> None:
        self.name = name
        self.maker = self.group = group

    def start(self, max_events: int | None) -> None:
        self.group.set_trace(max_events or _EVENTS_OF_A_WORKER)

    def stop(self) -> None:
        self.group.set_trace(0)

    def ranks(self) -> list[RankTrace]:
        workers, lost = self.group.trace()
        return [RankTrace(self.group.ep_rank, [np.frombuffer(one, EVENT) for one in workers], lost, clock=machine_id())]


class _Blocks:
    def __init__(self, name: str, team: _C.CudaTeam, device: int, ranks: Sequence[int]) -> None:
        self.name, self.device, self.numbers = name, device, ranks
        self.maker = self.team = team

    def start(self, max_events: int | None) -> None:
        self.team.set_trace(max_events or _EVENTS_OF_A_BLOCK)

    def stop(self) -> None:
        self.team.set_trace(0)

    def ranks(self) -> list[RankTrace]:
        clock = f"GPU {torch.cuda.get_device_properties(self.device).uuid}"
        traced = zip(self.numbers, self.team.trace(), strict=True)
        return [rank_of_blocks(lists, number, clock) for number, lists in traced]


class _OneRank:
    """A rank alone: its calls are where their tensors are. A call on a GPU hides those on the CPU."""

    def __init__(self, key: str | None, group: _C.Group) -> None:
        self.key, self.maker = key, group
        self.name = "the process's own group (group=None)" if key is None else f"group {key!r}"
        self.workers = _Workers(self.name, group)

    def start(self, max_events: int | None) -> None:
        cuda_teams.start_trace(self.key, max_events or _EVENTS_OF_A_BLOCK)
        self.workers.start(max_events)

    def stop(self) -> None:
        self.workers.stop()
        cuda_teams.stop_trace(self.key)

    def ranks(self) -> list[RankTrace]:
        last = cuda_teams.traced_last(self.key)
        return self.workers.ranks() if last is None else _Blocks(self.name, *last, [0]).ranks()


def _by_end(events: np.ndarray, others: np.ndarray) -> np.ndarray:
    both = np.concatenate([events, others])
    return both[np.argsort(both["end"], kind="stable")]
