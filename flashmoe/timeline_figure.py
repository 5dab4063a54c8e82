"""A timeline as a picture: one lane a worker or block, and below how many of them did what."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .timeline import Trace

_COLORS = {
    "plan and headers": "#8a63b3", "send": "#b08e2f", "up": "#2a78b5", "down": "#4f9d69", "combine": "#d1603d",
    "weight gradients": "#8c8c8c",
}  # fmt: skip
_BINS = 400
_TALLEST = 11.0  # inches of lanes, unless they would be too thin to see


def draw(trace: Trace, path: Path) -> None:
    """Write ``path`` in the format of its suffix."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from .timeline import NAMES, _work

    lanes = [
        (f"rank {rank.rank}, {lane}", _work(events))
        for rank in trace.ranks
        for lane, events in zip(rank.lanes, rank.workers, strict=True)
    ]
    begin = min(int(events["begin"].min()) for _, events in lanes if len(events))
    end = max(int(events["end"].max()) for _, events in lanes if len(events))
    bins = np.linspace(begin, end, _BINS + 1)
    height = min(0.34 * len(lanes), max(_TALLEST, 0.08 * len(lanes)))
    figure, (timeline, share) = pyplot.subplots(
        2, 1, figsize=(11, 2.2 + height), sharex=True, layout="constrained", height_ratios=[max(1.0, height), 1.2]
    )  # fmt: skip
    below = np.zeros(_BINS)
    kinds = [kind for kind in NAMES if any((events["kind"] == kind).any() for _, events in lanes)]
    for kind in kinds:
        name = NAMES[kind]
        busy = np.zeros(_BINS)
        for lane, (_, events) in enumerate(lanes):
            chosen = events[events["kind"] == kind]
            spans = [((int(e["begin"]) - begin) / 1e6, (int(e["end"]) - int(e["begin"])) / 1e6) for e in chosen]
            timeline.broken_barh(spans, (lane - 0.4, 0.8), color=_COLORS[name], lw=0)
            for event in chosen:
                overlap = np.minimum(bins[1:], event["end"]) - np.maximum(bins[:-1], event["begin"])
                busy += np.clip(overlap, 0, None)
        busy /= bins[1] - bins[0]
        centers = (bins[:-1] - begin) / 1e6
        share.fill_between(centers, below, below + busy, color=_COLORS[name], lw=0, step="post", label=name)
        below += busy
    named = range(0, len(lanes), math.ceil(0.17 * len(lanes) / height))
    timeline.set_yticks(named, [lanes[lane][0] for lane in named], fontsize=8)
    timeline.set_ylim(len(lanes) - 0.5, -0.5)
    share.set_ylabel("workers")
    share.set_ylim(0, len(lanes))
    share.set_xlim(0, (end - begin) / 1e6)
    share.set_xlabel("ms")
    share.legend(ncols=len(kinds), loc="upper center", bbox_to_anchor=(0.5, -0.35), fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
