"""Stretches of work on a GPU, timed there, and why they are skipped where there is none."""

from collections.abc import Callable

import pytest
import torch

from flashmoe.cuda_teams import has_cuda

needs_gpu = pytest.mark.skipif(not has_cuda(), reason="needs a GPU, and a build of flashmoe with its CUDA half")


def stretch_of(call: Callable[[], object]) -> Callable[[int], float]:
    """n calls between two CUDA events: the GPU's own time, if the host queues them fast enough."""

    def stretch(n: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(n):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / n

    return stretch


def graph_of(call: Callable[[], object], calls: int) -> Callable[[], None]:
    """Replays ``calls`` of them as one graph, so that the host has no part in the time of each."""
    call()  # memory that a capture may not ask for
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return graph.replay
