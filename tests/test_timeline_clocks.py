"""Lanes of ranks whose clocks differ: moved by what is known of rows that were sent and seen, and no further."""

import math

import numpy as np
import pytest

from flashmoe.timeline import ARRIVED, EVENT, SEND, RankTrace, Trace

Row = tuple[int, int, int, int, int]  # kind, begin, end, the other rank, chunk or chunks


def events(*rows: Row) -> np.ndarray:
    made = np.zeros(len(rows), EVENT)
    for event, (kind, begin, end, index, part) in zip(made, rows, strict=True):
        event["kind"], event["begin"], event["end"], event["loads"] = kind, begin, end, begin
        event["index"], event["part"] = index, part
    return made


def exchange(ahead: dict[int, int], pairs: list[tuple[int, int]], under_way: dict[tuple[int, int], int]) -> list[Trace]:
    """Each pair's rows leave at 1000, chunk by chunk, and take so long; each rank's clock is so far ahead."""
    rows: dict[int, list[Row]] = {rank: [] for rank in ahead}
    for source, to in pairs:
        for chunk in range(3):
            sent = 1000 + 100 * chunk
            seen = sent + under_way[source, to] + 40 * chunk  # the first is the fastest
            rows[source].append((SEND, sent - 50 + ahead[source], sent + ahead[source], to, chunk))
            rows[to].append((ARRIVED, seen + ahead[to], seen + ahead[to], source, chunk + 1))
            rows[to].append((ARRIVED, seen + ahead[to] + 5, seen + ahead[to] + 5, source, chunk + 1))  # noted again
    return [Trace([RankTrace(rank, [events(*rows[rank])], 0, clock=f"GPU {rank}")]) for rank in ahead]


def begins(trace: Trace) -> list[int]:
    return [int(rank.workers[0]["begin"].min()) for rank in trace.ranks]


@pytest.mark.parametrize("by", [5_000_000, -700])
def test_equal_ways_give_the_difference_exactly(by):
    ahead = {0: 10**6, 1: 10**6 + by}
    parts = exchange(ahead, [(0, 1), (1, 0)], {(0, 1): 20, (1, 0): 20})
    trace = parts[0].gathered(parts)
    assert begins(trace) == [10**6 + 950] * 2
    assert trace.clock_error == pytest.approx(20e-9) and trace.summary()["clock_error"] == trace.clock_error
    assert begins(parts[1]) == [10**6 + by + 950], "the parts are as they were"


def test_unequal_ways_are_wrong_by_no_more_than_is_said():
    parts = exchange({0: 0, 1: 9_000}, [(0, 1), (1, 0)], {(0, 1): 10, (1, 0): 70})
    trace = parts[0].gathered(parts)
    assert begins(trace) == [950, 950 + 30] and trace.clock_error == pytest.approx(40e-9)
    assert all(one["ph"] != "f" or one["ts"] >= 0 for one in trace._arrows(0))


def test_a_clock_is_reached_over_others_and_by_the_surest_way():
    ways = {(0, 1): 20, (1, 0): 20, (1, 2): 30, (2, 1): 30, (0, 2): 500, (2, 0): 100}
    parts = exchange({0: 0, 1: 10**6, 2: 5 * 10**6}, list(ways), ways)
    trace = parts[0].gathered(parts[::-1])
    assert begins(trace) == [950] * 3 and trace.clock_error == pytest.approx(30e-9)


def test_one_way_alone_bounds_nothing():
    parts = exchange({0: 0, 1: 77}, [(0, 1)], {(0, 1): 20})
    trace = parts[0].gathered(parts)
    assert trace.clock_error == math.inf and begins(trace)[0] == 950 and trace.summary()["clock_error"] is None
    assert trace.ranks[1].workers[0]["begin"].min() == 1000 + 20 + 77, "where it was"


def test_one_clock_is_left_alone():
    parts = exchange({0: 0, 1: 0}, [(0, 1), (1, 0)], {(0, 1): 10, (1, 0): 70})
    for part in parts:
        part.ranks[0].clock = "host"
    trace = parts[0].gathered(parts)
    assert begins(trace) == [950, 950] and trace.clock_error == 0
