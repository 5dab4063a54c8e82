"""The timeline of a run's last call, of all ranks, and what noting it costs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .measure import Clock, Contender, Ranks, speedup
from .module import MoE
from .timeline import Trace, trace
from .virtual_layer import VirtualLayer


class Traced(Contender):
    """The same calls while they are traced, of which the timeline is that of the last."""

    def __init__(self, ours: Contender, layer: MoE | VirtualLayer, ranks: Ranks) -> None:
        super().__init__("while traced", ours.call, ours.threads)
        self._group = layer.ranks if isinstance(layer, VirtualLayer) else dist.group.WORLD if ranks.size > 1 else None

    def time_once(self, clock: Clock) -> float:
        with trace(self._group):
            self.call()  # memory for the notes is had, and no idle time is in the next call's
            return super().time_once(clock)

    def timeline(self, ranks: Ranks) -> Trace | None:
        """Of one more call of all ranks, on rank 0."""
        torch.set_num_threads(self.threads)
        with trace(self._group) as traced:
            for _ in range(2):  # the last one is kept, and found warm
                ranks.barrier()
                self.call()
        parts = ranks.collect_objects(traced)
        return traced.gathered(parts) if parts is not None else None


def write_timeline(timeline: Trace, path: Path, report: Callable[[str], None]) -> None:
    """As JSON, and as a picture beside it if there is matplotlib."""
    timeline.save(path)
    try:
        timeline.draw(path.with_suffix(".png"))
    except ImportError as missing:
        report(f"no picture of the timeline: {missing}")


def summary(timeline: Trace, ours: Contender, traced: Contender) -> dict[str, Any]:
    """The timeline's numbers, and how many times as long a call takes while it is traced."""
    cost = speedup(ours, traced)
    return timeline.summary() | {"cost": cost["ratio"], "cost_quartiles": cost["ratio_quartiles"]}
