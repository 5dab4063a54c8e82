"""Workers between two pieces of work: who decides next, on which core, and who is woken."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from .clock import Clock
from .devices import Node, picoseconds
from .machine import Machine
from .player import Player


class Workers(ABC):
    """On a GPU each has a multiprocessor; on the host they share a node's cores, in turns of one piece of work."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.clock = machine, Clock()
        self.notice = picoseconds(machine.notice_s)

    @abstractmethod
    def _decide(self, now: int, player: Player, worker: int) -> None:
        """Begin what is to be done next, or be idle."""

    def _be_idle(self, now: int, player: Player, worker: int) -> None:
        player.idle[worker] = None
        self._pass_core(now, player.node)

    def _ready(self, now: int, player: Player, worker: int) -> None:
        """A worker wants to decide; on the host it needs a core for that."""
        node = player.node
        if node.free_cores is not None:
            if node.free_cores == 0:
                node.waiting.append((player, worker))
                return
            node.free_cores -= 1
        self._decide(now, player, worker)

    def _next(self, now: int, player: Player, worker: int) -> None:
        """A worker has finished something."""
        player.end = now
        if player.node.waiting:  # others want the core, too
            player.node.waiting.append((player, worker))
            self._pass_core(now, player.node)
        else:
            self._decide(now, player, worker)

    def _pass_core(self, now: int, node: Node) -> None:
        if node.free_cores is None:
            return
        if node.waiting:
            self._decide(now, *node.waiting.popleft())
        else:
            node.free_cores += 1

    def _wake(self, now: int, player: Player, most: int) -> None:
        for _ in range(min(most, len(player.idle))):
            worker, _ = player.idle.popitem()
            self.clock.at(now + self.notice, self._ready, player, worker)

    def _work(self, now: int, end: int, kind: str, done: Callable[..., None], player: Player, *what: Any) -> None:
        player.busy[kind] += end - now
        self.clock.at(end, done, player, *what)
