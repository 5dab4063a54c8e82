"""The timeline of a call: every piece of work once, in an order that the protocol allows, and where engineers look."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from timeline_checks import check_call, everything, of_kind

import flashmoe
from flashmoe import _C, cli, report
from flashmoe.records import read_records
from flashmoe.timeline import ARRIVED, COMBINE, DOWN, EVENT, GRADIENT, PLAN, SEND, UP, RankTrace, Trace


def layer_and_input(tokens: int = 200) -> tuple[flashmoe.MoE, torch.Tensor]:
    torch.manual_seed(3)
    return flashmoe.MoE(128, 192, 6, 2), torch.randn(tokens, 128)


def test_every_tile_of_a_call_is_there_once_and_in_order():
    layer, x = layer_and_input()
    routing = layer.router(x)
    with torch.no_grad(), flashmoe.trace() as trace:
        y = layer(x, routing)
        assert torch.equal(y, layer(x, routing))  # the last call is kept
    assert [rank.rank for rank in trace.ranks] == [0]
    check_call(trace.ranks[0], routing.tokens_per_expert().tolist())
    combined = of_kind(np.concatenate(trace.ranks[0].workers), COMBINE)
    assert sorted(combined["index"]) == list(range(-(-200 // 16)))
    summary = trace.summary()
    assert 0 < summary["tiles"] <= summary["utilization"] <= 1 and summary["lost_events"] == 0
    assert summary["utilization"] + summary["exposed"] + summary["tail"] == pytest.approx(1)


def test_backward_call_shows_its_weight_gradients(tmp_path):
    layer, x = layer_and_input()
    routing = layer.router(x)
    with flashmoe.trace() as trace:
        layer(x, routing).sum().backward()
    check_call(trace.ranks[0], routing.tokens_per_expert().tolist())
    events = everything(trace.ranks[0])
    gradients, ups = of_kind(events, GRADIENT), of_kind(events, UP)
    for expert in range(6):  # gate_up_proj [384, 128] and down_proj [128, 192] in tiles of 128 x 256
        mine = gradients[gradients["expert"] == expert]
        assert sorted(mine["part"]) == list(range(4))
        assert mine["begin"].min() >= ups[ups["expert"] == expert]["end"].max()
    assert trace.summary()["tiles"] > 0
    trace.save(tmp_path / "back.json")
    trace.draw(tmp_path / "back.png")
    names = {entry["name"] for entry in json.loads((tmp_path / "back.json").read_text())["traceEvents"]}
    assert {f"weight gradients of expert {expert}" for expert in range(6)} < names


def test_ranks_of_a_group_are_traced_alike():
    team = _C.local_team(_C.Limits(2, 64, 4 * 128, 2, 6), num_workers=1)
    torch.manual_seed(5)
    layers = [flashmoe.MoE(128, 192, 6, 2, group=group) for group in team]
    for layer in layers[1:]:
        layer.router.load_state_dict(layers[0].router.state_dict())
    inputs = [torch.randn(60, 128), torch.randn(33, 128)]
    routings = [layers[0].router(x) for x in inputs]

    def call(rank: int) -> Trace:
        with torch.no_grad(), flashmoe.trace(team[rank]) as trace:
            layers[rank](inputs[rank], routings[rank])
        return trace

    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(call, range(2)))
    trace = parts[1].gathered(parts)
    assert [rank.rank for rank in trace.ranks] == [0, 1]
    rows = sum(routing.tokens_per_expert() for routing in routings).tolist()
    for rank in range(2):
        check_call(trace.ranks[rank], rows[3 * rank : 3 * rank + 3])
        arrived = of_kind(np.concatenate(trace.ranks[rank].workers), ARRIVED)
        assert set(arrived["index"]) == {1 - rank}


def test_nothing_is_kept_outside_of_the_block():
    layer, x = layer_and_input()
    with torch.no_grad():
        with flashmoe.trace() as trace:
            layer(x)
        before = [events.copy() for events in trace.ranks[0].workers]
        layer(x)
        with flashmoe.trace() as empty:
            pass
    assert all(np.array_equal(*pair) for pair in zip(before, trace.ranks[0].workers, strict=True))
    with pytest.raises(ValueError, match="the trace holds no work"):
        empty.summary()


def test_events_without_room_are_counted():
    layer, x = layer_and_input()
    with torch.no_grad(), flashmoe.trace() as whole:
        layer(x)
    with torch.no_grad(), flashmoe.trace(max_events=3) as trace:
        layer(x)
    kept = sum(len(events) for events in trace.ranks[0].workers)
    assert kept <= 3 * len(trace.ranks[0].workers) and trace.summary()["lost_events"] > 0
    assert kept < sum(len(events) for events in whole.ranks[0].workers)
    with pytest.raises(ValueError, match="max_events must be an integer of at least 1, got 0"), flashmoe.trace(max_events=0):
        pass


def test_a_group_keeps_one_timeline_at_a_time():
    layer, x = layer_and_input()
    team = _C.local_team(_C.Limits(2, 64, 4 * 128, 2, 6), num_workers=1)
    with torch.no_grad(), flashmoe.trace() as trace, flashmoe.trace(team[0]), flashmoe.trace(team[1]):
        with pytest.raises(RuntimeError, match=r"own group \(group=None\) is being traced already"), flashmoe.trace():
            pass
        with pytest.raises(RuntimeError, match="trace: group 'team#.* is being traced"), flashmoe.trace(team[1]):
            pass
        layer(x)
    assert trace.summary()["tiles"] > 0, "the one that was refused has taken nothing away"
    with pytest.raises(ArithmeticError), flashmoe.trace():
        raise ArithmeticError
    with flashmoe.trace(), flashmoe.trace(team[1]):
        pass


def test_numbers_of_a_made_up_call():
    def events(*rows: tuple[int, int, int]) -> np.ndarray:
        made = np.zeros(len(rows), EVENT)
        for event, (kind, begin, end) in zip(made, rows, strict=True):
            event["kind"], event["begin"], event["end"] = kind, begin, end
        return made

    trace = Trace([
        RankTrace(1, [events((SEND, 100, 110), (ARRIVED, 120, 120), (UP, 130, 160), (DOWN, 160, 200))], 2),
        RankTrace(0, [events((PLAN, 100, 140))], 0),
    ])  # fmt: skip
    assert trace.summary() == {
        "seconds": 1e-7, "workers": 2, "utilization": 0.6, "tiles": 0.35, "exposed": 0.1, "tail": 0.3, "overlap": None,
        "rows_sent_seconds": 1e-8, "lost_events": 2, "clock_step": 1e-8, "clock_error": 0.0,
    }  # fmt: skip


def test_overlap_is_what_a_rank_does_while_its_rows_are_under_way():
    def events(*rows: tuple[int, int, int, int, int]) -> np.ndarray:
        made = np.zeros(len(rows), EVENT)
        for event, (kind, begin, end, index, part) in zip(made, rows, strict=True):
            event["kind"], event["begin"], event["end"], event["index"], event["part"] = kind, begin, end, index, part
        return made

    # Rank 0 sends rank 1 two chunks, under way from 100 to 150 and from 140 to 200, and gets one, from 300 to 310.
    sender = events((SEND, 100, 120, 1, 0), (SEND, 140, 160, 1, 1), (UP, 160, 305, 0, 0), (ARRIVED, 310, 310, 1, 1))
    arrivals = (ARRIVED, 150, 150, 0, 1), (ARRIVED, 200, 200, 0, 2)
    receiver = [events((UP, 110, 130, 0, 0), *arrivals, (SEND, 300, 302, 0, 0)), events((UP, 190, 260, 0, 0))]
    trace = Trace([RankTrace(0, [sender], 0), RankTrace(1, receiver, 0)])
    # To rank 1: 90 ns since its call began, of two workers, who work 20 and 10. To rank 0: 10 ns of one, who works 5.
    assert trace.summary()["overlap"] == pytest.approx((20 + 10 + 5) / (180 + 10))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (0.0, "at the end; a call"),
        (2e-6, "; ranks' times right to 2 µs; a call"),
        (None, "; ranks' clocks could not be compared; a call"),
    ],
)
def test_the_line_of_numbers_tells_of_clocks_that_differ(error, told):
    numbers = {
        "seconds": 1e-3, "workers": 2, "utilization": 0.5, "tiles": 0.4, "exposed": 0.3, "tail": 0.2, "overlap": None,
        "lost_events": 0, "clock_error": error, "cost": 1.0, "cost_quartiles": [1.0, 1.0],
    }  # fmt: skip
    assert told in report.timeline(numbers)


def test_run_of_two_ranks_writes_what_perfetto_reads(tmp_path, capsys):
    file = tmp_path / "call.json"
    code = cli.main([
        "run", "--model", "mixtral-8x7b", "--scale", "64", "--ranks", "2", "--tokens", "100", "--iters", "2",
        "--seconds", "1", "--baselines", "none", "--trace", str(file), "--json", str(tmp_path / "run.json"),
    ])  # fmt: skip
    output = capsys.readouterr().out
    assert code == 0 and "of 2 workers" in output and "a call that is traced takes" in output, output
    (record,) = read_records(tmp_path)
    timeline = record.data["timeline"]
    assert (timeline["workers"], timeline["lost_events"]) == (2, 0) and 0 <= timeline["overlap"] <= 1
    low, high = timeline["cost_quartiles"]
    assert 0.2 < low <= timeline["cost"] <= high < 5, "noise, but ratios"
    entries = json.loads(file.read_text())["traceEvents"]
    lanes = {(one["pid"], one["tid"]) for one in entries if one["ph"] == "M" and one["name"] == "thread_name"}
    slices = [one for one in entries if one["ph"] == "X"]
    assert lanes == {(0, 0), (1, 0)} == {(one["pid"], one["tid"]) for one in slices}
    assert all(one["dur"] >= 0 and one["ts"] >= 0 for one in slices)
    for lane in lanes:  # a worker does one thing at a time
        mine = sorted((one["ts"], one["dur"]) for one in slices if (one["pid"], one["tid"]) == lane)
        assert all(ts + dur <= after + 1e-3 for (ts, dur), (after, _) in zip(mine, mine[1:], strict=False))
    arrows = {phase: [one for one in entries if one["ph"] == phase] for phase in "sf"}
    assert len(arrows["s"]) == len(arrows["f"]) >= 2
    for start, finish in zip(arrows["s"], arrows["f"], strict=True):
        assert start["id"] == finish["id"] and start["pid"] != finish["pid"] and start["ts"] <= finish["ts"]
    assert (tmp_path / "call.png").read_bytes().startswith(b"\x89PNG")
