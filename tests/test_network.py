"""Ranks that only the network connects: on this host, where it is asked for, and across two network namespaces."""

import signal
import socket
import time
from pathlib import Path

import distributed_cases as cases
import pytest
from gradient_case import assert_same_gradients, check_gradients, gradients
from layer_case import LayerCase
from namespaces import two_hosts
from rank_world import rank_world
from thread_ranks import make_team, on_ranks

import flashmoe
from flashmoe import _C, hosts
from flashmoe.settings import Settings

pytestmark = pytest.mark.skipif(
    not _C.build_info()["features"]["ucx"], reason="this build has no UCX; `flashmoe info` tells what it lacks"
)

LIMITS = dict(max_tokens=64, max_wire_bytes=1024, max_top_k=4, max_experts=32, max_groups=4, num_workers=1)
PATIENT = dict(timeout_s=20.0, entry_timeout_s=20.0)
TIMEOUT_S, ENTRY_TIMEOUT_S, SLACK_S = 2.0, 3.0, 4.0
SHORT = dict(timeout_s=TIMEOUT_S, entry_timeout_s=ENTRY_TIMEOUT_S)
RANKS = (0, 1, 2)
TOKENS = [48, 64, 32]
LARGE = dict(hidden_size=256, intermediate_size=512)  # so that a rank is nearly always within a call
CALLS = [[4, 5, 6], [0, 7, 0], [64, 1, 0], [0, 0, 0], [2, 2, 2], [30, 64, 7]] * 2


@pytest.fixture(scope="module")
def world():
    with rank_world(3, transport="ucx", **LIMITS, **PATIENT) as world:
        world.call(cases.make_groups, (0, 1), (1, 2))
        yield world


def check_failures(reports: dict[int, dict], since: float, within_s: float, lost: int) -> None:
    """Every rank heard in time of a rank that it cannot have reached, and forgets it not."""
    for rank, report in reports.items():
        assert report["at"] - since < within_s, report
        others = [lost] if rank != lost else [r for r in RANKS if r != lost]
        assert any(f"rank {other}" in report["error"].split(": ", 1)[1] for other in others), report
        assert report["later_call"] == report["error"] and report["check"] == report["error"]


# --- one host -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ranks, tokens, problem",
    [
        ((0, 1), [7, 5], {}),
        ((0, 1, 2), [64, 33, 0], dict(top_k=4)),
        ((0, 1, 2), [12, 20, 5], dict(one_rank=1, dropped=True)),
        ((0, 1, 2), [0, 0, 0], {}),
    ],
    ids=["two", "three", "hot rank, dropped", "no tokens"],
)
def test_right_and_bitwise_equal_to_one_process(world, ranks, tokens, problem):
    world.call(cases.run_and_check, 3, ranks, tokens, ranks=ranks, **problem)


def test_gradients_are_those_of_ranks_that_are_threads(world):
    how = {"bias": True, "num_experts": 9, "skew": "zipf"}
    case = LayerCase(tokens=(40, 0, 64), **how)
    found = world.call(cases.gradients_of, case.tokens, **how)
    check_gradients(case, found)
    threads = on_ranks(make_team(3), lambda rank, group: gradients(case, rank, group))
    for one, other in zip(found, threads, strict=True):
        assert_same_gradients(one, other)


def test_token_counts_change_every_call_with_nothing_between(world):
    world.call(cases.many_calls, 17, RANKS, CALLS)


def test_groups_that_overlap(world):
    world.call(cases.overlapping_groups, (0, 1), (1, 2), 6)


def test_bytes_are_counted_as_over_shared_memory(world):
    assert len(world.call(cases.segments_mapped)[0]) == 1
    over_network = world.call(cases.bytes_of_call, 9, RANKS, [10, 0, 33])
    with rank_world(3, transport="shm", **LIMITS, **PATIENT) as mapped:
        assert len(mapped.call(cases.segments_mapped)[0]) == 3
        assert mapped.call(cases.bytes_of_call, 9, RANKS, [10, 0, 33]) == over_network
    assert sum(over_network[0]["rows"]) > 0


def test_a_forked_child_starts_afresh(world):
    world.call(cases.run_and_check, 1, RANKS, [1, 2, 3])
    assert world.call(cases.forked_child_starts_afresh) == [7] * 3
    world.call(cases.run_and_check, 1, RANKS, [1, 2, 3])


