"""What happens to the others when a rank ends, stops, or does something else: they hear of it, in time."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import distributed_cases as cases
import pytest
from rank_world import RankWorld, fresh_environment, rank_world

import flashmoe

TIMEOUT_S = 2.0
ENTRY_TIMEOUT_S = 3.0
# Ranks share few cores with whatever else runs, so hearing of an end may take a little longer than it should.
SLACK_S = 3.0
LIMITS = dict(max_tokens=64, max_wire_bytes=1024, max_top_k=4, max_experts=32, max_groups=1, num_workers=1)
RANKS, VICTIM, SURVIVORS = (0, 1, 2), 1, (0, 2)
TOKENS = [48, 64, 32]
LARGE = dict(hidden_size=256, intermediate_size=512)  # so that a rank is nearly always within a call


def failing_world(nproc: int = 3, **arguments: object):
    limits = {**LIMITS, "timeout_s": TIMEOUT_S, "entry_timeout_s": ENTRY_TIMEOUT_S}
    return rank_world(nproc, **{**limits, **arguments})


def check_reports(world: RankWorld, reports: list[dict], since: float, within_s: float, about: str) -> None:
    """Every survivor heard in time, at least one of the cause itself, and none forgets it."""
    for report in reports:
        assert report["at"] - since < within_s, report
        assert "group '0'" in report["error"], report
        assert f"rank {VICTIM}" in report["error"], "must name who was waited for, even if another rank found out"
        assert report["later_call"] == report["error"] and report["check"] == report["error"]
    assert any(about in report["error"] for report in reports), reports


@pytest.mark.parametrize("remote_only", [None, 7], ids=["mapped", "remote-only"])
@pytest.mark.parametrize("delay_s, backward", [*((s, False) for s in (0.0, 0.03, 0.1, 0.25, 0.45)), (0.0, True), (0.2, True)])
def test_peer_killed_in_the_midst_of_calls(delay_s, backward, remote_only):
    with failing_world(remote_only=remote_only) as world:
        world.call(cases.calls, RANKS, TOKENS, 1, **LARGE)
        world.start(RANKS, cases.calls_until_failure, RANKS, TOKENS, backward=backward, **LARGE)
        time.sleep(0.2 + delay_s)
        world.kill(VICTIM)
        since = time.monotonic()
        reports = [outcome.value for outcome in world.collect(SURVIVORS)]
        check_reports(world, reports, since, TIMEOUT_S + SLACK_S, f"the process of rank {VICTIM} ended while")
        assert any("waiting for" in report["error"] for report in reports), "must say what was waited for"


def test_peer_killed_between_calls():
    with failing_world() as world:
        world.call(cases.calls, RANKS, TOKENS, 3)
        world.kill(VICTIM)
        since = time.monotonic()
        reports = world.call(cases.calls_until_failure, RANKS, TOKENS, ranks=SURVIVORS)
        check_reports(world, reports, since, TIMEOUT_S + SLACK_S, f"the process of rank {VICTIM} ended while")
        assert all(report["calls"] == 0 for report in reports)


def test_peer_killed_before_its_first_call():
    with failing_world() as world:
        world.call(cases.join, RANKS)
        world.kill(VICTIM)
        since = time.monotonic()
        reports = world.call(cases.calls_until_failure, RANKS, TOKENS, ranks=SURVIVORS)
        check_reports(world, reports, since, TIMEOUT_S + SLACK_S, f"the packet header of rank {VICTIM}")


def test_peer_killed_before_the_group_is_made():
    with failing_world() as world:
        world.kill(VICTIM)
        since = time.monotonic()
        outcomes = world.outcomes(cases.calls, RANKS, TOKENS, 1, ranks=SURVIVORS)
        assert time.monotonic() - since < TIMEOUT_S + SLACK_S
        for outcome in outcomes + world.outcomes(cases.calls, RANKS, TOKENS, 1, ranks=SURVIVORS):
            assert outcome.kind == "PeerError"
            assert f"rank {VICTIM} has ended while rank" in outcome.error
            assert "waited for it to join group '0' [0, 1, 2]" in outcome.error


def test_peer_killed_while_others_initialise():
    with rank_world(3) as world:
        world.kill(VICTIM)
        outcomes = world.outcomes(flashmoe.distributed.init, ranks=SURVIVORS, entry_timeout_s=1.0)
        for outcome in outcomes:
            assert outcome.kind == "PeerError" and f"for rank {VICTIM} to call" in outcome.error
            assert outcome.seconds < 1.0 + SLACK_S


def test_peer_killed_before_a_new_generation():
    """Once ranks know each other, init() need not wait for the deadline."""
    with failing_world(entry_timeout_s=30.0) as world:
        world.kill(VICTIM)
        for outcome in world.outcomes(flashmoe.distributed.reserve, ranks=SURVIVORS, max_tokens=65):
            assert outcome.kind == "PeerError" and f"rank {VICTIM} has ended" in outcome.error
            assert outcome.seconds < SLACK_S


@pytest.mark.parametrize("delay_s", [0.05, 0.3])
def test_peer_that_stops_answering_in_the_midst_of_calls(delay_s):
    with failing_world() as world:
        world.call(cases.calls, RANKS, TOKENS, 1, **LARGE)
        world.start(RANKS, cases.calls_until_failure, RANKS, TOKENS, **LARGE)
        time.sleep(delay_s)
        world.signal(VICTIM, signal.SIGSTOP)
        since = time.monotonic()
        reports = [outcome.value for outcome in world.collect(SURVIVORS)]
        # It may have stopped before or after it entered the call that the others are in.
        check_reports(world, reports, since, ENTRY_TIMEOUT_S + SLACK_S, "no progress for")
        world.signal(VICTIM, signal.SIGCONT)  # it finds the abort when it goes on
        report = world.collect((VICTIM,))[0].value
        assert "aborted because of" in report["error"] and report["later_call"] == report["error"]
        world.call(flashmoe.distributed.init)  # all live: a new generation works
        world.call(cases.run_and_check, 1, RANKS, [3, 4, 5])


def test_peer_that_does_not_come():
    with failing_world() as world:
        world.call(cases.calls, RANKS, TOKENS, 1)
        since = time.monotonic()
        reports = world.call(cases.calls_until_failure, RANKS, TOKENS, ranks=SURVIVORS)
        check_reports(world, reports, since, ENTRY_TIMEOUT_S + SLACK_S, f"the packet header of rank {VICTIM}")
        assert max(report["seconds"] for report in reports) > ENTRY_TIMEOUT_S * 0.99


def test_peer_that_has_done_its_part_may_end():
    """Nobody needs a rank whose results are all there: whoever misses it after its last call is wrong."""
    with failing_world() as world:
        for _ in range(5):
            world.call(cases.calls, RANKS, TOKENS, 2)
        world.start((VICTIM,), cases.calls_and_end, RANKS, TOKENS, 3)
        world.start(SURVIVORS, cases.calls, RANKS, TOKENS, 3)
        for outcome in world.collect(SURVIVORS):
            assert outcome.error is None, outcome.story


def test_different_layers_in_one_step():
    with failing_world() as world:
        world.call(cases.calls, RANKS, TOKENS, 1)
        for outcome in world.outcomes(cases.call_layers_by_rank, RANKS, TOKENS, [4, 9, 4]):
            assert outcome.kind == "PeerError" and outcome.seconds < TIMEOUT_S + SLACK_S
            assert "is calling " in outcome.error or "ranks that call different layers" in outcome.error
        for outcome in world.outcomes(cases.calls, RANKS, TOKENS, 1):
            assert outcome.kind == "PeerError", "a failed group must not be used again"
        before = world.call(cases.arena)
        world.call(flashmoe.distributed.init)
        assert world.call(cases.arena)[0]["generation"] > before[0]["generation"]
        world.call(cases.run_and_check, 1, RANKS, [3, 4, 5])


def test_messages_of_a_smaller_group_name_the_world_s_ranks():
    with failing_world(max_groups=2) as world:
        world.call(cases.make_groups, (1, 2))
        world.call(cases.run_and_check, 1, (1, 2), [3, 4], ranks=(1, 2))
        outcomes = world.outcomes(cases.call_layers_by_rank, (1, 2), [2, 2], [1, 2], ranks=(1, 2))
        for mine, outcome in zip((1, 2), outcomes, strict=True):
            assert outcome.kind == "PeerError" and f"', rank {mine}, call " in outcome.error
            assert f": rank {3 - mine} is calling" in outcome.error or f": rank {3 - mine} aborted" in outcome.error
            assert "rank 0" not in outcome.error


def test_failure_of_some_ranks_renews_all():
    """Two ranks' group fails; init() then makes a new arena on the third rank too."""
    with failing_world(max_groups=2) as world:
        world.call(cases.make_groups, (0, 1))
        world.call(cases.run_and_check, 1, RANKS, [3, 4, 5])
        for outcome in world.outcomes(cases.call_layers_by_rank, (0, 1), [2, 2], [1, 2], ranks=(0, 1)):
            assert outcome.kind == "PeerError"
        world.call(flashmoe.distributed.init)
        world.call(cases.run_and_check, 1, RANKS, [3, 4, 5])
        world.call(cases.run_and_check, 1, (0, 1), [3, 4], ranks=(0, 1))


