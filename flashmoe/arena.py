"""The symmetric memory of all ranks, mapped by those of one host, and the pieces that groups take from it."""

import array
import json
import os
import secrets
import select
import socket
import struct
import time
from typing import Any

from ._C import Network, PeerError, Segment
from .hosts import check_ucx, mapped_ranks, this_host
from .network import open_fabric
from .rendezvous import Rendezvous

_ALIGNMENT = 4096
_MESSAGE_S = 5.0  # a peer sends at once when it has connected; whoever does not is none
_ACCEPT_SLICE_S = 0.2  # how often a wait for a connection looks after the peers it waits for


class PeerProcesses:
    """Which process each rank is, and whether it still runs."""

    def __init__(self, pids: list[int]):
        self.pids = pids
        self._descriptors: list[int | None] = []
        self._gone: set[int] = set()
        for rank, pid in enumerate(pids):
            descriptor = None
            if pid > 0:  # 0: a process that is not visible here; only deadlines can tell of it
                try:
                    descriptor = os.pidfd_open(pid)  # unlike the number, it never names another process later
                except ProcessLookupError:
                    self._gone.add(rank)
                except (AttributeError, OSError):
                    pass  # a system without it: again only deadlines
            self._descriptors.append(descriptor)

    def is_alive(self, rank: int) -> bool:
        if rank in self._gone:
            return False
        descriptor = self._descriptors[rank]
        if descriptor is None:
            return True
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)  # readable: it has ended, even if nobody has collected it yet
        return not poll.poll(0)

    def close(self) -> None:
        for descriptor in self._descriptors:
            if descriptor is not None:
                os.close(descriptor)
        self._descriptors = [None] * len(self._descriptors)


class Arena:
    """One segment per rank, and the bytes of our own that groups have taken so far.

    Attributes:
        segments: by rank of the torch world; None for those that only the network leads to.
        peers: by rank of the torch world.
        num_bytes: of one segment.
        used_bytes: taken from this rank's own segment.
        fabric: our end of the network; None where all segments are mapped.
    """

    def __init__(self, segments: list[Segment | None], peers: PeerProcesses, num_bytes: int, fabric: Any = None):
        self.segments = segments
        self.peers = peers
        self.num_bytes = num_bytes
        self.used_bytes = 0
        self.fabric = fabric

    def is_alive(self, rank: int) -> bool:
        """False once it is known that the process of ``rank`` has ended, or that the network to it broke."""
        return self.peers.is_alive(rank) and not (self.fabric is not None and self.fabric.failed(rank))

    def network(self, members: list[int], offsets: list[int]) -> Network | None:
        """The way to those ``members`` whose segments are not mapped, if there are any."""
        far = any(self.segments[member] is None for member in members)
        return self.fabric.network(members, offsets) if far else None

    def take(self, num_bytes: int) -> int:
        """Offset of ``num_bytes`` fresh, zeroed bytes of this rank's segment; they are never given back.

        Raises:
            RuntimeError: the arena is full.
        """
        needed = round_up(num_bytes)
        if self.used_bytes + needed > self.num_bytes:
            raise RuntimeError(
                f"the arena is full: a group needs {needed} bytes, {self.num_bytes - self.used_bytes} of "
                f"{self.num_bytes} are left; init() with a larger max_groups, or call "
                f"flashmoe.distributed.reserve(max_groups=…)"
            )
        offset = self.used_bytes
        self.used_bytes += needed
        return offset

    def close(self) -> None:
        # Each process unmaps its own mapping; a peer that still writes does so through its own, and the memory
        # itself goes when the last process lets go of it. Whom only the network reaches puts through our fabric.
        if self.fabric is not None:
            self.fabric.close()
        self.segments = []
        self.peers.close()


