"""The timeline of one call: what every worker of every rank did, and when."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import groups

# As TraceEvent of csrc/protocol/trace.h; times in nanoseconds of the host's monotonic clock.
EVENT = np.dtype(
    [("begin", "u8"), ("end", "u8"), ("kind", "u4"), ("index", "i4"), ("part", "i4"), ("expert", "i4"),
     ("rows", "u4"), ("sequence", "u4")]
)  # fmt: skip
PLAN, SEND, UP, DOWN, COMBINE, ARRIVED, PUBLISHED = 1, 2, 3, 4, 5, 16, 17
NAMES = {PLAN: "plan and headers", SEND: "send", UP: "up", DOWN: "down", COMBINE: "combine"}


@dataclass
class RankTrace:
    """One rank's part.

    Attributes:
        rank: in its group.
        workers: events [n] of dtype EVENT of each worker, in the order in which they ended; `rows`, `expert` and
            `sequence` (of the row block) are a tile's. ARRIVED: by then `part` chunks of rank `index` were here.
            PUBLISHED: in this step of the scheduler the row blocks below `sequence` became runnable.
        lost: events for which there was no room.
    """

    rank: int
    workers: list[np.ndarray]
    lost: int


@dataclass
class Trace:
    """A call on one rank, or with ``gathered`` on all ranks of the group, whose hosts' clocks must agree."""

    ranks: list[RankTrace] = field(default_factory=list)

    def gathered(self, parts: Sequence[Trace]) -> Trace:
        """This and the other ranks' parts as one, in the order of their ranks."""
        ranks = [rank for part in parts for rank in part.ranks]
        return Trace(sorted(ranks, key=lambda one: one.rank))

    def summary(self) -> dict[str, Any]:
        """Numbers of the call, in seconds and shares of all workers' time from its first event to its last.

        utilization: workers doing something. tiles: of it, matrix products. exposed: waiting between two pieces of
        work, for rows or results under way or for another rank. tail: waiting after a worker's last piece. Also
        rows_sent_seconds (copying rows to peers, all workers) and lost_events.
        """
        work = [(events, _work(events)) for rank in self.ranks for events in rank.workers]
        if not any(len(busy) for _, busy in work):
            raise ValueError("the trace holds no work: call the layer inside `with trace(...)`")
        begin = min(int(busy["begin"].min()) for _, busy in work if len(busy))
        end = max(int(busy["end"].max()) for _, busy in work if len(busy))
        everything = (end - begin) * len(work)
        busy = sum(_seconds(part, *NAMES) for _, part in work)
        tail = sum((end - int(part["end"].max()) if len(part) else end - begin) for _, part in work)
        return {
            "seconds": (end - begin) / 1e9,
            "workers": len(work),
            "utilization": busy / everything,
            "tiles": sum(_seconds(part, UP, DOWN) for _, part in work) / everything,
            "exposed": (everything - busy - tail) / everything,
            "tail": tail / everything,
            "rows_sent_seconds": sum(_seconds(part, SEND) for _, part in work) / 1e9,
            "lost_events": sum(rank.lost for rank in self.ranks),
        }

    def save(self, path: str | Path) -> None:
        """As JSON for Perfetto (ui.perfetto.dev) or chrome://tracing: a process a rank, a thread a worker, and an arrow
        from each put of rows to the moment at which its destination saw them."""
        begin = min((int(events["begin"].min()) for rank in self.ranks for events in rank.workers if len(events)), default=0)
        entries: list[dict[str, Any]] = []
        for rank in self.ranks:
            entries.append(_named("process_name", f"rank {rank.rank}", rank.rank, 0))
            for worker, events in enumerate(rank.workers):
                entries.append(_named("thread_name", f"worker {worker}", rank.rank, worker))
                entries.extend(_slice(event, rank.rank, worker, begin) for event in _work(events))
        entries.extend(self._arrows(begin))
        Path(path).write_text(json.dumps({"displayTimeUnit": "ns", "traceEvents": entries}))

    def draw(self, path: str | Path) -> None:
        """As a picture, one lane a worker. Needs matplotlib."""
        from .timeline_figure import draw

        draw(self, Path(path))

    def _arrows(self, begin: int) -> Iterator[dict[str, Any]]:
        # When each destination first saw so many chunks of a source; several workers may have noted it.
        seen: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        for rank in self.ranks:
            for worker, events in enumerate(rank.workers):
                for event in events[events["kind"] == ARRIVED]:
                    key = (rank.rank, int(event["index"]))
                    seen.setdefault(key, []).append((int(event["begin"]), int(event["part"]), worker))
        for rank in self.ranks:
            for worker, events in enumerate(rank.workers):
                for event in events[events["kind"] == SEND]:
                    to, chunk, sent = int(event["index"]), int(event["part"]), int(event["end"])
                    moments = [one for one in seen.get((to, rank.rank), []) if one[1] > chunk]
                    if not moments:
                        continue  # a shorter packet's empty ticket
                    when, _, by = min(moments)
                    name = {"name": "rows", "cat": "rows", "id": f"{rank.rank}.{to}.{chunk}"}
                    yield name | {"ph": "s", "pid": rank.rank, "tid": worker, "ts": (sent - begin) / 1e3}
                    yield name | {"ph": "f", "bp": "e", "pid": to, "tid": by, "ts": (max(when, sent) - begin) / 1e3}


@contextlib.contextmanager
def trace(group: Any = None, max_events: int = 1 << 16) -> Iterator[Trace]:
    """Within the block the group's calls are traced; after it the Trace holds the last of them, of this rank.

    Args:
        group: as of the layer; None: the layers of one process. On the CPU alone.
        max_events: of one worker and call; what exceeds them is counted alone.
    """
    if type(max_events) is not int or not 0 < max_events < 2**31:
        raise ValueError(f"max_events must be an integer of at least 1, got {max_events!r}")
    if group is None:
        with groups.local.lock:
            found = groups.local.acquire()
    else:
        found = groups.find(groups.name_of(group))
    traced = Trace()
    found.set_trace(max_events)
    try:
        yield traced
        workers, lost = found.trace()
        traced.ranks = [RankTrace(found.ep_rank, [np.frombuffer(events, EVENT) for events in workers], lost)]
    finally:
        found.set_trace(0)


def _work(events: np.ndarray) -> np.ndarray:
    return events[events["kind"] <= COMBINE]


def _seconds(events: np.ndarray, *kinds: int) -> int:
    """Nanoseconds of these kinds of work."""
    chosen = events[np.isin(events["kind"], kinds)]
    return int((chosen["end"] - chosen["begin"]).sum())


def _named(what: str, name: str, rank: int, worker: int) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": rank, "tid": worker, "args": {"name": name}}


def _slice(event: np.void, rank: int, worker: int, begin: int) -> dict[str, Any]:
    kind = int(event["kind"])
    name, arguments = NAMES[kind], {}
    if kind in (UP, DOWN):
        name = f"{name} expert {int(event['expert'])}"
        arguments = {"row block": int(event["sequence"]), "tile": int(event["part"]), "rows": int(event["rows"])}
    elif kind == SEND:
        name = f"send to rank {int(event['index'])}"
        arguments = {"chunk": int(event["part"])}
    elif kind == COMBINE:
        arguments = {"task": int(event["index"])}
    return {
        "ph": "X", "name": name, "cat": NAMES[kind], "pid": rank, "tid": worker, "args": arguments,
        "ts": (int(event["begin"]) - begin) / 1e3, "dur": (int(event["end"]) - int(event["begin"])) / 1e3,
    }  # fmt: skip
