"""What a simulated call came to: seconds, busy workers, bytes."""

from dataclasses import dataclass

from ..models import LayerShape
from .devices import PICO
from .player import Player

_PRODUCTS = ("up", "down")


@dataclass(frozen=True)
class RankOutcome:
    """Of one followed rank.

    Attributes:
        seconds: of its call, from its own entry.
        entered: after the first.
        busy: seconds of all its workers, by kind of work.
        sent: bytes to the rank so many places further, by kind of traffic, as ``GroupStats`` counts them.
        rows, blocks: that it computed.
        most_in_ring: row blocks between their up and down tiles at one time.
        memory_bytes_read: weights and results, out of the memory that it has, or shares.
        wire_seconds: that its bytes take through its busier port.
    """

    seconds: float
    entered: float
    busy: dict[str, float]
    sent: dict[str, list[int]]
    rows: int
    blocks: int
    most_in_ring: int
    memory_bytes_read: int
    wire_seconds: float


@dataclass(frozen=True)
class Outcome:
    """Of the whole world; ``flops`` are those of the followed ranks."""

    ranks: tuple[RankOutcome, ...]
    workers: int
    engine: str
    flops: int

    @property
    def seconds(self) -> float:
        """From the first entry to the last exit."""
        return max(rank.entered + rank.seconds for rank in self.ranks)

    @property
    def utilisation(self) -> float:
        """Share of all workers' time in which they compute tiles."""
        tiles = sum(rank.busy[kind] for rank in self.ranks for kind in _PRODUCTS)
        return tiles / (len(self.ranks) * self.workers * self.seconds)

    @property
    def flops_of_a_rank(self) -> float:
        """A second."""
        return self.flops / len(self.ranks) / self.seconds

    @property
    def wire_seconds(self) -> float:
        """The least time in which all bytes can travel."""
        return max(rank.wire_seconds for rank in self.ranks)

    @property
    def busiest_rank(self) -> float:
        """Rows of the busiest over the mean."""
        rows = [rank.rows for rank in self.ranks]
        return max(rows) * len(rows) / max(sum(rows), 1)


def outcome_of(players: list[Player], workers: int, engine: str, shape: LayerShape) -> Outcome:
    """After the call has ended everywhere."""
    ranks = tuple(
        RankOutcome(
            seconds=(max(player.end, player.landed) - player.late) / PICO,
            entered=player.late / PICO,
            busy={kind: busy / PICO for kind, busy in player.busy.items()},
            sent=player.sent,
            rows=sum(player.rank.blocks.rows),
            blocks=len(player.rank.blocks.rows),
            most_in_ring=player.most_in_ring,
            memory_bytes_read=player.memory.bytes_read,
            wire_seconds=max(port.bytes_out * port.per_byte for port in (player.near, player.far)) / PICO,
        )
        for player in players
    )
    return Outcome(ranks, workers, engine, shape.flops(sum(rank.rows for rank in ranks)))
