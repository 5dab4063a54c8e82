"""The timeline of calls on GPUs, without one: whose calls are traced, when memory is held for it, whose lanes are whose."""

import contextlib
import json
import types

import numpy as np
import pytest
import torch

import flashmoe
from flashmoe import _C, cuda_teams, groups
from flashmoe.timeline import ARRIVED, COMBINE, EVENT, PUBLISHED, UP
from flashmoe.timeline_source import rank_of_blocks
from flashmoe.virtual_ranks import VirtualRanks


def events(*rows: tuple[int, int, int]) -> bytes:
    made = np.zeros(len(rows), EVENT)
    for event, (kind, begin, end) in zip(made, rows, strict=True):
        event["kind"], event["begin"], event["end"], event["loads"] = kind, begin, end, begin - 3
    return made.tobytes()


# Two blocks, of which the second has done nothing, and what their agents saw.
LISTS = [
    (events((UP, 1000, 1040), (COMBINE, 1050, 1060)), 2, 17),
    (b"", 0, 4),
    (events((ARRIVED, 1045, 1045)), 3, 17),
    (events((PUBLISHED, 990, 995)), 1, 4),
]


class Team:
    """Stands in for ``_C.CudaTeam``."""

    made: list["Team"] = []

    def __init__(self, device: int, limits: _C.Limits | None = None, **given: object):
        self.device, self.ranks, self.max_events, self.calls, self.asked = device, limits.ep_size if limits else 1, 0, 0, []
        self.refuses: Exception | None = None
        Team.made.append(self)

    def forward(self, ranks: list, stream: int, tf32: bool) -> None:
        if self.refuses:
            raise self.refuses
        self.calls += 1

    def set_trace(self, max_events: int) -> None:
        self.max_events = max_events
        self.asked.append(max_events)

    def trace(self) -> list:
        assert self.max_events, "what it noted is gone"
        return [LISTS] * self.ranks


@pytest.fixture(autouse=True)
def gpus(monkeypatch):
    Team.made.clear()
    monkeypatch.setattr(_C, "CudaTeam", Team, raising=False)
    monkeypatch.setattr(_C, "ForwardArgs", lambda *arguments: arguments, raising=False)
    monkeypatch.setattr(cuda_teams, "has_cuda", lambda: True)
    monkeypatch.setattr(cuda_teams, "_local", {})
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid=f"uuid-{device}"))


def call_on(device: int) -> None:
    cuda_teams.call("forward", None, device, torch.float32, 0)


def call_on_the_cpu() -> None:
    torch.manual_seed(1)
    layer, x = flashmoe.MoE(16, 24, 4, 2), torch.randn(5, 16)
    with torch.no_grad():
        layer(x)


def test_a_block_has_its_crews_work_and_what_its_agent_saw():
    rank = rank_of_blocks(LISTS, 3, "a clock")
    assert rank.lanes == ["SM 17, block 0", "SM 4, block 1"] and (rank.rank, rank.clock, rank.lost) == (3, "a clock", 2)
    assert rank.workers[0]["kind"].tolist() == [UP, ARRIVED, COMBINE], "in the order in which they ended"
    assert rank.workers[1]["kind"].tolist() == [PUBLISHED]
    one = rank_of_blocks([LISTS[0], *LISTS[2:]], 0, "")
    assert one.workers[0]["kind"].tolist() == [PUBLISHED, UP, ARRIVED, COMBINE]


def test_memory_is_held_on_the_gpus_that_are_called_and_only_then():
    call_on(0), call_on(1)
    assert [team.asked for team in Team.made] == [[], []]
    with flashmoe.trace() as trace:
        assert [team.asked for team in Team.made] == [[], []]
        call_on(1), call_on(2), call_on(1), call_on(2)
        assert [team.asked for team in Team.made] == [[], [8192], [8192]], "once, before the first call"
    assert [team.asked for team in Team.made] == [[], [8192, 0], [8192, 0]]
    assert [rank.clock for rank in trace.ranks] == ["GPU uuid-2"], "of the last call"
    call_on(1)
    assert Team.made[1].asked == [8192, 0]
    with flashmoe.trace(max_events=7):
        call_on(1)
    assert Team.made[1].asked == [8192, 0, 7, 0]


