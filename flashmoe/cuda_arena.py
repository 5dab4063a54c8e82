"""The symmetric memory of all ranks' GPUs, and the pieces that groups take from it: ``arena.py`` where ranks are GPUs."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import torch

from . import _C, cuda_teams, nvshmem
from .arena import Arena, PeerProcesses, round_up
from .cuda_groups import CudaGroup
from .rendezvous import Rendezvous
from .settings import Settings


def device_of_rank(asked: torch.device | str | None, current: torch.device | None) -> torch.device:
    """Where this rank is to compute: the CPU or one GPU, by index, as ``flashmoe.distributed.init`` says.

    Raises:
        ValueError: neither CPU nor GPU.
        RuntimeError: this rank can have no GPU.
    """
    if asked is None and current is not None:
        return current
    try:
        device = torch.get_default_device() if asked is None else torch.device(asked)
    except RuntimeError as error:
        raise ValueError(f"device must name the CPU or a GPU, got {asked!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be of type cpu or cuda, got {device}")
    if device.type == "cpu":
        return torch.device("cpu")
    if not (cuda_teams.has_cuda() and torch.cuda.is_available()):
        raise RuntimeError(
            "device='cuda' needs a GPU, its driver, and torch and flashmoe built for it; `flashmoe info` tells which "
            "of them is missing"
        )
    index, devices = device.index, torch.cuda.device_count()
    if index is None:
        local_rank = os.environ.get("LOCAL_RANK", "")
        index = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
        if index == 0 and local_rank.isdecimal():
            index = int(local_rank) % devices
    if index >= devices:
        raise RuntimeError(f"device must be one of {devices} GPUs here, got cuda:{index}")
    return torch.device("cuda", index)


class CudaArena(Arena):
    """One allocation at one address on every GPU, and the bytes of our own that groups have taken so far.

    Attributes:
        device: of this rank.
        heaps: the groups' heaps; everybody's are mapped here, or reached through the network.
        stages: memory from which this rank sends where nothing is mapped; None if every rank maps every other.
        ranks: by rank: host, device, uuid, its number in the transport, and the ranks it does not map.
        rendezvous: of all ranks, in this generation.
    """

    def __init__(
        self, rendezvous: Rendezvous, device: torch.device, heaps: Any, stages: Any, ranks: list[dict[str, Any]],
        peers: PeerProcesses,
    ) -> None:  # fmt: skip
        super().__init__([], peers, heaps.bytes)
        self.rendezvous, self.device, self.heaps, self.stages, self.ranks = rendezvous, device, heaps, stages, ranks
        self._staged_bytes = 0

    def make_group(
        self, name: str, members: list[int], ep_rank: int, limits: _C.Limits, offsets: list[int], settings: Settings
    ) -> CudaGroup:
        """This rank's membership, where ``offsets`` says what each member has taken from its own part."""
        heaps = self.heaps
        mapped = [heaps.mapped[self.ranks[m]["pe"]] for m in members]
        stage = stage_bytes = 0
        if not all(mapped):
            stage_bytes = _C.CudaTeam.stage_bytes(limits)
            stage = self.stages.address + self._take_stage(stage_bytes)
        team = _C.CudaTeam(
            self.device.index, limits, timeout_s=settings.timeout_s, entry_timeout_s=settings.entry_timeout_s,
            sm_margin=cuda_teams.sm_margin_asked(), name=name, ep_rank=ep_rank, global_ranks=members,
            mapped=[base and base + offset for base, offset in zip(mapped, offsets, strict=True)],
            symmetric=[heaps.address + offset for offset in offsets],
            pes=[self.ranks[m]["pe"] for m in members], stage=stage, stage_bytes=stage_bytes,
            backward_bytes=cuda_teams.backward_bytes_asked(),
            keep=[heaps, *([self.stages] if stage else [])],
        )  # fmt: skip
        return CudaGroup(team, name, ep_rank, limits, self.device, members, self.peers)

    def leak(self) -> None:
        """A group has failed: a peer may still write here."""
        nvshmem.leave_as_it_is()
        for memory in (self.heaps, self.stages):
            if memory is not None:
                memory.leak()

    def close(self) -> None:
        self.heaps = self.stages = None  # idle once no group holds them any more
        super().close()

    def _take_stage(self, num_bytes: int) -> int:
        needed, left = round_up(num_bytes), self.stages.bytes - self._staged_bytes
        if needed > left:
            raise RuntimeError(
                f"the arena is full: a group needs {needed} bytes to send from, {left} are left; init() with a larger "
                f"max_groups, or call flashmoe.distributed.reserve(max_groups=…)"
            )
        offset = self._staged_bytes
        self._staged_bytes += needed
        return offset


