"""The timeline of calls on a GPU: every piece of work once, after what it needs, and no bit of y changed by it.

Without a GPU all of it is skipped.
"""

import json

import pytest
import torch
from cuda_case import CudaCase, Ranks, has_cuda, tf32_allowed, worst_error
from timeline_checks import check_call, check_combines, check_rows_sent, everything, of_kind

import flashmoe
from flashmoe import cli
from flashmoe.records import read_records
from flashmoe.timeline import DOWN, UP, RankTrace

pytestmark = pytest.mark.skipif(not has_cuda(), reason="needs a GPU and a build with nvcc")


@pytest.fixture(autouse=True)
def nothing_is_left_over():
    yield
    torch.cuda.synchronize()
    flashmoe.check()


def rows_of_experts(case: CudaCase) -> list[int]:
    kept = case.ids[(case.ids >= 0) & (case.ids < case.experts)]
    return torch.bincount(kept, minlength=case.experts).tolist()


def check_alone(rank: RankTrace, case: CudaCase) -> None:
    """Of a call by one rank."""
    check_call(rank, rows_of_experts(case))
    check_combines(rank, case.tokens)
    assert rank.lost == 0 and len(rank.lanes) == len(rank.workers)
    assert len(rank.workers) <= torch.cuda.get_device_properties(0).multi_processor_count


# Tensor cores take other tiles for few rows than for many, and fp32 has none.
@pytest.mark.parametrize(("kind", "tokens"), [("fp32", 40), ("tf32", 700), ("fp16", 300), ("bf16", 1), ("bf16", 3),
                                              ("bf16", 700), ("bf16", 4096)])  # fmt: skip
def test_every_piece_of_work_is_there_once_and_the_bits_are_the_same(kind, tokens):
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    with tf32_allowed(kind == "tf32"):
        case = CudaCase(tokens=tokens, dtype=dtypes.get(kind, torch.float32), bias=True)
        y = case.call()
        with flashmoe.trace() as trace:
            assert torch.equal(case.call(), y)
        check_alone(trace.ranks[0], case)
        assert torch.equal(case.call(), y)
    summary = trace.summary()
    assert 0 < summary["tiles"] <= summary["utilization"] <= 1
    assert summary["utilization"] + summary["exposed"] + summary["tail"] == pytest.approx(1)
    assert summary["clock_error"] == 0 and summary["clock_step"] < 1e-4
    if torch.cuda.get_device_capability()[0] == 9 and (kind, tokens) == ("bf16", 4096):
        tiles = of_kind(everything(trace.ranks[0]), UP, DOWN)
        assert (tiles["loads"] < tiles["begin"]).any(), "loads run ahead of the products"


@pytest.mark.parametrize("tokens", [[64, 64], [0, 33], [128, 1, 0, 77], [200] * 8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_virtual_ranks(tokens, dtype):
    case, ep_size = CudaCase(tokens=sum(tokens), dtype=dtype), len(tokens)
    ranks = Ranks(case, tokens)
    y = torch.cat(ranks.call())
    with flashmoe.trace(ranks.team) as trace:
        assert torch.equal(torch.cat(ranks.call()), y)
    assert torch.equal(torch.cat(ranks.call()), y)
    assert [rank.rank for rank in trace.ranks] == list(range(ep_size))
    assert len({rank.clock for rank in trace.ranks}) == 1
    rows, experts = rows_of_experts(case), case.experts // ep_size
    for rank, count in zip(trace.ranks, tokens, strict=True):
        check_call(rank, rows[rank.rank * experts : (rank.rank + 1) * experts])
        check_combines(rank, count)
    owners = (case.ids // experts).split(tokens)
    check_rows_sent(trace.ranks, [[int((one == to).any(-1).sum()) for to in range(ep_size)] for one in owners])
    assert trace.summary()["lost_events"] == 0


def test_the_last_call_is_kept_and_waited_for():
    first, last = CudaCase(tokens=500), CudaCase(tokens=37, seed=1)
    with flashmoe.trace() as trace:
        first.call()
        last.call()
    check_alone(trace.ranks[0], last)


def test_events_take_memory_within_the_block_alone():
    case = CudaCase()
    y = case.call()
    torch.cuda.synchronize()

    def free() -> int:
        return torch.cuda.mem_get_info()[0]

    before = free()
    with flashmoe.trace(max_events=1 << 16) as trace:
        case.call()
        torch.cuda.synchronize()
        taken = before - free()
    assert taken >= len(trace.ranks[0].workers) * (1 << 16) * 48
    assert before - free() < taken / 100, "given back"
    assert torch.equal(case.call(), y)


def test_events_without_room_are_counted():
    case = CudaCase(tokens=700)
    y = case.call()
    with flashmoe.trace() as whole:
        case.call()
    with flashmoe.trace(max_events=2) as trace:
        assert torch.equal(case.call(), y)
    kept, all_events = (sum(map(len, one.ranks[0].workers)) for one in (trace, whole))
    assert kept < all_events and trace.summary()["lost_events"] > 0


# --- CUDA graphs ----------------------------------------------------------------------------------------------


def test_a_capture_is_refused_and_nothing_else_is_harmed():
    case = CudaCase(tokens=50)
    y = case.call()
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="a call that a CUDA graph captures cannot be traced"), flashmoe.trace():
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            case.call()
    with flashmoe.trace() as trace:
        assert torch.equal(case.call(), y)
    check_alone(trace.ranks[0], case)


def test_replays_are_not_noted():
    case, captured = CudaCase(tokens=50), CudaCase(tokens=300, seed=1)
    expected, y = captured.call(), case.call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = captured.call()
    with flashmoe.trace() as trace:
        graph.replay()
        assert torch.equal(case.call(), y)
        replayed.zero_()
        graph.replay()
        assert torch.equal(replayed, expected)
    check_alone(trace.ranks[0], case)
    replayed.zero_()
    graph.replay()  # the memory that was noted in is gone
    assert torch.equal(replayed, expected) and worst_error(replayed, captured) <= captured.tolerance


# --- as users meet it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [[], ["--ranks", "2", "--virtual"]], ids=["one rank", "virtual ranks"])
def test_run_writes_what_perfetto_reads(tmp_path, capsys, ranks):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jsonschema")
    file = tmp_path / "call.json"
    code = cli.main([
        "run", "--device", "cuda", *ranks, "--model", "mixtral-8x7b", "--scale", "8", "--tokens", "256", "--iters", "2",
        "--seconds", "0.5", "--baselines", "none", "--trace", str(file), "--json", str(tmp_path / "run.json"),
    ])  # fmt: skip
    output = capsys.readouterr().out
    assert code == 0 and "timeline " in output, output
    (record,) = read_records(tmp_path)
    assert record.data["timeline"]["lost_events"] == 0 and record.data["run"]["device"] == "cuda"
    entries = json.loads(file.read_text())["traceEvents"]
    lanes = {(one["pid"], one["tid"]) for one in entries if one["name"] == "thread_name"}
    assert len(lanes) == record.data["timeline"]["workers"]
    assert {(one["pid"], one["tid"]) for one in entries if one["ph"] == "X"} <= lanes
    assert any(one["ph"] == "s" for one in entries) == bool(ranks)
    assert (tmp_path / "call.png").read_bytes().startswith(b"\x89PNG")