def test_bad_arguments_of_one_rank_send_nothing():
    with failing_world() as world:
        messages = world.call(cases.bad_ids_then_good, RANKS, [5, 6, 7], 1)
        assert messages[0] is None and "topk_ids must lie in [0, 12)" in messages[1] and messages[2] is None
        outcomes = world.outcomes(cases.calls, RANKS, [65, 65, 65], 1)
        assert all(outcome.kind == "ValueError" and "at most 64" in outcome.error for outcome in outcomes)
        world.call(cases.run_and_check, 1, RANKS, [64, 64, 64])


def test_too_little_memory_is_found_at_init():
    with rank_world(2) as world:
        outcomes = world.outcomes(flashmoe.distributed.init, max_tokens=2**20, max_wire_bytes=2**20)
        for outcome in outcomes:
            assert outcome.kind == "RuntimeError" and outcome.seconds < 20
            assert "rank 0 of 2 on this host: symmetric heap: " in outcome.error
            assert "per rank asked" in outcome.error and "available" in outcome.error
        largest = 2**31 - 1
        for outcome in world.outcomes(
            flashmoe.distributed.init, max_tokens=largest, max_wire_bytes=largest, max_top_k=64, max_groups=largest
        ):
            assert outcome.kind == "RuntimeError" and "more than a process can address" in outcome.error
        world.call(flashmoe.distributed.init, **LIMITS)
        world.call(cases.run_and_check, 1, (0, 1), [3, 4])


