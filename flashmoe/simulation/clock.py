"""What will happen, in the order of its time; of equal times, in the order of asking."""

import heapq
from collections.abc import Callable
from itertools import count
from typing import Any


class Clock:
    """Times are integers, so that a sum does not depend on its order."""

    def __init__(self) -> None:
        self._events: list[tuple] = []
        self._ticks = count()

    def at(self, time: int, happen: Callable[..., None], *what: Any) -> None:
        """Call ``happen(time, *what)`` then."""
        heapq.heappush(self._events, (time, next(self._ticks), happen, what))

    def run(self) -> None:
        """Until nothing will happen any more."""
        events = self._events
        while events:
            now, _, happen, what = heapq.heappop(events)
            happen(now, *what)
