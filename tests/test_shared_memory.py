"""Memory that ranks hand to each other and the agreements by which they do, with at most one rank, played by hand."""

import os
import secrets
import socket
import subprocess
import sys
import threading
from pathlib import Path

import distributed_cases as cases
import pytest
import torch.distributed as dist
from rank_world import rank_processes

from flashmoe import _C, PeerError
from flashmoe.arena import Arena, PeerProcesses, build_arena
from flashmoe.cores import share_of_cores
from flashmoe.hosts import this_host
from flashmoe.rendezvous import Rendezvous


def test_segment_cannot_shrink_under_its_users():
    segment = _C.Segment.create(1 << 20)
    for size in (0, 1 << 21):
        with pytest.raises(PermissionError):
            os.ftruncate(segment.fd, size)
    assert os.fstat(segment.fd).st_mode & 0o777 == 0o600
    assert os.get_inheritable(segment.fd) is False


def test_segment_refuses_what_it_cannot_trust():
    segment = _C.Segment.create(4096)
    _C.Segment.attach(segment.fd, 4096)
    with pytest.raises(RuntimeError, match="must have 8192 bytes, got 4096"):
        _C.Segment.attach(segment.fd, 8192)
    unsealed = os.memfd_create("unsealed")
    try:
        os.ftruncate(unsealed, 4096)
        with pytest.raises(RuntimeError, match="sealed"):
            _C.Segment.attach(unsealed, 4096)
    finally:
        os.close(unsealed)
    with pytest.raises(RuntimeError, match="Bad file descriptor"):
        _C.Segment.attach(unsealed, 4096)


def test_segment_names_what_was_asked_and_what_there_is():
    with pytest.raises(RuntimeError, match=r"symmetric heap: 16384.0 GiB per rank asked, [0-9.]+ .iB available"):
        _C.Segment.create(1 << 44)
    with pytest.raises(RuntimeError, match="got 0"):
        _C.Segment.create(0)


def test_limits_keep_to_what_32_bits_count():
    assert _C.Limits(8, 2**20, 4, 256, 1).heap_bytes > 2**30
    with pytest.raises(ValueError, match=r"ranks times max_tokens times max_top_k must be at most 2\^31, got 4294967296"):
        _C.Limits(16, 2**20, 4, 256, 1)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start another user's process")
def test_another_user_gets_nothing_and_disturbs_nobody():
    """This test plays rank 1 by hand, so that others can connect to rank 0 before it does."""
    store = dist.PrefixStore("strangers", dist.HashStore())
    built: list[Arena] = []

    def rank_0() -> None:
        built.append(build_arena(Rendezvous(store, 0, [0, 1], "build the arena"), 1 << 16, 20.0))

    thread = threading.Thread(target=rank_0)
    thread.start()
    by_hand = Rendezvous(store, 1, [0, 1], "build the arena")
    memory = _C.Segment.create(1 << 16)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0flashmoe-test-" + secrets.token_hex(8))
        listener.listen(1)
        by_hand.exchange("host", this_host, 20.0)
        by_hand.exchange("memory", lambda: None, 20.0)
        name, _ = by_hand.exchange("socket", lambda: listener.getsockname()[1:].decode(), 20.0)
        mine, theirs = rank_processes.Pipe()
        process = rank_processes.Process(target=cases.be_a_stranger, args=(name, 65534, theirs))
        process.start()
        theirs.close()
        assert mine.poll(30), "the stranger hangs"
        assert mine.recv() == [b""] * 4
        process.join()
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect("\0" + name)
            socket.send_fds(connection, [b'{"rank": 1}'], [memory.fd])
        by_hand.exchange("mapped", lambda: None, 20.0)
    thread.join(20)
    assert built[0].peers.pids == [os.getpid()] * 2
    assert str(os.fstat(memory.fd).st_ino) in cases.segments_mapped()
    assert not any("stranger" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_peer_processes_know_a_zombie():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    peers = PeerProcesses([os.getpid(), child.pid, 0])
    assert [peers.is_alive(rank) for rank in range(3)] == [True, True, True]
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has collected it
    assert [peers.is_alive(rank) for rank in range(3)] == [True, False, True]
    child.communicate()
    assert not PeerProcesses([child.pid]).is_alive(0)
    peers.close()


def test_rendezvous_names_whom_it_waited_for():
    store = dist.HashStore()
    with pytest.raises(PeerError, match="rank 0 waited 0.1 s for ranks 1, 2 to sing"):
        Rendezvous(store, 0, [0, 1, 2], "sing").exchange("first", lambda: 1, 0.1)
    with pytest.raises(PeerError, match="rank 0 gave up: rank 0 waited"):
        Rendezvous(store, 1, [0, 1, 2], "sing").exchange("second", lambda: 1, 5.0)


def test_rendezvous_notices_an_end_but_hears_what_was_said_before():
    store = dist.HashStore()
    store.set("first/1", '{"value": 5}')
    rendezvous = Rendezvous(store, 0, [0, 1], "sing", is_alive=lambda rank: False)
    assert rendezvous.exchange("first", lambda: 4, 5.0) == [4, 5]
    with pytest.raises(PeerError, match="rank 1 has ended while rank 0 waited for it to sing"):
        rendezvous.exchange("second", lambda: 4, 5.0)


def test_cores_are_shared_where_ranks_may_share_them(monkeypatch):
    monkeypatch.setattr("flashmoe.cores.core_quota", lambda: float("inf"))
    everywhere = list(range(8))
    assert share_of_cores(everywhere, [everywhere] * 2) == 4
    assert share_of_cores(everywhere, [everywhere] * 16) == 1
    assert share_of_cores([0, 1, 2, 3], [[0, 1, 2, 3], [4, 5, 6, 7]]) == 4  # the launcher has bound them
    assert share_of_cores([0, 1, 2], [[0, 1, 2]] * 3) == 1
    monkeypatch.setattr("flashmoe.cores.core_quota", lambda: 3.0)
    assert share_of_cores(everywhere, [everywhere]) == 3
    assert share_of_cores(everywhere, [everywhere] * 2) == 1
