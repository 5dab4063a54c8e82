"""How much of the time that rows travel is hidden behind work."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .timeline_clocks import puts

if TYPE_CHECKING:
    from .timeline import RankTrace


def overlap(ranks: list[RankTrace]) -> float | None:
    """While rows are under way to a rank, from the beginning of their put until somebody there sees them, or from the
    beginning of its own call: the share of its workers' time in which they do something. None if no rows travel."""
    from .timeline import _work

    under_way: dict[int, list[tuple[int, int]]] = {}
    for put in puts(ranks):
        under_way.setdefault(put.destination, []).append((put.begun, put.seen))
    busy = everything = 0
    for rank in ranks:
        workers = [_work(events) for events in rank.workers]
        entered = min((int(work["begin"].min()) for work in workers if len(work)), default=0)
        for begin, end in _union([(max(begin, entered), end) for begin, end in under_way.get(rank.rank, [])]):
            everything += (end - begin) * len(workers)
            for work in workers:
                until, since = np.minimum(work["end"], end), np.maximum(work["begin"], begin)
                busy += int((until - since)[until > since].sum())
    return busy / everything if everything else None


def _union(intervals: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those that touch as one, in their order."""
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(intervals):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((begin, end))
    return [(begin, end) for begin, end in joined if begin < end]
