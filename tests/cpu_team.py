"""``_C.CudaTeam`` where there is no GPU: its ranks are those of the CPU, as threads, and compute what they are asked.

``install`` makes the package believe in a GPU whose memory is the host's.
"""

import contextlib
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from flashmoe import _C, cuda_teams
from flashmoe.timeline import ARRIVED, EVENT, PUBLISHED


class CpuTeam:
    """Each rank has one block, and so one worker."""

    def __init__(self, device: int, limits: _C.Limits | None = None, **given: object):
        self.groups = [_C.local_group(1)] if limits is None else _C.local_team(limits, num_workers=1)
        self.max_events = 0

    def forward(self, ranks: list[tuple], stream: int, tf32: bool) -> None:
        with ThreadPoolExecutor(len(ranks)) as pool:
            list(pool.map(lambda group, arguments: group.forward(None, *arguments), self.groups, ranks))

    def backward(self, ranks: list[tuple], grads: list[tuple], stream: int) -> None:
        with ThreadPoolExecutor(len(ranks)) as pool:
            list(pool.map(lambda group, grad, arguments: group.backward(None, *grad, *arguments), self.groups, grads, ranks))

    def check(self) -> None:
        pass

    def stats(self, layer: int, rank: int = 0) -> dict:
        return self.groups[rank].stats()

    def set_trace(self, max_events: int) -> None:
        self.max_events = max_events
        for group in self.groups:
            group.set_trace(max_events)

    def trace(self) -> list[list[tuple[bytes, int, int]]]:
        """As of a GPU: what the block did, what its subscriber saw, what its scheduler published."""
        ranks = []
        for number, group in enumerate(self.groups if self.max_events else []):
            (worker,), lost = group.trace()
            events = np.frombuffer(worker, EVENT)
            kinds = [events["kind"] < ARRIVED, events["kind"] == ARRIVED, events["kind"] == PUBLISHED]
            lists = [events[chosen] for chosen in kinds]
            ranks.append([(one.tobytes(), len(one) + lost * (one is lists[0]), number) for one in lists])
        return ranks


def install(monkeypatch, gpus: int = 1) -> None:
    monkeypatch.setattr(_C, "CudaTeam", CpuTeam, raising=False)
    for name in ("ForwardArgs", "Gradients"):
        monkeypatch.setattr(_C, name, lambda *arguments: arguments, raising=False)
    monkeypatch.setattr(_C, "num_cuda_devices", lambda: gpus, raising=False)
    monkeypatch.setattr(cuda_teams, "_local", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=0))
    properties = types.SimpleNamespace(uuid="uuid-0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
