"""Time on a GPU as it sees it itself, by events, and calls that are replayed from a CUDA graph."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

CALLS_OF_A_GRAPH = 10


def gpu_seconds(call: Callable[[], object]) -> float:
    """From the call's first piece of work to its last on the current stream."""
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def captured(calls: Sequence[Callable[[], Any]]) -> tuple[Callable[[], None], list[Any], int]:
    """A replay of a graph in which the calls take turns, the results of the first turn, how many calls there are.

    Every call must have been made before, so that it finds its memory.
    """
    rounds = -(-CALLS_OF_A_GRAPH // len(calls))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]
        for _ in range(rounds - 1):  # whose results the graph may overwrite
            for call in calls:
                call()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay, results, rounds * len(calls)
