"""NVSHMEM in this process: where its library is, and the one world that it is initialised over.

Nothing here touches the library before somebody asks for a group of several GPUs, or what there is.
"""

from __future__ import annotations

import atexit
import importlib.metadata
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from . import _C
from .rendezvous import Rendezvous

_PACKAGES = ("nvidia-nvshmem-cu13", "nvidia-nvshmem-cu12")
_DEFAULT_HEAP = 2**30  # NVSHMEM's own, where it does not map memory on demand
_IBGDA = "NVSHMEM_IB_ENABLE_IBGDA"
_OWN_BYTES = 64 * 2**20  # of the heap, for what the library keeps there itself
_MAY_BEGIN = ("not initialised", "initialised by somebody else")
_LIBRARY_S = 60.0  # that a call of the library may take at least, once all ranks are there
_GRACE_S = 5.0  # for a call in which others have failed, and for all to come to the end

_world: _C.NvshmemWorld | None = None
_meeting: Rendezvous | None = None  # of all its ranks, at the end
_forgotten: list[_C.NvshmemWorld] = []  # of the parents of this process: never called, and never destroyed
_failed = False


def is_built() -> bool:
    """This build can use the library: it has the CUDA half, and was made with NVSHMEM's headers."""
    return hasattr(_C, "NvshmemWorld")


def library() -> dict[str, str]:
    """path, version, and how it was found. Loads it.

    Raises:
        RuntimeError: why there is none.
    """
    return _C.nvshmem_library(*_places())


def world() -> _C.NvshmemWorld:
    """The library's life in this process; made at first use.

    Raises:
        RuntimeError: this build lacks what it takes, or there is no library.
    """
    global _world
    if _world is None:
        if not is_built():
            raise RuntimeError(
                "groups of several GPUs need a build of flashmoe with nvcc and NVSHMEM's headers (`flashmoe info` tells "
                "what this one has): pip install nvidia-nvshmem-cu13, then build without isolation"
            )
        _world = _C.NvshmemWorld(*_places())
        atexit.register(_end)
    return _world


def initialize(rendezvous: Rendezvous, device: int, heap_bytes: int, timeout_s: float) -> None:
    """Make each rank a PE, if it is none yet; a collective over the rendezvous' members, ranks 0 … W − 1.

    Raises:
        RuntimeError: no library or one that does not fit, no driver, a world over other ranks; on every rank.
        PeerError: a rank did not come in time.
    """
    global _meeting
    rank, size = rendezvous.rank, len(rendezvous.members)

    def look() -> dict[str, Any]:
        mine = world()
        if mine.state not in ("initialised", *_MAY_BEGIN):
            raise RuntimeError(f"NVSHMEM is {mine.state}")
        return {"state": mine.state, "version": library()["version"], "ranks": mine.size if mine.ready else size}

    seen = rendezvous.exchange("nvshmem", look, timeout_s)
    for what in ("state", "version", "ranks"):
        if any(other[what] != seen[0][what] for other in seen):
            raise RuntimeError(
                f"NVSHMEM must be the same on all ranks, got {what}: "
                + ", ".join(f"{other[what]} on rank {r}" for r, other in enumerate(seen))
            )
    if seen[0]["ranks"] != size:
        raise RuntimeError(f"NVSHMEM was initialised over {seen[0]['ranks']} ranks, and this world has {size}")
    if seen[0]["state"] in _MAY_BEGIN:
        made = rendezvous.exchange("nvshmem id", lambda: world().unique_id().hex() if rank == 0 else "", timeout_s)
        unique_id = bytes.fromhex(made[0])

        def start() -> None:
            torch.cuda.set_device(device)  # of this thread
            with _heap_of(heap_bytes):
                world().initialize(unique_id, rank, size, device, _C.nvshmem_modules())

        together(rendezvous, "nvshmem init", start, max(timeout_s, _LIBRARY_S))
    if _meeting is None:
        # A store of its own reference: torch's world may be destroyed before the end.
        store = dist.PrefixStore("flashmoe/nvshmem", dist.distributed_c10d._get_default_store())
        _meeting = Rendezvous(store, rank, range(size), "end", rendezvous.is_alive)


def check_network() -> None:
    """Before ranks put to memory that is not mapped.

    Raises:
        RuntimeError: this build's GPU code could not, or would wait for ever.
    """
    if not _C.has_nvshmem_kernels():
        raise RuntimeError(
            "some ranks' GPUs do not map each other's memory, and this build has no kernels that reach it otherwise: "
            "build flashmoe with NVSHMEM's headers of 3.7 or later"
        )
    if os.environ.get(_IBGDA, "0").lower() not in ("", "0", "n", "no", "off", "false"):
        raise RuntimeError(
            f"{_IBGDA} must not be set: kernels that write a NIC's queues themselves lose the pipelining of their matrix "
            f"products, so flashmoe's do not; NVSHMEM's host thread moves their data (docs/launch.md)"
        )