def build_cuda_arena(rendezvous: Rendezvous, settings: Settings, device: torch.device) -> CudaArena:
    """Allocate on every rank's GPU and map what can be mapped; a collective over ranks 0 … W − 1 of the world.

    Raises:
        RuntimeError: what NVSHMEM lacks, or too little memory on a GPU; on every rank.
        PeerError: a rank did not come in time.
    """
    found = rendezvous.exchange("process", _process, settings.timeout_s)
    here = found[rendezvous.rank]["visible"]
    peers = PeerProcesses([other["pid"] if other["visible"] == here else 0 for other in found])
    rendezvous.is_alive = peers.is_alive  # before anybody waits in the library, which would not notice
    try:
        return _build(rendezvous, settings, device, peers)
    except BaseException:
        peers.close()
        raise


def _build(rendezvous: Rendezvous, settings: Settings, device: torch.device, peers: PeerProcesses) -> CudaArena:
    world_size, timeout_s = len(rendezvous.members), settings.timeout_s
    num_bytes = settings.arena_bytes(world_size)
    stage_bytes = settings.max_groups * round_up(_C.CudaTeam.stage_bytes(settings.limits(world_size)))
    nvshmem.initialize(rendezvous, device.index, num_bytes + stage_bytes, timeout_s)
    nvshmem.free_idle(rendezvous, "idle before", timeout_s)

    ranks = rendezvous.exchange("gpu", lambda: _gpu(device), timeout_s)
    _check_memory("symmetric heap", ranks, num_bytes)
    heaps = nvshmem.allocate(rendezvous, "heaps", num_bytes, timeout_s)
    pe_of = [rank["pe"] for rank in ranks]
    unmapped = rendezvous.exchange(
        "unmapped", lambda: [rank for rank, pe in enumerate(pe_of) if not heaps.mapped[pe]], timeout_s
    )
    if any(unmapped):
        rendezvous.exchange("network", nvshmem.check_network, timeout_s)
        free = rendezvous.exchange("free", lambda: _free(device), timeout_s)
        left = [rank | {"free": num_free} for rank, num_free in zip(ranks, free, strict=True)]
        _check_memory("memory to send from", left, stage_bytes)
    stages = nvshmem.allocate(rendezvous, "stages", stage_bytes, timeout_s) if any(unmapped) else None
    for rank, not_mapped in zip(ranks, unmapped, strict=True):
        rank["unmapped"] = not_mapped
    return CudaArena(rendezvous, device, heaps, stages, ranks, peers)


def _process() -> dict[str, Any]:
    # A number names a process on one host, and there in one namespace.
    return {"pid": os.getpid(), "visible": [_boot_id(), os.readlink("/proc/self/ns/pid")]}


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "host": socket.gethostname(),
        "boot_id": _boot_id(),
        "device": str(device),
        "name": properties.name,
        "uuid": str(getattr(properties, "uuid", device.index)),
        "free": _free(device),
        "pe": nvshmem.world().pe,
    }


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0]


def _check_memory(purpose: str, ranks: list[dict[str, Any]], num_bytes: int) -> None:
    # Before anybody allocates: a rank that fails within the library may leave the others there.
    for rank, gpu in enumerate(ranks):
        sharers = [other for other in ranks if (other["boot_id"], other["uuid"]) == (gpu["boot_id"], gpu["uuid"])]
        free = min(other["free"] for other in sharers)
        if len(sharers) * num_bytes > free:
            shared = f" for each of the {len(sharers)} ranks that share it" if len(sharers) > 1 else ""
            raise RuntimeError(
                f"{purpose}: {num_bytes / 2**20:.0f} MiB{shared} asked on {gpu['device']} of {gpu['host']} "
                f"(rank {rank}), {free / 2**20:.0f} MiB are free (what torch's caching allocator keeps is taken: "
                f"torch.cuda.empty_cache() gives it back); init() with smaller limits"
            )
