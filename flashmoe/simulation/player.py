"""A followed rank with its workers and devices, and what it has done so far."""

from typing import Any

from .devices import Memory, Node, Port
from .machine import Machine
from .rank import Rank

KINDS = ("plan", "send", "up", "down", "combine")
TRAFFIC = ("header", "rows", "results", "signals")


class Player:
    """A rank with its workers and devices."""

    def __init__(self, rank: Rank, machine: Machine, memory: Memory, node: Node, late: int, slow: float) -> None:
        self.rank, self.memory, self.node = rank, memory, node
        self.near, self.far = Port(machine.near), Port(machine.far)
        self.late, self.slow = late, slow
        self.idle: dict[int, None] = {}
        self.has_sent = [False] * machine.workers  # on the host, tiles and sends take turns
        self.sending = 0
        self.running: dict[int, tuple[Any, int]] = {}  # worker → weights that its tile reads
        self.looking = self.deciding = False
        self.expert_of = rank.blocks.expert_of()
        self.busy = dict.fromkeys(KINDS, 0)
        self.sent = {kind: [0] * rank.num_ranks for kind in TRAFFIC}
        self.end = self.landed = late
        self.most_in_ring = 0
