"""The timeline of one call: what every worker of every rank did, and when."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .timeline_clocks import align, puts
from .timeline_overlap import overlap

# As TraceEvent of csrc/protocol/trace.h; times in nanoseconds of the host's monotonic clock, or of the GPU's own.
EVENT = np.dtype(
    [("begin", "u8"), ("end", "u8"), ("loads", "u8"), ("kind", "u4"), ("index", "i4"), ("part", "i4"),
     ("expert", "i4"), ("rows", "u4"), ("sequence", "u4")]
)  # fmt: skip
PLAN, SEND, UP, DOWN, COMBINE, GRADIENT, ARRIVED, PUBLISHED = 1, 2, 3, 4, 5, 6, 16, 17
NAMES = {PLAN: "plan and headers", SEND: "send", UP: "up", DOWN: "down", COMBINE: "combine", GRADIENT: "weight gradients"}


@dataclass
class RankTrace:
    """One rank's part.

    Attributes:
        rank: in its group.
        workers: events [n] of dtype EVENT of each worker, in the order in which they ended; `rows`, `expert` and
            `sequence` (of the row block) are a tile's. ARRIVED: by then `part` chunks of rank `index` were here.
            PUBLISHED: in this step of the scheduler the row blocks below `sequence` became runnable. `loads`: when the
            loading of a tile's operands began, before its `begin` where a GPU's block has warps that run ahead.
        lost: events for which there was no room.
        lanes: the workers' names: threads of the host, or blocks of a GPU and their multiprocessors.
        clock: whose times these are; equal where they can be compared.
    """

    rank: int
    workers: list[np.ndarray]
    lost: int
    lanes: list[str] = field(default_factory=list)
    clock: str = ""

    def __post_init__(self) -> None:
        self.lanes = self.lanes or [f"worker {worker}" for worker in range(len(self.workers))]


@dataclass
class Trace:
    """A call on the ranks of this process, or with ``gathered`` on all ranks of the group.

    Attributes:
        clock_error: how wrong times of one rank are beside another's, in seconds: 0 where all are of one clock.
    """

    ranks: list[RankTrace] = field(default_factory=list)
    clock_error: float = 0.0

    def gathered(self, parts: Sequence[Trace]) -> Trace:
        """This and the other ranks' parts as one, in the order of their ranks.

        Clocks of several GPUs or hosts do not agree: times are moved so that no rows arrive before they were sent,
        which leaves clock_error; it is infinite, and nothing moved, if some two exchanged none.
        """
        ranks = [dataclasses.replace(rank) for part in parts for rank in part.ranks]
        ranks.sort(key=lambda one: one.rank)
        return Trace(ranks, align(ranks) / 1e9)

    def summary(self) -> dict[str, Any]:
        """Numbers of the call, in seconds and shares of all workers' time from its first event to its last.

        utilization: workers doing something. tiles: of it, matrix products. exposed: waiting between two pieces of
        work, for rows or results under way or for another rank. tail: waiting after a worker's last piece. overlap: of
        the workers' time while rows are under way to their rank, what they work (None: no rows travel). Also
        rows_sent_seconds (copying rows to peers, all workers), lost_events, clock_step (the smallest difference between
        two times: a GPU's clock may stand still for a microsecond) and clock_error (None: it is not known).
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
            "tiles": sum(_seconds(part, UP, DOWN, GRADIENT) for _, part in work) / everything,
            "exposed": (everything - busy - tail) / everything,
            "tail": tail / everything,
            "overlap": overlap(self.ranks),
            "rows_sent_seconds": sum(_seconds(part, SEND) for _, part in work) / 1e9,
            "lost_events": sum(rank.lost for rank in self.ranks),
            "clock_step": min(_clock_step(rank) for rank in self.ranks) / 1e9,
            "clock_error": self.clock_error if math.isfinite(self.clock_error) else None,
        }

    def save(self, path: str | Path) -> None:
        """As JSON for Perfetto (ui.perfetto.dev) or chrome://tracing: a process a rank, a thread a worker or block, and an
        arrow from each put of rows to the moment at which its destination saw them."""
        begin = min((int(events["begin"].min()) for rank in self.ranks for events in rank.workers if len(events)), default=0)
        entries: list[dict[str, Any]] = []
        for rank in self.ranks:
            entries.append(_named("process_name", f"rank {rank.rank}", rank.rank, 0))
            for worker, events in enumerate(rank.workers):
                entries.append(_named("thread_name", rank.lanes[worker], rank.rank, worker))
                entries.extend(_slice(event, rank.rank, worker, begin) for event in _work(events))
        entries.extend(self._arrows(begin))
        Path(path).write_text(json.dumps({"displayTimeUnit": "ns", "traceEvents": entries}))

    def draw(self, path: str | Path) -> None:
        """As a picture, one lane a worker. Needs matplotlib."""
        from .timeline_figure import draw

        draw(self, Path(path))

    def _arrows(self, begin: int) -> Iterator[dict[str, Any]]:
        for put in puts(self.ranks):
            name = {"name": "rows", "cat": "rows", "id": f"{put.source}.{put.destination}.{put.chunk}"}
            seen = max(put.seen, put.sent)
            yield name | {"ph": "s", "pid": put.source, "tid": put.worker, "ts": (put.sent - begin) / 1e3}
            yield name | {"ph": "f", "bp": "e", "pid": put.destination, "tid": put.seen_by, "ts": (seen - begin) / 1e3}


@contextlib.contextmanager
def trace(group: Any = None, max_events: int | None = None) -> Iterator[Trace]:
    """Within the block the group's calls are traced; after it the Trace holds the last of them, of this process.

    On a GPU leaving the block waits for that call. A call that a CUDA graph captures cannot be traced (RuntimeError),
    and what a graph replays is not.

    Args:
        group: as of the layer, or a VirtualRanks; None: the layers of one process, of which a call on a GPU hides those
            on the CPU.
        max_events: of one worker and call; what exceeds them is counted alone. None: 65536, and 8192 of a GPU's block,
            for which each takes 48 bytes of its memory.

    Raises:
        RuntimeError: the group is being traced already: its calls keep one timeline.
    """
    from .timeline_source import claimed, source_of

    if max_events is not None and (type(max_events) is not int or not 0 < max_events < 2**31):
        raise ValueError(f"max_events must be an integer of at least 1, got {max_events!r}")
    source = source_of(group)
    traced = Trace()
    with claimed(source):
        source.start(max_events)
        try:
            yield traced
            traced.ranks = source.ranks()
        finally:
            source.stop()


def _work(events: np.ndarray) -> np.ndarray:
    return events[events["kind"] <= GRADIENT]


def _clock_step(rank: RankTrace) -> int:
    """Nanoseconds; 0 if all times are equal."""
    times = np.unique(np.concatenate([events[name] for events in rank.workers for name in ("begin", "end")]))
    return int(np.diff(times).min(initial=times[-1] - times[0])) if len(times) else 0


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
        arguments["loads begin"] = (int(event["loads"]) - begin) / 1e3
    elif kind == SEND:
        name = f"send to rank {int(event['index'])}"
        arguments = {"chunk": int(event["part"])}
    elif kind == GRADIENT:
        name, arguments = f"{name} of expert {int(event['expert'])}", {"tile": int(event["part"])}
    elif kind == COMBINE:
        arguments = {"task": int(event["index"])}
    return {
        "ph": "X", "name": name, "cat": NAMES[kind], "pid": rank, "tid": worker, "args": arguments,
        "ts": (int(event["begin"]) - begin) / 1e3, "dur": (int(event["end"]) - int(event["begin"])) / 1e3,
    }  # fmt: skip
