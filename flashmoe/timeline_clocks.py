"""Times of several clocks as times of one, by what no clock can deny: rows arrive after they were sent.

Between two clocks, rows that went one way bound their difference from above, by the fastest of them, and those that
went the other way from below. What is left between the bounds is the time that rows were under way, there and back; half
of it is how wrong the middle can be.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .timeline import RankTrace


@dataclass(frozen=True)
class Put:
    """Rows that one rank's worker sent and another's saw."""

    source: int
    worker: int
    begun: int
    sent: int
    destination: int
    seen_by: int
    seen: int
    chunk: int


def puts(ranks: list[RankTrace]) -> Iterator[Put]:
    """Of each chunk, whom its rows left and who was the first to see them."""
    from .timeline import ARRIVED, SEND

    first: dict[tuple[int, int], list[tuple[int, int, int]]] = {}  # (to, from) → when, chunks that were here, worker
    for rank in ranks:
        for worker, events in enumerate(rank.workers):
            for event in events[events["kind"] == ARRIVED]:
                seen = int(event["begin"]), int(event["part"]), worker
                first.setdefault((rank.rank, int(event["index"])), []).append(seen)
    for moments in first.values():
        moments.sort()
        most = 0  # several workers may note the same, and each notes it again
        moments[:] = [one for one in moments if one[1] > most and (most := one[1])]
    for rank in ranks:
        for worker, events in enumerate(rank.workers):
            for event in events[events["kind"] == SEND]:
                to, chunk = int(event["index"]), int(event["part"])
                found = next((one for one in first.get((to, rank.rank), []) if one[1] > chunk), None)
                if found is not None:  # else a shorter packet's empty ticket
                    yield Put(rank.rank, worker, int(event["begin"]), int(event["end"]), to, found[2], found[0], chunk)


def align(ranks: list[RankTrace]) -> float:
    """Moves the ranks' times onto the clock of the first.

    Returns how wrong the moved ones may be, in nanoseconds: 0 for one clock, infinite if rows went no way from one
    clock to another and back.
    """
    clock_of = {rank.rank: rank.clock for rank in ranks}
    fastest: dict[tuple[str, str], int] = {}
    for put in puts(ranks):
        pair = clock_of[put.source], clock_of[put.destination]
        fastest[pair] = min(fastest.get(pair, put.seen - put.sent), put.seen - put.sent)
    offset, error = {ranks[0].clock: 0}, 0.0
    while len(offset) < len(set(clock_of.values())):
        # The surest step from a clock that is known to one that is not.
        steps = [
            (there + fastest[new, known], known, new)
            for (known, new), there in fastest.items()
            if known in offset and new not in offset and (new, known) in fastest
        ]
        if not steps:
            return math.inf
        both_ways, known, new = min(steps)
        offset[new] = offset[known] + (fastest[known, new] - fastest[new, known]) // 2
        error = max(error, abs(both_ways) / 2)
    for rank in ranks:
        if offset[rank.clock]:
            rank.workers = [_moved(events, offset[rank.clock]) for events in rank.workers]
    return error


def _moved(events: np.ndarray, by: int) -> np.ndarray:
    moved = events.copy()
    for name in ("begin", "end", "loads"):
        moved[name] = (events[name].astype(np.int64) - by).astype(np.uint64)
    return moved
