"""Which ranks there are, where, and how each reaches every other: for ``flashmoe info --distributed``."""

from __future__ import annotations

import os
import socket
from typing import Any

import torch
import torch.distributed as dist

from . import cuda_teams, distributed, nvshmem
from .cuda_arena import CudaArena
from .rendezvous import Rendezvous

_PATIENCE_S = 60.0
_PREFIX = "NVSHMEM_"


def topology() -> list[dict[str, Any]]:
    """Of each rank, after an attempt to ``init()`` with the defaults, on GPUs if every rank has one. Collective.

    host; gpus (their names); nvshmem (its version) or missing (why there is none); settings (NVSHMEM's own, from the
    environment); device, heap_bytes and peers (self, mapped or remote, by rank), or error.

    Raises:
        RuntimeError: an environment without what torchrun sets.
        PeerError: a rank did not come.
    """
    distributed._join_torch_world(_PATIENCE_S)
    rank, size = dist.get_rank(), dist.get_world_size()
    store = dist.PrefixStore("flashmoe/topology", dist.distributed_c10d._get_default_store())
    rendezvous = Rendezvous(store, rank, range(size), "tell what it has")
    ranks = rendezvous.exchange("has", _here, _PATIENCE_S)
    device = "cuda" if all(other["gpus"] for other in ranks) else "cpu"
    try:
        distributed.init(device=device)
    except Exception as error:
        reached = {"error": f"{type(error).__name__}: {error}"}
    else:
        reached = _reached(rank, size)
    return [a | b for a, b in zip(ranks, rendezvous.exchange("reaches", lambda: reached, _PATIENCE_S), strict=True)]


def topology_text(ranks: list[dict[str, Any]]) -> str:
    """The same to read."""
    rows = [["rank", "host", "device", "heap", "reaches ranks 0 …"]]
    notes: dict[str, list[str]] = {}
    for rank, found in enumerate(ranks):
        device = found.get("device", "none")
        name = found["gpus"][int(device[5:])] if device.startswith("cuda:") else ""
        rows.append([
            str(rank), found["host"], f"{device} {name}".strip(), f"{found.get('heap_bytes', 0) / 2**20:.0f} MiB",
            " ".join(found.get("peers", ["nobody"])),
        ])  # fmt: skip
        said = [f"error: {found['error']}"] if "error" in found else []
        said += [f"no GPU; NVSHMEM {found['nvshmem'] or found['missing']}"] if not found["gpus"] else []
        said += [found["missing"]] if found["gpus"] and found["missing"] else []
        said += [f"{name}={value}" for name, value in found["settings"].items()]
        for note in said:
            notes.setdefault(note, []).append(str(rank))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for note, whose in notes.items():
        lines.append(f"{'all ranks' if len(whose) == len(ranks) else 'rank ' + ', '.join(whose)}: {note}")
    return "\n".join(lines)


def _here() -> dict[str, Any]:
    gpus = torch.cuda.device_count() if cuda_teams.has_cuda() and torch.cuda.is_available() else 0
    version, missing = None, None
    try:
        version = nvshmem.library()["version"]
        missing = None if nvshmem.is_built() else "this build of flashmoe cannot use NVSHMEM"
    except RuntimeError as error:
        missing = str(error)
    return {
        "host": socket.gethostname(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(gpus)],
        "nvshmem": version,
        "missing": missing,
        "settings": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_PREFIX)},
    }


def _reached(rank: int, size: int) -> dict[str, Any]:
    arena, made = distributed._world.arena, distributed.arena()
    if isinstance(arena, CudaArena):
        far = arena.ranks[rank]["unmapped"]
    else:
        far = [other for other in range(size) if arena is not None and arena.segments[other] is None]
    peers = ["self" if other == rank else "remote" if other in far else "mapped" for other in range(size)]
    return {"device": made["device"], "heap_bytes": made["bytes"], "peers": peers}
