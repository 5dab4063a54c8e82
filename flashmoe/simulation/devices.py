"""What workers share, as servers in the order of asking: ports, memory behind a cache, a node's cores. Picoseconds."""

from collections import deque
from typing import Any

from .machine import Machine, Wire

PICO = 10**12


def picoseconds(seconds: float) -> int:
    return round(PICO * seconds)


class Port:
    """One rank's end of a wire; ``bytes_out`` have left through it."""

    __slots__ = ("bytes_out", "free_in", "free_out", "latency", "per_byte", "per_put")

    def __init__(self, wire: Wire) -> None:
        self.per_byte = PICO / wire.bytes_per_s
        self.latency, self.per_put = picoseconds(wire.latency_s), picoseconds(wire.put_s)
        self.free_in = self.free_out = self.bytes_out = 0

    def leave(self, now: int, num_bytes: int) -> int:
        """When so many more bytes have left, after those before them."""
        begin = now if now > self.free_out else self.free_out
        taken = int(num_bytes * self.per_byte)
        self.free_out = begin + (taken if taken > self.per_put else self.per_put)
        self.bytes_out += num_bytes
        return self.free_out

    def arrive(self, left: int, num_bytes: int) -> int:
        """When bytes that have left another port have come in, and are seen; they share this one with all others."""
        taken = int(num_bytes * self.per_byte)
        begin = left - taken
        self.free_in = (begin if begin > self.free_in else self.free_in) + taken
        return self.free_in + self.latency


class Memory:
    """Weights behind a cache that forgets what was used longest ago. What several tiles read at a time is read once."""

    __slots__ = ("bytes_read", "cached", "in_use", "free", "per_byte", "room", "worker_per_byte")

    def __init__(self, machine: Machine) -> None:
        self.per_byte, self.worker_per_byte = PICO / machine.memory_read, PICO / machine.worker_read
        self.room = int(machine.cache_bytes)
        self.cached: dict[Any, int] = {}
        self.in_use: dict[Any, int] = {}
        self.free = self.bytes_read = 0

    def read(self, now: int, num_bytes: int) -> int:
        """When so many bytes have come out of memory."""
        begin = now if now > self.free else self.free
        self.free = begin + int(num_bytes * self.per_byte)
        self.bytes_read += num_bytes
        alone = now + int(num_bytes * self.worker_per_byte)
        return self.free if self.free > alone else alone

    def begin_use(self, now: int, key: Any, num_bytes: int) -> int:
        """When a tile that begins to read these weights has them all; ``end_use`` follows."""
        users = self.in_use.get(key, 0)
        self.in_use[key] = users + 1
        if users:
            return now
        if key in self.cached:
            self.room += self.cached.pop(key)
            return now
        return self.read(now, num_bytes)

    def end_use(self, key: Any, num_bytes: int) -> None:
        self.in_use[key] -= 1
        if self.in_use[key]:
            return
        del self.in_use[key]
        self.cached[key] = num_bytes
        self.room -= num_bytes
        while self.room < 0:
            self.room += self.cached.pop(next(iter(self.cached)))


class Node:
    """The cores that the workers of a node's ranks share; ``waiting`` have something to do and no core."""

    __slots__ = ("free_cores", "waiting")

    def __init__(self, machine: Machine) -> None:
        self.free_cores = machine.cores
        self.waiting: deque[Any] = deque()