def test_strangers_disturb_nobody(world):
    """They connect, say something or nothing, and go."""
    inodes = world.call(cases.listening_sockets)
    ports = [line.split()[1:4:2] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    found = [
        (socket.inet_ntoa(bytes.fromhex(address.split(":")[0])[::-1]), int(address.split(":")[1], 16))
        for (address, state), line in zip(ports, Path("/proc/net/tcp").read_text().splitlines()[1:], strict=True)
        if state == "0A" and line.split()[9] in {inode for rank in inodes for inode in rank}
    ]
    assert found, "no rank listens: this test would see nothing"
    for address in found:
        for message in (b"", b"x", b"GET / HTTP/1.0\r\n\r\n", bytes(range(256)) * 40):
            with socket.socket() as connection:
                connection.settimeout(1)
                connection.connect(address)
                connection.sendall(message)
    world.call(cases.run_and_check, 1, RANKS, [1, 2, 3])


@pytest.mark.parametrize("delay_s", [0.05, 0.3])
def test_peer_killed_in_the_midst_of_calls(delay_s):
    with rank_world(3, transport="ucx", **LIMITS, **SHORT) as world:
        world.call(cases.calls, RANKS, TOKENS, 1, **LARGE)
        world.start(RANKS, cases.calls_until_failure, RANKS, TOKENS, **LARGE)
        time.sleep(delay_s)
        world.kill(1)
        since = time.monotonic()
        reports = {rank: outcome.value for rank, outcome in zip((0, 2), world.collect((0, 2)), strict=True)}
        check_failures(reports, since, SLACK_S, 1)
        expected = "the network to rank 1 broke, or its process ended, while"
        assert any(expected in report["error"] for report in reports.values()), reports
        for outcome in world.outcomes(flashmoe.distributed.init, ranks=(0, 2)):
            assert outcome.kind == "PeerError" and "rank 1 has ended" in outcome.error and outcome.seconds < SLACK_S


def test_peer_that_has_done_its_part_may_end():
    with rank_world(3, transport="ucx", **LIMITS, **SHORT) as world:
        for _ in range(3):
            world.call(cases.calls, RANKS, TOKENS, 2)
        world.start((1,), cases.calls_and_end, RANKS, TOKENS, 3)
        world.start((0, 2), cases.calls, RANKS, TOKENS, 3)
        for outcome in world.collect((0, 2)):
            assert outcome.error is None, outcome.story


def test_peer_that_stops_answering_and_a_new_generation():
    with rank_world(3, transport="ucx", **LIMITS, **SHORT) as world:
        world.call(cases.calls, RANKS, TOKENS, 1, **LARGE)
        world.start(RANKS, cases.calls_until_failure, RANKS, TOKENS, **LARGE)
        time.sleep(0.1)
        world.signal(1, signal.SIGSTOP)
        since = time.monotonic()
        reports = {rank: outcome.value for rank, outcome in zip((0, 2), world.collect((0, 2)), strict=True)}
        check_failures(reports, since, ENTRY_TIMEOUT_S + SLACK_S, 1)
        world.signal(1, signal.SIGCONT)
        assert "aborted because of" in world.collect((1,))[0].value["error"]
        world.call(flashmoe.distributed.init)
        world.call(cases.run_and_check, 1, RANKS, [3, 4, 5])


# --- two hosts ------------------------------------------------------------------------------------------------


def test_two_hosts_and_a_cut_cable():
    """Two ranks here, one there: the layer; then no cable, in the midst of a call, and nobody hangs; then it is back."""
    with two_hosts([0, 0, 1]) as cable, rank_world(3, hosts=cable, **LIMITS, **SHORT) as world:
        assert [len(inodes) for inodes in world.call(cases.segments_mapped)] == [2, 2, 1]
        world.call(cases.run_and_check, 3, RANKS, [64, 33, 5])
        world.call(cases.many_calls, 17, RANKS, CALLS)
        world.start(RANKS, cases.calls_until_failure, RANKS, TOKENS, **LARGE)
        time.sleep(0.3)
        cable.cut()
        since = time.monotonic()
        reports = dict(enumerate(outcome.value for outcome in world.collect(RANKS)))
        check_failures(reports, since, ENTRY_TIMEOUT_S + SLACK_S, 2)
        for outcome in world.outcomes(flashmoe.distributed.finalize):
            assert outcome.error is None and outcome.seconds < SLACK_S, outcome
        cable.mend()
        world.call(flashmoe.distributed.init, **LIMITS, timeout_s=TIMEOUT_S, entry_timeout_s=30.0)
        world.call(cases.run_and_check, 4, RANKS, [3, 64, 5])

        world.start(RANKS, cases.calls_until_failure, RANKS, TOKENS, **LARGE)
        time.sleep(0.3)
        world.kill(2)
        since = time.monotonic()
        reports = dict(enumerate(outcome.value for outcome in world.collect((0, 1))))
        check_failures(reports, since, SLACK_S, 2)


def test_two_hosts_want_ucx():
    with two_hosts([0, 1]) as cable, rank_world(2, hosts=cable) as world:
        for outcome in world.outcomes(flashmoe.distributed.init, transport="shm", **LIMITS):
            assert outcome.kind == "RuntimeError"
            assert "all ranks must run on one host with transport='shm': rank " in outcome.error
            assert "on another network namespace of " in outcome.error
        for outcome in world.outcomes(cases.init_without_ucx, **LIMITS):
            assert outcome.kind == "RuntimeError" and "all ranks must run on one host without UCX: " in outcome.error
            assert "UCX cannot be loaded: " in outcome.error and "pip install libucx-cu12" in outcome.error


# --- what is asked for ----------------------------------------------------------------------------------------


def test_transport_is_an_argument_and_a_variable(monkeypatch):
    with pytest.raises(ValueError, match="transport must be None, 'shm' or 'ucx', got 'tcp'"):
        Settings().changed({"transport": "tcp"})
    with pytest.raises(ValueError, match="remote_only rehearses a network"):
        Settings().changed({"transport": "ucx", "remote_only": 1})
    monkeypatch.setenv("FLASHMOE_TRANSPORT", "rdma")
    with pytest.raises(ValueError, match="FLASHMOE_TRANSPORT must be shm or ucx, got 'rdma'"):
        flashmoe.settings.settings_of_environment()
    monkeypatch.setenv("FLASHMOE_TRANSPORT", "ucx")
    assert flashmoe.settings.settings_of_environment().transport == "ucx"


def test_a_library_that_is_none_is_no_crash(monkeypatch, tmp_path):
    none = tmp_path / "libucp.so.0"
    none.write_bytes(b"no library")
    monkeypatch.setattr(hosts, "ucx_library", lambda: str(none))
    with pytest.raises(RuntimeError, match="UCX cannot be loaded: .*pip install libucx-cu12"):
        hosts.ucx_version()
    monkeypatch.setattr(hosts, "ucx_library", lambda: "libc.so.6")
    with pytest.raises(RuntimeError, match="UCX: the library found has no function ucp_"):
        hosts.ucx_version()