def together(rendezvous: Rendezvous, step: str, call: Callable[[], Any], timeout_s: float) -> list[Any]:
    """One step of the rendezvous in which ``call`` waits in NVSHMEM for all ranks; everybody's value.

    The library waits for ever for a rank that does not come. So the call gets a thread of its own, which is left to
    itself when a peer is gone or the time has passed; then nothing collective is called in this process any more.
    """

    def patiently() -> Any:
        outcome: list[tuple[Any, BaseException | None]] = []

        def run() -> None:
            try:
                outcome.append((call(), None))
            except BaseException as error:
                outcome.append((None, error))

        thread = threading.Thread(target=run, name=f"flashmoe {step}", daemon=True)
        thread.start()
        others = [member for member in rendezvous.members if member != rendezvous.rank]
        deadline, reason = time.monotonic() + timeout_s, None
        try:
            while not outcome:
                thread.join(0.02)
                if reason is None:
                    try:
                        rendezvous.check_on(others)
                    except _C.PeerError as error:
                        # Perhaps it came, and failed afterwards: then our call comes back, too.
                        reason, deadline = error, min(deadline, time.monotonic() + _GRACE_S)
                if time.monotonic() > deadline and not outcome:
                    raise reason or rendezvous.timed_out(others, timeout_s)
        except BaseException as error:
            give_up(str(error) or type(error).__name__)
            raise
        value, error = outcome[0]
        if error is not None:
            raise error
        return value

    return rendezvous.exchange(step, patiently, timeout_s)


def allocate(rendezvous: Rendezvous, step: str, num_bytes: int, timeout_s: float) -> Any:
    """Zeroed symmetric memory, or an error on every rank; then whoever got some keeps it, since to free it takes all."""
    got = []
    try:
        together(
            rendezvous, step, lambda: got.append(world().allocate(num_bytes)), max(timeout_s, _LIBRARY_S)
        )  # fmt: skip
    except BaseException:
        for memory in got:
            memory.leak()
        raise
    return got[0]


def free_idle(rendezvous: Rendezvous, step: str, timeout_s: float) -> None:
    """Free what no rank uses any more; collective."""
    idle = rendezvous.exchange(step, world().idle, timeout_s)

    def free() -> None:
        for number in everywhere:
            world().free(number)

    everywhere = sorted(set(idle[0]).intersection(*idle[1:]))
    if everywhere:
        together(rendezvous, f"{step}: free", free, max(timeout_s, _LIBRARY_S))


def give_up(why: str) -> None:
    """From here on nothing collective is called in this process."""
    leave_as_it_is()
    if _world is not None:
        _world.abandon(why)


def leave_as_it_is() -> None:
    """A group has failed: the library goes on, but is not finalised."""
    global _failed
    _failed = True


def forget() -> None:
    """In a forked child, where the library's state is a copy that is nobody's."""
    global _world, _meeting
    if _world is not None:
        _forgotten.append(_world)
    _world = _meeting = None


def _end() -> None:
    """Finalise at the end of the process, if all ranks have come to it and nothing has failed."""
    if _world is None or _meeting is None or _failed or not _world.ready:
        return
    try:
        if any(_meeting.exchange("end", _torch_uses_it, _GRACE_S)):
            return  # its tensors may outlive us, and would be freed in a library that has ended
        together(_meeting, "finalize", _world.finalize, _GRACE_S)
    except Exception:
        pass  # a rank that ends alone, or earlier, ends without it; the memory goes with the process


def _torch_uses_it() -> bool:
    symmetric_memory = sys.modules.get("torch.distributed._symmetric_memory")
    try:
        return symmetric_memory is not None and symmetric_memory.get_backend("cuda") == "NVSHMEM"
    except (AttributeError, RuntimeError, TypeError):
        return False


def _places() -> tuple[str, list[str]]:
    """NVSHMEM_HOME, and the packages' folders: first that for torch's CUDA."""
    mine = f"-cu{torch.version.cuda.split('.')[0]}" if torch.version.cuda else ""
    folders = []
    for name in sorted(_PACKAGES, key=lambda name: not (mine and name.endswith(mine))):
        try:
            folders.append(str(importlib.metadata.distribution(name).locate_file("nvidia/nvshmem/lib")))
        except importlib.metadata.PackageNotFoundError:
            continue
    return os.environ.get("NVSHMEM_HOME", ""), folders


class _heap_of:
    """A heap that is not mapped on demand is made once, with a size that must be known before; unless the user says."""

    _VARIABLE = "NVSHMEM_SYMMETRIC_SIZE"

    def __init__(self, heap_bytes: int):
        self.wanted = heap_bytes + _OWN_BYTES

    def __enter__(self) -> None:
        self.ours = self._VARIABLE not in os.environ and self.wanted > _DEFAULT_HEAP
        if self.ours:
            os.environ[self._VARIABLE] = str(self.wanted)

    def __exit__(self, *_: object) -> None:
        if self.ours:
            del os.environ[self._VARIABLE]
