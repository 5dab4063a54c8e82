"""One generation of the arena over the torch world: how its ranks agree on it, and how some of them form a group."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from . import nvshmem
from ._C import Group, PeerError
from .arena import Arena, build_arena
from .cuda_arena import CudaArena, build_cuda_arena, device_of_rank
from .cuda_groups import CudaGroup
from .cores import share_of_cores
from .hosts import machine_id
from .rendezvous import Rendezvous
from .settings import Settings, num_workers_asked


@dataclasses.dataclass
class World:
    """What one successful ``init()`` or ``reserve()`` made.

    Attributes:
        process_group: torch's world at that time.
        store: a ``torch.distributed.Store`` whose keys belong to this generation alone.
        device: where this rank computes: the CPU, or one GPU.
        arena: None in a world of one rank; a CudaArena if ranks are GPUs.
        groups: by name, those that took their heap from the arena.
        broken: by name, why a group could not be made.
    """

    process_group: Any
    store: Any
    rank: int
    size: int
    generation: int
    settings: Settings
    num_workers: int
    device: torch.device
    arena: Arena | None
    groups: dict[str, Group | CudaGroup] = dataclasses.field(default_factory=dict)
    broken: dict[str, tuple[type[Exception], str]] = dataclasses.field(default_factory=dict)

    def failed(self) -> bool:
        return bool(self.broken) or any(group.failed for group in self.groups.values())

    def settle(self) -> None:
        """Collective, once no rank holds what was before: GPUs' memory is freed by all or by none."""
        if isinstance(self.arena, CudaArena):
            nvshmem.free_idle(self.arena.rendezvous, "idle after", self.settings.timeout_s)

    def close(self) -> None:
        if isinstance(self.arena, CudaArena) and self.failed():
            self.arena.leak()
        self.groups.clear()
        if self.arena is not None:
            self.arena.close()


