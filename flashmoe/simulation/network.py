"""What travels between followed ranks: which port it takes, when it has left, and when it is here."""

from collections.abc import Callable
from typing import Any

from .clock import Clock
from .devices import Port
from .machine import Machine
from .player import Player

SIGNAL_BYTES = 8


class Network:
    """Between ``players``, each of whom stands for every ``len(players)``-th rank of a world of ``num_ranks``."""

    def __init__(self, machine: Machine, num_ranks: int, players: list[Player], clock: Clock) -> None:
        self.players, self.num_ranks, self.clock = players, num_ranks, clock
        self.far_is_staged, self.ranks_per_node = machine.far.staged, machine.ranks_per_node

    def is_near(self, player: Player, offset: int) -> bool:
        """Whether the rank so many places further is of the same node."""
        index, ranks = player.rank.index, self.ranks_per_node
        return index // ranks == (index + offset) % self.num_ranks // ranks

    def is_staged(self, player: Player, offset: int) -> bool:
        return self.far_is_staged and not self.is_near(player, offset)

    def port(self, player: Player, offset: int) -> Port:
        return player.near if self.is_near(player, offset) else player.far

    def peer(self, player: Player, offset: int) -> tuple[Player, Port]:
        """Who does what the rank so many places further does, and the port by which it hears of this one."""
        peer = self.players[(player.rank.index + offset) % self.num_ranks % len(self.players)]
        return peer, peer.near if self.is_near(player, offset) else peer.far

    def travel(self, left: int, player: Player, offset: int, num_bytes: int, happen: Callable[..., None],
               *what: Any) -> None:  # fmt: skip
        """``happen(time, peer, *what)`` once bytes that leave at ``left`` are with the rank so many places further."""
        player.landed = max(player.landed, left)
        peer, port = self.peer(player, offset)
        self.clock.at(left, self._come_in, port, num_bytes, happen, peer, *what)

    def _come_in(self, now: int, port: Port, num_bytes: int, happen: Callable[..., None], *what: Any) -> None:
        # Not earlier, when it was not known what else would come in at this time.
        self.clock.at(port.arrive(now, num_bytes), happen, *what)

    def count(self, player: Player, kind: str, offset: int, num_bytes: int) -> None:
        """As the host's platform does, with the signal that goes with them."""
        player.sent[kind][offset] += num_bytes
        player.sent["signals"][offset] += SIGNAL_BYTES

    def near_rows(self, player: Player, block: int) -> int:
        """Of a row block, rows that are written into the results of peers directly."""
        blocks = player.rank.blocks
        return sum(
            blocks.run_rows[run]
            for run in range(blocks.run_begin[block], blocks.run_begin[block + 1])
            if blocks.run_source[run] and not self.is_staged(player, blocks.run_source[run])
        )
