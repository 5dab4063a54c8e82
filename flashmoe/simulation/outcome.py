"""What a simulated call came to: seconds, busy workers, bytes."""

from dataclasses import dataclass

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
    """

    seconds: float
    entered: float
    busy: dict[str, float]
    sent: dict[str, list[int]]
    rows: int
    blocks: int
    most_in_ring: int
    memory_bytes_read: int


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
    def busiest_rank(self) -> float:
        """Rows of the busiest over the mean."""
        rows = [rank.rows for rank in self.ranks]
        return max(rows) * len(rows) / max(sum(rows), 1)
