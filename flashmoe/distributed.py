"""Expert parallelism over processes: the symmetric arena, and the groups that take their heaps from it.

``init()`` is collective over the torch world and allocates once. A group of ranks gets its heap from the arena the
first time it is used, among its members only. Nothing here runs in a call of the layer but one dictionary look-up.
"""

import atexit
import dataclasses
import os
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from . import nvshmem
from ._C import Group, local_group
from .cores import usable_cores
from .cuda_groups import CudaGroup
from .settings import Settings, num_workers_asked, settings_of_environment
from .world import World, join_group, next_world

_lock = threading.RLock()
_world: World | None = None
_groups: dict[str, Group | CudaGroup] = {}  # by name; the look-up of every call
_process_groups: dict[str, Any] = {}  # by name
_owns_torch_world = False
# Counts init() and reserve() for the life of the process: keys in the store stay behind, and would be believed again.
_attempts = 0


def init(
    *,
    max_tokens: int | None = None,
    max_wire_bytes: int | None = None,
    max_top_k: int | None = None,
    max_experts: int | None = None,
    max_groups: int | None = None,
    timeout_s: float | None = None,
    entry_timeout_s: float | None = None,
    remote_only: int | None = None,
    transport: str | None = None,
    backward: bool | None = None,
    num_workers: int | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Make this process a rank: join the torch world and allocate the symmetric memory of all groups to come.

    Collective: every rank of the torch world calls it, equally often. If ``torch.distributed`` is not initialised
    yet, this does it (backend gloo) from the environment that torchrun sets; then ``finalize()`` also undoes it.

    The memory is resident from here on. One rank of a world of W ranks allocates about
    ``max_groups · max_tokens · (2 (W − 1) + max_top_k) · max_wire_bytes`` bytes, without ``backward`` only once W − 1:
    with the defaults 160 MiB (144) for W = 2 and 352 MiB (240) for W = 8, which serves a hidden size of 2048 in float32
    or 4096 in bfloat16. Each rank maps all of it.

    An argument left out keeps its value if this was called before, else takes its default. Calling again is cheap
    and changes nothing, with two exceptions. After a failure (PeerError on some rank) it makes a new arena and new
    groups. With other arguments it does so too, provided that no group has been used yet.

    Args:
        max_tokens: of one rank in one call (default 1024).
        max_wire_bytes: bytes of one token row: hidden size times item size (default 8192).
        max_top_k: experts per token (default 8).
        max_experts: of one layer, over all ranks (default 256).
        max_groups: groups that this rank may belong to, counted as if each were the whole world (default 2).
        timeout_s: seconds to wait for a rank that has entered the call
            (default: environment variable FLASHMOE_TIMEOUT_S, else 60).
        entry_timeout_s: seconds to wait for a rank that has not entered the call yet
            (default: FLASHMOE_ENTRY_TIMEOUT_S, else 600).
        remote_only: a seed; peers' memory is then written by a simulated network that delays and reorders
            (default: FLASHMOE_REMOTE_ONLY, else off). A rehearsal for tests, not for use.
        transport: "shm": memory that all ranks map, on one host; "ucx": the network alone, also within a host
            (default: FLASHMOE_TRANSPORT, else memory within a host and the network between hosts).
        backward: whether calls may be differentiated (default True); what is called for inference alone needs no memory
            for it.
        num_workers: threads that compute, ranks may differ (default: FLASHMOE_NUM_WORKERS, else its share of the cores).
        device: what this rank is, and where its calls' tensors lie: "cpu" or "cuda", the same on all ranks (default:
            torch's default device, the CPU unless the program has set another). "cuda:2" names the GPU, "cuda" is the
            current one if set_device() chose another than the first, else that which LOCAL_RANK counts off. It is
            current afterwards. GPUs reach each other through NVSHMEM, initialised once over the whole world.

    Raises:
        ValueError: an argument is out of range, or the ranks' arguments differ; on every rank.
        RuntimeError: too little memory (found here, on every rank), ranks on several hosts without UCX, other
            arguments while groups are in use, an environment without what torchrun sets, or a GPU, driver or NVSHMEM
            that is missing or does not fit.
        PeerError: a rank did not come in time, or cannot be reached.
    """
    given = {
        "max_tokens": max_tokens,
        "max_wire_bytes": max_wire_bytes,
        "max_top_k": max_top_k,
        "max_experts": max_experts,
        "max_groups": max_groups,
        "timeout_s": timeout_s,
        "entry_timeout_s": entry_timeout_s,
        "remote_only": remote_only,
        "transport": transport,
        "backward": backward,
    }
    changes = {name: value for name, value in given.items() if value is not None}

    def plan(current: Settings | None) -> Settings:
        return (current or settings_of_environment()).changed(changes)

    _renew("init", plan, num_workers, device)


def reserve(
    *, max_tokens: int = 1, max_wire_bytes: int = 1, max_top_k: int = 1, max_experts: int = 1, max_groups: int = 1
) -> None:
    """Grow the arena until it holds at least this; collective, while no rank is in a call of a group.

    Nothing happens if it already does. Else new memory is allocated at fresh addresses, then the old is let go, and
    every group is made anew at its next use. No limit ever gets smaller. Arguments as for ``init``.

    Raises:
        RuntimeError: ``init`` was not called, or too little memory; then the old arena stays in use.
        ValueError, PeerError: as ``init``.
    """
    asked = {
        "max_tokens": max_tokens,
        "max_wire_bytes": max_wire_bytes,
        "max_top_k": max_top_k,
        "max_experts": max_experts,
        "max_groups": max_groups,
    }
    if not is_initialized():
        raise RuntimeError("reserve() grows what init() made: call flashmoe.distributed.init() first")

    _renew("reserve", lambda current: current.grown(asked), _world.num_workers, None)


def finalize() -> None:
    """Let go of the groups, the arena and, if ``init()`` made it, the torch world. Not collective; safe to repeat.

    A group that somebody still holds keeps its memory until it is dropped; to other hosts it leads no longer. What GPUs
    hold is freed when all ranks meet again, in ``init()``, or with the process.
    """
    global _owns_torch_world
    with _lock:
        _drop_world()
        if _owns_torch_world:
            _owns_torch_world = False
            if dist.is_initialized():
                dist.destroy_process_group()


def is_initialized() -> bool:
    """Whether ``init()`` has succeeded in the torch world that exists now."""
    return _world is not None and dist.is_initialized() and dist.group.WORLD is _world.process_group


def arena() -> dict[str, Any] | None:
    """What ``init()`` made, or None before: its arguments by name, generation, rank, world_size, bytes (of this
    rank's segment; 0 in a world of one), used_bytes (taken by groups), groups (their names)."""
    if not is_initialized():
        return None
    return {
        **dataclasses.asdict(_world.settings),
        "num_workers": _world.num_workers,
        "device": str(_world.device),
        "generation": _world.generation,
        "rank": _world.rank,
        "world_size": _world.size,
        "bytes": _world.arena.num_bytes if _world.arena else 0,
        "used_bytes": _world.arena.used_bytes if _world.arena else 0,
        "groups": sorted(_world.groups),
    }


def group_name(group: Any) -> str:
    """The name under which ``group_of`` finds a torch ProcessGroup again.

    Raises:
        TypeError: not a ProcessGroup.
        ValueError: this rank is no member of it.
    """
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group: this rank must be a member of the process group, got NON_GROUP_MEMBER")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup, got {type(group).__name__}")
    name = group.group_name
    if _process_groups.get(name) is not group:
        with _lock:
            _process_groups[name] = group
            _groups.pop(name, None)  # torch gives the same names again after destroy_process_group()
    return name


def group_of(group: Any) -> Group | CudaGroup:
    """The group of a ProcessGroup or of a name that ``group_name`` gave.

    At the first use its members agree, without the other ranks, and each takes its heap from the arena.

    Raises:
        RuntimeError: ``init()`` was not called, or the arena is full.
        PeerError: a member ended, did not come in time, or made a different group; from then on at every call,
            until a new ``init()``.
        TypeError, ValueError: as ``group_name``.
    """
    name = group if isinstance(group, str) else group_name(group)
    try:
        return _groups[name]
    except KeyError:
        pass
    with _lock:
        if name not in _groups:
            _groups[name] = _make_group(name)
        return _groups[name]


def _make_group(name: str) -> Group | CudaGroup:
    process_group = _process_groups.get(name)
    if process_group is None:  # a name without its object: a graph that was compiled in an earlier process
        try:
            process_group = dist.distributed_c10d._resolve_process_group(name)
        except Exception as error:
            raise RuntimeError(f"group {name!r}: torch.distributed knows no process group of this name") from error
    members = dist.get_process_group_ranks(process_group)
    if len(members) == 1:
        return local_group(_num_workers_alone())
    if not is_initialized():
        raise RuntimeError(
            f"group {name!r} spans {len(members)} processes: call flashmoe.distributed.init() on every rank first"
        )
    return join_group(_world, name, members)


def _num_workers_alone() -> int:
    """For a group of one rank, which may still share the host with other ranks of its launcher."""
    if is_initialized():
        return _world.num_workers
    local_ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    return num_workers_asked(None) or max(1, usable_cores() // (int(local_ranks) if local_ranks.isdecimal() else 1))


def _renew(call: str, plan: Callable[[Settings | None], Settings], num_workers: int | None, device: Any) -> None:
    global _world, _attempts
    with _lock:
        if not is_initialized():
            _drop_world()  # torch's world may have been destroyed, and made again, without us
        current = _world.settings if _world else None
        try:
            entry_timeout_s = plan(current).entry_timeout_s
        except (ValueError, TypeError):
            entry_timeout_s = Settings.entry_timeout_s  # the error is raised once all ranks are there to hear of it
        _join_torch_world(entry_timeout_s)
        _attempts += 1
        world = next_world(call, _attempts, _world, lambda: plan(current), num_workers, device, entry_timeout_s)
        if world is not None:
            _drop_world()
            _world = world
            world.settle()


def _join_torch_world(timeout_s: float) -> None:
    """Initialise torch.distributed if nobody has."""
    global _owns_torch_world
    if not dist.is_available():
        raise RuntimeError("flashmoe.distributed needs torch.distributed, which this build of torch lacks")
    if dist.is_initialized():
        return
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise RuntimeError(
            f"flashmoe.distributed.init() reads torchrun's environment, which lacks {', '.join(missing)}: start with "
            f"torchrun, use flashmoe.launch(fn, nproc), or call torch.distributed.init_process_group() before"
        )
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    _owns_torch_world = True


def _drop_world() -> None:
    global _world
    _groups.clear()
    _process_groups.clear()
    if _world is not None:
        _world.close()
    _world = None


def _forget_in_forked_child() -> None:
    # The groups' threads do not exist in the child, nor is the symmetric memory mapped there: it makes its own anew.
    global _lock, _world, _owns_torch_world
    _lock = threading.RLock()
    _groups.clear()
    _process_groups.clear()
    _world = None
    _owns_torch_world = False
    nvshmem.forget()


os.register_at_fork(after_in_child=_forget_in_forked_child)
atexit.register(finalize)  # before the interpreter tears down what the groups' threads rely on
