"""Which ranks share memory and which only a network, and the library that this network runs on."""

import importlib.util
import os
import socket
from pathlib import Path
from typing import Any

from . import _C

INSTALL_UCX = (
    "pip install libucx-cu12 (no GPU needed), or your system's libucx, before flashmoe is built; `flashmoe info` tells "
    "what is there"
)


def ucx_library() -> str:
    """libucp: the PyPI package's, if it is installed, else whatever the system's loader finds."""
    spec = importlib.util.find_spec("libucx")
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        path = Path(folder, "lib", "libucp.so.0")
        if path.exists():
            return str(path)
    return "libucp.so.0"


def ucx_version() -> str:
    """Of the library that is here.

    Raises:
        RuntimeError: this build cannot use one, or there is none; says what to install.
    """
    if not hasattr(_C, "ucx_version"):
        raise RuntimeError(f"flashmoe was built without UCX: {INSTALL_UCX}")
    try:
        return _C.ucx_version(ucx_library())
    except RuntimeError as error:
        raise RuntimeError(f"{error}: {INSTALL_UCX}") from error


def machine_id() -> str:
    """The same for all processes of one machine, and of its containers; unlike the name, not of a clone."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def this_host() -> dict[str, Any]:
    """What tells the others where this rank runs.

    Two network namespaces of one machine are two hosts: memory is handed over through a socket that only one of
    them sees.
    """
    network = os.stat("/proc/self/ns/net")
    return {
        "machine": machine_id(), "network": [network.st_dev, network.st_ino], "name": socket.gethostname()
    }  # fmt: skip


def mapped_ranks(hosts: list[dict[str, Any]], rank: int, transport: str | None) -> list[int]:
    """The ranks whose memory ``rank`` maps, itself among them. The others are reached by the network.

    Args:
        hosts: ``this_host()`` of every rank.
        transport: None: memory within a host, UCX between hosts; "shm", "ucx": that alone.

    Raises:
        RuntimeError: transport is "shm", and there are several hosts.
    """
    near = [r for r, host in enumerate(hosts) if host == hosts[rank]]
    if transport == "shm" and len(near) < len(hosts):
        raise RuntimeError(f"all ranks must run on one host with transport='shm': {_two_hosts(hosts, rank)}")
    return [rank] if transport == "ucx" else near


def check_ucx(hosts: list[dict[str, Any]], rank: int) -> str:
    """Its version, on a rank that will need it.

    Raises:
        RuntimeError: it is missing; says why it is needed and what to install.
    """
    try:
        return ucx_version()
    except RuntimeError as error:
        need = _two_hosts(hosts, rank) or "transport='ucx' asks for it"
        raise RuntimeError(f"all ranks must run on one host without UCX: {need}: {error}") from error


def _two_hosts(hosts: list[dict[str, Any]], rank: int) -> str:
    for other, host in enumerate(hosts):
        if host != hosts[rank]:
            same = host["machine"] == hosts[rank]["machine"]
            where = f"another network namespace of {host['name']}" if same else host["name"]
            return f"rank {rank} is on {hosts[rank]['name']}, rank {other} on {where}"
    return ""
