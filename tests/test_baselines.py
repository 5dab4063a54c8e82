"""Baselines compute what the layer does; one that does not is refused, and costs nobody else their turn."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from baseline_case import drawn_problem, worst_error
from torch.utils.flop_counter import FlopCounterMode

from flashmoe import baselines, contenders, gpu_timing, measure
from flashmoe.accuracy import Check

CASES = {
    "gated": ((9, 2, 4, 48, 40), {}),
    "ungated": ((7, 1, 3, 32, 16), {"gated": False, "activation": "relu"}),
    "empty experts": ((7, 2, 6, 32, 32), {"used": 2, "activation": "gelu_tanh"}),
    "dropped entries": ((30, 2, 5, 32, 16), {"dropped": 0.3}),
    "one token": ((1, 3, 5, 16, 24), {"activation": "gelu"}),
}


@pytest.mark.parametrize("name", CASES)
def test_chain_gives_the_references_result(name):
    sizes, how = CASES[name]
    problem = drawn_problem(*sizes, **how)
    assert worst_error(problem, [call() for call in baselines.baseline("chain").make(problem)]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gated", "ungated", "dropped entries"])
def test_ceiling_has_as_many_flops_as_the_layer(name, dtype):
    sizes, how = CASES[name]
    problem = drawn_problem(*sizes, **how, dtype=dtype)
    (call,) = baselines.baseline("ceiling").make(problem)
    with FlopCounterMode(display=False) as counted:
        call()
    rows = [problem.kept(routing) for _, routing in problem.inputs]
    assert counted.get_total_flops() == problem.shape.flops(sum(rows) // 2) > 0


def test_each_name_fits_some_ranks_and_devices():
    assert set(baselines.of_ranks(1)) | set(baselines.of_ranks(2)) == set(baselines.NAMES)
    assert baselines.of_ranks(1, baselines.on("cpu"))[-2:] == ["chain", "ceiling"]
    several = ["pipeline-grouped_mm", "pipeline-loop", "one-process", "ceiling"]
    assert baselines.of_ranks(2, baselines.on("cuda")) == several
    rivals = [name for name in baselines.NAMES if baselines.is_rival(name)]
    assert "triton" in rivals and not {"ceiling", "virtual-8", "one-process"} & set(rivals)


@pytest.mark.parametrize("name", ["liger-cute", "deepgemm", "sonicmoe", "flashinfer", "tutel", "virtual-4"])
def test_what_needs_a_gpu_says_so(name):
    with pytest.raises(baselines.Skipped, match="needs a GPU"):
        baselines.baseline(name).make(drawn_problem(3, 1, 2, 64, 64))


def entered(problem, make, graph=False):
    whole = SimpleNamespace(gate_up_proj=problem.gate_up_proj, down_proj=problem.down_proj)
    check = Check(problem.shape, whole, *problem.inputs[0], problem.num_tokens)
    return contenders.enter("chain", make, problem, contenders.Judge(measure.Ranks(), [1], check), 1, graph)


def test_wrong_result_is_refused():
    problem = drawn_problem(9, 2, 4, 32, 16)
    right = baselines.baseline("chain").make
    contender, said = entered(problem, right)
    assert contender.name == "chain" and said["relative_error"] < 1e-6

    def nearly(problem):
        return [lambda call=call: call() * 1.001 for call in right(problem)]

    contender, said = entered(problem, nearly)
    assert contender is None and said["skipped"].startswith("its result is wrong: relative error 1.0e-03, where ")
    contender, said = entered(problem, lambda problem: [lambda: torch.full((9, 32), torch.nan)] * 2)
    assert contender is None and "wrong: relative error nan" in said["skipped"]


def test_one_that_raises_is_skipped_by_name():
    def broken(problem):
        raise NotImplementedError("no such tile")

    contender, said = entered(drawn_problem(3, 1, 2, 16, 16), broken)
    assert contender is None and said == {"name": "chain", "skipped": "it raised NotImplementedError: no such tile"}


def test_one_that_another_rank_could_not_make_is_skipped_here_too(monkeypatch):
    monkeypatch.setattr(measure.Ranks, "everybodys", lambda self, mine: [mine, "it raised OutOfMemoryError: 9 GiB"])
    contender, said = entered(drawn_problem(3, 1, 2, 16, 16), baselines.baseline("chain").make)
    assert contender is None and said == {"name": "chain", "skipped": "it raised OutOfMemoryError: 9 GiB"}


def test_one_that_cannot_be_captured_is_skipped(monkeypatch):
    def uncapturable(calls):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(contenders, "captured", uncapturable)
    make = baselines.baseline("chain").make
    contender, said = entered(drawn_problem(3, 1, 2, 16, 16), make, graph=True)
    assert contender is None and "not permitted when stream is capturing" in said["skipped"]


class FakeGraph:
    """Of CUDA: the graph's calls are made when it is captured; a replay is counted."""

    replays = 0

    def replay(self):
        FakeGraph.replays += 1


class FakeEvent:
    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = FakeEvent.now

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.at - self.at


def test_inputs_take_turns_in_a_graph_and_a_sample_is_one_call(monkeypatch):
    for name, fake in {"CUDAGraph": FakeGraph, "Event": FakeEvent, "synchronize": lambda: None,
                       "graph": lambda graph: contextlib.nullcontext()}.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    made = []
    calls = [lambda number=number: made.append(number) or torch.tensor(number) for number in range(3)]
    replay, results, count = gpu_timing.captured(calls)
    assert made == [0, 1, 2] * 4 and count == 12 and [int(one) for one in results] == [0, 1, 2]
    assert FakeGraph.replays == 1

    def slow_replay():
        replay()
        FakeEvent.now += 24.0  # milliseconds

    contender = measure.Contender("graph", slow_replay, 1, calls=count)
    assert contender.time_once(gpu_timing.gpu_seconds) == pytest.approx(2e-3)
