"""GPUs and NVSHMEM for ranks that have neither: the collective calls meet in torch's store, addresses are numbers.

``install`` makes a rank's process believe in them; the process is of no other use afterwards.
"""

import os
import time
import types
import weakref

import numpy as np
import torch
import torch.distributed as dist

from flashmoe import _C, cuda_teams, nvshmem
from flashmoe.timeline import ARRIVED, EVENT, SEND

_PATIENCE_S = 20.0
_BASE = 0x7F00_0000_0000  # where the symmetric heap lies on every rank
_FAR = 0x100_0000_0000  # between the places where a rank maps the heaps of others


class Arena:
    def __init__(self, world: "World", number: int, address: int, num_bytes: int):
        self.number, self.address, self.bytes = number, address, num_bytes
        self.mapped = [
            0 if pe in world.plan.unmapped else address + (_FAR * (pe + 1) if pe != world.rank else 0)
            for pe in range(world.plan.ranks)
        ]
        self._idle = weakref.finalize(self, world.idle_numbers.append, number)

    def leak(self) -> None:
        self._idle.detach()


class World:
    """Stands in for ``_C.NvshmemWorld``: one a process, whose collective calls must be made alike."""

    one: "World | None" = None
    plan = types.SimpleNamespace()

    def __init__(self, home: str, folders: list[str]):
        World.one = self
        self.rank, self.is_ready, self.foreign, self.abandoned = dist.get_rank(), False, False, ""
        self.idle_numbers, self.freed, self.calls, self._end = [], [], [], _BASE
        self._meetings = 0

    @property
    def ready(self) -> bool:
        return self.is_ready and not self.abandoned

    @property
    def state(self) -> str:
        if self.abandoned:
            return f"left as it is, since {self.abandoned}"
        return "initialised" if self.is_ready else self.plan.state

    @property
    def allocated(self) -> int:
        return self._end - _BASE

    @property
    def pe(self) -> int:
        return self.rank

    @property
    def size(self) -> int:
        return self.plan.ranks

    def _meet(self, call: str) -> None:
        assert not self.abandoned, f"{call} after {self.abandoned}"
        if self.plan.dies_in == call.split()[0]:
            os._exit(0)
        self.calls.append(call)
        self._meetings += 1
        store = dist.PrefixStore(f"fake/{self._meetings}", dist.distributed_c10d._get_default_store())
        store.set(str(self.rank), call)
        deadline = time.monotonic() + _PATIENCE_S
        for other in range(self.plan.ranks):
            while not store.check([str(other)]):
                assert time.monotonic() < deadline, f"{call} waits for ever for rank {other}"
                time.sleep(0.005)
            assert store.get(str(other)).decode() == call, "collective calls that differ"

    def unique_id(self) -> bytes:
        assert self.rank == 0, "one rank alone makes the id"
        return b"the id".ljust(128)

    def initialize(self, unique_id: bytes, rank: int, size: int, device: int, modules: list[int]) -> None:
        assert unique_id == b"the id".ljust(128) and rank == self.rank and not self.is_ready
        self.heap_asked = os.environ.get("NVSHMEM_SYMMETRIC_SIZE")
        self._meet("initialize")
        self.device, self.is_ready = device, True

    def allocate(self, num_bytes: int) -> Arena:
        self._meet(f"allocate {num_bytes}")
        number = sum(call.startswith("allocate") for call in self.calls)
        if self.plan.exhausted == number:
            raise RuntimeError(f"no {num_bytes} bytes of symmetric memory left on PE {self.rank}")
        address, self._end = self._end, self._end + num_bytes
        return Arena(self, number, address, num_bytes)

    def idle(self) -> list[int]:
        return sorted(self.idle_numbers)

    def free(self, number: int) -> None:
        self.idle_numbers.remove(number)
        self._meet(f"free {number}")
        self.freed.append(number)

    def finalize(self) -> bool:
        self._meet("finalize")
        self.is_ready = False
        return True

    def abandon(self, why: str) -> None:
        self.abandoned = why


class Team:
    """Stands in for ``_C.CudaTeam``: what it was made of, and what it answers."""

    made: list["Team"] = []

    def __init__(self, device: int, limits: _C.Limits, **given: object):
        self.device, self.limits, self.answer = device, limits, None
        self.__dict__.update(given)
        Team.made.append(self)

    @staticmethod
    def stage_bytes(limits: _C.Limits) -> int:
        return 1000 * limits.ep_size

    def check(self) -> None:
        if self.answer:
            raise _C.PeerError(self.answer)

    def stats(self, layer: int) -> dict[str, list[int]]:
        return {"tokens_per_expert": [layer]}

    def set_trace(self, max_events: int) -> None:
        self.max_events = max_events

    def trace(self) -> list[list[tuple[bytes, int, int]]]:
        """One chunk to the next rank of the ring and one from the rank before, 20 ns under way, by a clock that is a
        second ahead of the rank before."""
        assert self.max_events, "what it noted is gone"
        rank, size, ahead = self.ep_rank, self.limits.ep_size, self.ep_rank * 10**9
        lists = [(SEND, 1000, 1050, (rank + 1) % size, 0)], [(ARRIVED, 1070, 1070, (rank - 1) % size, 1)], []
        made = [np.zeros(len(rows), EVENT) for rows in lists]
        for events, rows in zip(made, lists, strict=True):
            for event, (kind, begin, end, other, chunk) in zip(events, rows, strict=True):
                event["kind"], event["index"], event["part"] = kind, other, chunk
                event["begin"], event["end"], event["loads"] = begin + ahead, end + ahead, begin + ahead
        return [[(events.tobytes(), len(events), 17 + rank) for events in made]]


def install(
    gpus: int = 8, free: int = 2**34, version: str = "3.7.2", unmapped: tuple[int, ...] = (), exhausted: int = 0,
    dies_in: str = "", state: str = "not initialised", kernels: bool = True, ibgda: str = "",
) -> None:  # fmt: skip
    """The rank has so many GPUs, each with that much free memory.

    ``unmapped``: ranks whose memory it cannot map. ``exhausted``: the allocation that gets nothing here. ``dies_in``:
    the collective call in which this process ends. ``state``: of the library, before. ``kernels``: the build has those
    for memory that is not mapped. ``ibgda``: what the user has set NVSHMEM's variable to.
    """
    os.environ["NVSHMEM_IB_ENABLE_IBGDA"] = ibgda
    World.plan.__dict__.update(ranks=dist.get_world_size(), unmapped=unmapped, exhausted=exhausted, dies_in=dies_in, state=state)
    nvshmem._GRACE_S = 1.0
    _C.NvshmemWorld, _C.CudaTeam, _C.nvshmem_modules = World, Team, lambda: []
    _C.has_nvshmem_kernels = lambda: kernels
    nvshmem.library = lambda: {"path": "libnvshmem_host.so.3", "found": "a fake", "version": version}
    cuda_teams.has_cuda = lambda: gpus > 0
    cuda = torch.cuda
    cuda.is_available, cuda.device_count, cuda.is_initialized = (lambda: gpus > 0), (lambda: gpus), (lambda: False)
    cuda.set_device = lambda device: None
    cuda.get_device_properties = lambda device: types.SimpleNamespace(
        name="a GPU", uuid=f"gpu-{device if type(device) is int else device.index}"
    )
    cuda.mem_get_info = lambda device: (free - (World.one.allocated if World.one else 0), free)