def test_memory_that_suffices_for_some_ranks_only():
    """Ranks allocate one after another; what those before took is given back, and those after take nothing."""
    with rank_world(3) as world:
        outcomes = world.outcomes(cases.init_where_memory_ends, 1, **LIMITS)
        text = "rank 1 of 3 on this host: symmetric heap: nothing left"
        assert [(outcome.kind, outcome.error) for outcome in outcomes] == [("RuntimeError", text)] * 3
        assert world.call(cases.segments_mapped) == [[]] * 3
        world.call(flashmoe.distributed.init, **LIMITS)
        world.call(cases.run_and_check, 1, RANKS, [3, 4, 5])


@pytest.mark.parametrize("how", ["ranks killed", "launching process killed", "Ctrl-C"])
def test_nothing_stays_behind(how):
    """The kernel takes the memory back when nobody maps it, so it is enough that nobody is left and no name is."""
    before = set(os.listdir("/dev/shm"))
    program = [sys.executable, "-c", LAUNCHER]
    launcher = subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=fresh_environment()
    )
    try:
        lines = [launcher.stdout.readline().split() for _ in range(2)]
        pids, inodes = [int(line[0]) for line in lines], set(lines[0][1:])
        assert len(inodes) == 2 and mappers_of(inodes) >= set(pids)
        for pid in pids if how == "ranks killed" else [launcher.pid]:
            os.kill(pid, signal.SIGINT if how == "Ctrl-C" else signal.SIGKILL)
        assert launcher.wait(30) != 0
    finally:
        launcher.kill()
        launcher.communicate()
    deadline = time.monotonic() + 10
    while (mappers_of(inodes) or any(map(is_running, pids))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not mappers_of(inodes)
    assert not any(map(is_running, pids))
    assert {name for name in os.listdir("/dev/shm") if name not in before and "flashmoe" in name} == set()


LAUNCHER = """
import os, signal, time
import torch.distributed as dist
import flashmoe

def work():
    flashmoe.distributed.group_of(dist.group.WORLD)
    inodes = sorted({line.split()[4] for line in open("/proc/self/maps") if "memfd:flashmoe" in line})
    os.write(1, (" ".join([str(os.getpid()), *inodes]) + "\\n").encode())
    time.sleep(600)

# As in a terminal, also where the tests were started in the background, which ignores Ctrl-C and hands that down.
signal.signal(signal.SIGINT, signal.default_int_handler)
flashmoe.launch(work, 2)
"""


def is_running(pid: int) -> bool:
    """A zombie is not: its parent, the init process of this machine, is free to collect it late."""
    try:
        return Path("/proc", str(pid), "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def mappers_of(inodes: set[str]) -> set[int]:
    """Processes that map symmetric memory with these inode numbers."""
    found = set()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            maps = (folder / "maps").read_text().splitlines()
        except OSError:
            continue  # it has ended, or is another user's
        if any("memfd:flashmoe" in line and line.split()[4] in inodes for line in maps):
            found.add(int(folder.name))
    return found