def test_the_last_gpu_to_call_is_kept_and_hides_the_cpu():
    with flashmoe.trace() as trace:
        call_on(0), call_on(1), call_on(0), call_on_the_cpu()
    assert [rank.clock for rank in trace.ranks] == ["GPU uuid-0"]
    with flashmoe.trace() as trace:
        call_on_the_cpu()
    assert trace.ranks[0].lanes[0] == "worker 0" and trace.summary()["tiles"] > 0


def test_an_error_ends_the_trace():
    call_on(0)
    Team.made[0].refuses = RuntimeError("a call that a CUDA graph captures cannot be traced")
    with pytest.raises(RuntimeError, match="cannot be traced"), flashmoe.trace() as trace:
        call_on(0)
    assert Team.made[0].asked == [8192, 0] and trace.ranks == [] and not cuda_teams._traced


def test_a_group_of_one_on_a_gpu_has_a_trace_of_its_own():
    (group,) = _C.local_team(_C.Limits(1, 64, 4 * 128, 2, 6), num_workers=1)
    name = groups.name_of(group)
    with flashmoe.trace(group) as trace:
        cuda_teams.call("forward", name, 0, torch.float32, 0)
    assert trace.ranks[0].lanes == ["SM 17, block 0", "SM 4, block 1"]


def test_virtual_ranks_share_a_clock(tmp_path):
    ranks = VirtualRanks(3, max_tokens=4, max_wire_bytes=64, max_top_k=1, max_experts=3, device=0)
    with flashmoe.trace(ranks, max_events=5) as trace:
        assert Team.made[0].max_events == 5
    assert Team.made[0].asked == [5, 0]
    assert [(rank.rank, rank.clock) for rank in trace.ranks] == [(rank, "GPU uuid-0") for rank in range(3)]
    summary = trace.summary()
    assert (summary["workers"], summary["lost_events"], summary["clock_error"]) == (6, 6, 0.0)
    trace.save(tmp_path / "call.json"), trace.draw(tmp_path / "call.png")
    entries = json.loads((tmp_path / "call.json").read_text())["traceEvents"]
    lanes = {(one["pid"], one["tid"]): one["args"]["name"] for one in entries if one["name"] == "thread_name"}
    assert lanes == {(rank, block): name for rank in range(3) for block, name in enumerate(["SM 17, block 0", "SM 4, block 1"])}
    (tile,) = [one for one in entries if one["ph"] == "X" and one["pid"] == 2 and one["name"].startswith("up")]
    assert tile["args"]["loads begin"] == pytest.approx(tile["ts"] - 3e-3)
    assert (tmp_path / "call.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_trace_is_refused_and_takes_nothing_away():
    ranks = VirtualRanks(2, max_tokens=4, max_wire_bytes=64, max_top_k=1, max_experts=2, device=0)
    with flashmoe.trace() as trace, flashmoe.trace(ranks):
        call_on(0)
        with pytest.raises(RuntimeError, match="being traced already; leave that"), flashmoe.trace(max_events=5):
            pass
        with pytest.raises(RuntimeError, match="trace: VirtualRanks is being traced already"), flashmoe.trace(ranks):
            pass
        call_on(0)
        assert [team.asked for team in Team.made] == [[8192], [8192]]
    assert [team.asked for team in Team.made] == [[8192, 0], [8192, 0]] and len(trace.ranks) == 1


@pytest.mark.parametrize("bad", [0, -1, 2**31, True, 1.5, "8"])
def test_bad_sizes_are_refused_before_anything_is_held(bad):
    call_on(0)
    with pytest.raises(ValueError, match="max_events must be an integer of at least 1"), flashmoe.trace(max_events=bad):
        pass
    assert Team.made[0].asked == []