def round_up(num_bytes: int) -> int:
    """Every group's piece starts on a page."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def build_arena(
    rendezvous: Rendezvous, num_bytes: int, timeout_s: float, transport: str | None = None
) -> Arena:
    """Allocate ``num_bytes`` on every rank and map the memory of all on this host, or reach them by the network.

    A collective over the rendezvous' members, all ranks 0 … W−1 of the world. Memory is handed over as a file
    descriptor through a socket that has a random name in the abstract namespace, to processes of the same user only.

    Raises:
        RuntimeError: several hosts without UCX, too little memory, another user's process.
        PeerError: a rank did not come in time, or cannot be reached.
    """
    rank, world_size = rendezvous.rank, len(rendezvous.members)
    hosts = rendezvous.exchange("host", this_host, timeout_s)
    mapped = mapped_ranks(hosts, rank, transport)
    if len(mapped) < world_size:
        rendezvous.exchange("ucx", lambda: check_ucx(hosts, rank), timeout_s)
    before = [r for r in range(rank) if hosts[r]["machine"] == hosts[rank]["machine"]]

    segments: list[Segment] = []

    def allocate() -> None:
        # One rank after another: each finds out whether memory is left *after* those before it took theirs.
        if before:
            rendezvous.await_one("memory", before[-1], timeout_s)
        try:
            segments.append(Segment.create(num_bytes))
        except RuntimeError as error:
            raise RuntimeError(f"rank {rank} of {world_size} on this host: {error}") from error

    rendezvous.exchange("memory", allocate, timeout_s)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:

        def listen() -> str:
            name = "flashmoe-" + secrets.token_hex(16)
            listener.bind("\0" + name)
            listener.listen(world_size)
            return name

        names = rendezvous.exchange("socket", listen, timeout_s)

        def hand_over() -> Arena:
            deadline = time.monotonic() + timeout_s
            pids = [os.getpid() if r == rank else 0 for r in range(world_size)]
            for other in mapped:
                if other != rank:
                    pids[other] = _send_descriptor(rank, other, names[other], segments[0].fd, timeout_s)
            peers = PeerProcesses(pids)
            try:
                received = _receive_segments(rendezvous, mapped, listener, peers, num_bytes, deadline, timeout_s)
            except BaseException:
                peers.close()
                raise
            received[rank] = segments[0]
            return Arena([received.get(other) for other in range(world_size)], peers, num_bytes)

        arenas: list[Arena] = []
        rendezvous.exchange("mapped", lambda: arenas.append(hand_over()), timeout_s)
    arena = arenas[0]
    if len(mapped) < world_size:
        try:
            arena.fabric = open_fabric(rendezvous, segments[0], hosts, mapped, timeout_s)
        except BaseException:
            arena.close()
            raise
    return arena


def _credentials(connection: socket.socket) -> tuple[int, int]:
    size = struct.calcsize("iII")
    pid, uid, _ = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return pid, uid


def _send_descriptor(rank: int, other: int, name: str, descriptor: int, timeout_s: float) -> int:
    """Give ``other`` our memory; return its process id."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect("\0" + name)
        except ConnectionRefusedError as error:
            raise RuntimeError(
                f"rank {rank} cannot reach rank {other} on this host, which has stopped listening: {error}"
            ) from error
        pid, uid = _credentials(connection)
        if uid != os.getuid():
            raise RuntimeError(f"rank {other} must run as user {os.getuid()}, the user of rank {rank}, got user {uid}")
        socket.send_fds(connection, [json.dumps({"rank": rank}).encode()], [descriptor])
        return pid


def _receive_segments(
    rendezvous: Rendezvous,
    members: list[int],
    listener: socket.socket,
    peers: PeerProcesses,
    num_bytes: int,
    deadline: float,
    timeout_s: float,
) -> dict[int, Segment]:
    """The memory of the other ``members``, by rank. Whoever else connects is told nothing and disturbs nobody."""
    received: dict[int, Segment] = {}
    listener.settimeout(_ACCEPT_SLICE_S)
    while True:
        missing = [m for m in members if m != rendezvous.rank and m not in received]
        if not missing:
            return received
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            rendezvous.check_on(missing)
            ended = [m for m in missing if not peers.is_alive(m)]
            if ended:
                raise PeerError(f"rank {ended[0]} has ended before it handed over its memory") from None
            if time.monotonic() > deadline:
                raise rendezvous.timed_out(missing, timeout_s) from None
            continue
        descriptors: list[int] = []
        try:
            with connection:
                if _credentials(connection)[1] != os.getuid():
                    continue
                connection.settimeout(_MESSAGE_S)
                # Not socket.recv_fds: it drops "close on exec", and a child program would hold on to the memory.
                message, ancillary, _, _ = connection.recvmsg(256, socket.CMSG_LEN(4), socket.MSG_CMSG_CLOEXEC)
                for level, kind, data in ancillary:
                    if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                        descriptors.extend(array.array("i", data))
            other = _sender(message) if descriptors else None
            if other in missing:
                received[other] = Segment.attach(descriptors[0], num_bytes)
        except OSError:
            continue  # a stranger that went away, or said nothing
        finally:
            for descriptor in descriptors:
                os.close(descriptor)


def _sender(message: bytes) -> int | None:
    """The rank that a message names; None if it is none of ours."""
    try:
        return json.loads(message)["rank"]
    except (ValueError, KeyError, TypeError):
        return None