def next_world(
    call: str,
    generation: int,
    current: World | None,
    plan: Callable[[], Settings],
    num_workers: int | None,
    device: Any,
    timeout_s: float,
) -> World | None:
    """One attempt of all ranks to agree on the settings, and a new world if they need one; None if they do not.

    Args:
        call: "init" or "reserve".
        generation: a number that no earlier attempt had; all ranks count alike.
        current: what this rank has now.
        plan: the settings this rank wants; what it raises, every rank raises.
        device: where this rank wants to compute, as ``init`` takes it.
        timeout_s: how long ranks may come late.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    store = dist.PrefixStore(f"flashmoe/{generation}", dist.distributed_c10d._get_default_store())
    rendezvous = Rendezvous(
        dist.PrefixStore("world", store),
        rank,
        range(size),
        f"call flashmoe.distributed.{call}() for the same time (here: number {generation})",
        current.arena.is_alive if current is not None and current.arena is not None else None,
    )

    def ask() -> dict[str, Any]:
        places.append(device_of_rank(device, current.device if current is not None else None))
        settings = plan().changed({"device": places[-1].type})
        return {
            "call": call,
            "settings": dataclasses.asdict(settings),
            "moves": current is not None and current.device != places[-1],
            "num_workers": num_workers_asked(num_workers),
            "current": dataclasses.asdict(current.settings) if current is not None else None,
            "used": current is not None and bool(current.groups),
            "failed": current is not None and current.failed(),
            "cores": sorted(os.sched_getaffinity(0)),
            "machine": machine_id(),
        }

    places: list[torch.device] = []
    asked = rendezvous.exchange("ask", ask, timeout_s)
    _check_agreement(asked)
    mine = asked[rank]
    settings = Settings(**mine["settings"])
    whole = all(other["current"] is not None for other in asked) and not any(other["failed"] for other in asked)
    if whole and all(other["settings"] == other["current"] and not other["moves"] for other in asked):
        return None
    if whole and call == "init" and any(other["used"] for other in asked):
        changed = [name for name, value in mine["settings"].items() if value != mine["current"][name]]
        raise RuntimeError(
            f"init() was already called with {_listing(mine['current'], changed)}, got "
            f"{_listing(mine['settings'], changed)}, and groups are in use: grow with "
            f"flashmoe.distributed.reserve(), or call flashmoe.distributed.finalize() on every rank before"
        )
    place = places[-1]
    if place.type == "cuda":
        torch.cuda.set_device(place)
    arena = None
    if size > 1:
        cuda = place.type == "cuda"
        arena = (
            build_cuda_arena(rendezvous, settings, place) if cuda
            else build_arena(rendezvous, settings.arena_bytes(size), settings.timeout_s, settings.transport)
        )  # fmt: skip
    workers = mine["num_workers"] or share_of_cores(
        mine["cores"], [other["cores"] for other in asked if other["machine"] == mine["machine"]]
    )
    return World(dist.group.WORLD, store, rank, size, generation, settings, workers, place, arena)


def join_group(world: World, name: str, members: list[int]) -> Group | CudaGroup:
    """The group of the global ranks ``members``, made with them alone at its first use.

    Raises:
        PeerError: a member ended, did not come in time, gave up, or has made another group of this name.
        RuntimeError: a member's arena is full. What was raised once is raised again at every call.
    """
    if name in world.groups:
        return world.groups[name]
    if name in world.broken:
        kind, text = world.broken[name]
        raise kind(text)
    try:
        world.groups[name] = _join(world, name, members)
    except BaseException as error:
        kind = type(error) if isinstance(error, Exception) else PeerError
        world.broken[name] = (kind, str(error) or f"joining group {name!r} was interrupted")
        raise
    return world.groups[name]


def _join(world: World, name: str, members: list[int]) -> Group | CudaGroup:
    settings, arena = world.settings, world.arena
    limits = settings.limits(len(members))
    waiting = dist.PrefixStore("waiting", world.store)

    def rendezvous_of(group: str, ranks: list[int]) -> Rendezvous:
        return Rendezvous(
            dist.PrefixStore(f"group/{group}", world.store),
            world.rank,
            ranks,
            f"join group {group!r} {ranks}",
            arena.is_alive,
            look_for_mutual_wait,
        )

    def look_for_mutual_wait(missing: list[int]) -> None:
        # A member that waits for us in a group we have not joined cannot come here, nor can we go there.
        for member in missing:
            if not waiting.check([str(member)]):
                continue
            other, *others = waiting.get(str(member)).decode().split("\n")
            if other in ("", name, *world.groups) or str(world.rank) not in others:
                continue
            error = PeerError(
                f"mismatched groups: rank {world.rank} waits for rank {member} in group {name!r} {members}, "
                f"rank {member} waits for rank {world.rank} in group {other!r} [{', '.join(others)}]"
            )
            rendezvous_of(other, [int(rank) for rank in others]).give_up(error)  # so that it hears of it at once
            world.broken[other] = (PeerError, str(error))
            raise error

    rendezvous = rendezvous_of(name, members)
    made: list[Group | CudaGroup] = []

    def make() -> None:
        offsets = [entry["offset"] for entry in entries]
        if isinstance(arena, CudaArena):
            made.append(arena.make_group(name, members, members.index(world.rank), limits, offsets, settings))
            return
        group = Group(
            name,
            members.index(world.rank),
            limits,
            [arena.segments[member] for member in members],
            offsets,
            [arena.peers.pids[member] for member in members],
            members,
            arena.network(members, offsets),
            remote_only_seed=settings.remote_only_seed(world.rank),
            timeout_s=settings.timeout_s,
            entry_timeout_s=settings.entry_timeout_s,
            num_workers=world.num_workers,
        )
        made.append(group)

    waiting.set(str(world.rank), "\n".join([name, *map(str, members)]))
    try:
        entries = rendezvous.exchange(
            "join",
            lambda: {"members": members, "offset": arena.take(limits.heap_bytes)},
            settings.entry_timeout_s,
        )
        for member, entry in zip(members, entries, strict=True):
            if entry["members"] != members:
                raise PeerError(
                    f"mismatched groups: group {name!r} is {members} on rank {world.rank} and "
                    f"{entry['members']} on rank {member}"
                )
        rendezvous.exchange("made", make, settings.timeout_s)
        # A peer that ended before our group could watch it would be noticed by nobody later.
        rendezvous.check_on([member for member in members if member != world.rank])
    finally:
        waiting.set(str(world.rank), "")
    return made[0]


def _check_agreement(asked: list[dict[str, Any]]) -> None:
    def by_rank(values: list[Any]) -> str:
        return ", ".join(f"{value!r} on rank {rank}" for rank, value in enumerate(values))

    calls = [other["call"] for other in asked]
    if len(set(calls)) > 1:
        raise ValueError(f"all ranks must call the same function of flashmoe.distributed, got {by_rank(calls)}")
    for name in asked[0]["settings"]:
        values = [other["settings"][name] for other in asked]
        if any(value != values[0] for value in values):
            raise ValueError(f"{name} must be equal on all ranks, got {by_rank(values)}")


def _listing(settings: dict[str, Any], names: list[str]) -> str:
    return ", ".join(f"{name}={settings[name]!r}" for name in names)
