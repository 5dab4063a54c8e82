"""A child that is forked from a rank: it has neither its parent's threads nor the symmetric memory."""

import ctypes
import mmap
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from layer_case import LayerCase
from thread_ranks import make_team, on_ranks

import flashmoe
from flashmoe import _C

LARGE = LayerCase(hidden_size=128, intermediate_size=256, tokens=(64,))  # enough work for a helper thread


def in_a_forked_child(work: Callable[[], None]) -> int:
    """Exit code of a child that does ``work``; what hangs is killed."""
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(10)
            work()
            os._exit(7)
        finally:
            os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("options", [dict(num_workers=2), dict(num_workers=1, remote_only_seed=1)])
def test_dropping_a_group_in_a_child_waits_for_no_thread(options):
    team = make_team(1, max_wire_bytes=512, **options)
    on_ranks(team, LARGE.call)  # the helper threads exist now
    assert in_a_forked_child(team.clear) == 7
    on_ranks(team, LARGE.call)


def test_a_call_in_a_child_is_refused():
    team = make_team(1, num_workers=2)
    on_ranks(team, LARGE.call)
    arguments = LARGE.x[0], LARGE.topk_ids[0], LARGE.topk_weights[0], LARGE.gate_up_proj, LARGE.down_proj

    def call() -> None:
        with pytest.raises(RuntimeError, match=f"was made by process {os.getppid()}: a forked child has neither"):
            flashmoe.fused_moe(*arguments, group=team[0])  # no more of torch, whose threads are gone too

    assert in_a_forked_child(call) == 7


def test_dropping_a_segment_in_a_child_unmaps_nothing_else():
    """The child's address space has a hole where the segment was, and anything may have come to lie there."""
    segment = _C.Segment.create(1 << 20)
    inode = os.fstat(segment.fd).st_ino
    [line] = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.split()[4] == str(inode)]
    begin, end = (int(address, 16) for address in line.split()[0].split("-"))
    held = [segment]
    del segment
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]

    def reuse() -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x100000  # MAP_FIXED_NOREPLACE
        assert libc.mmap(begin, end - begin, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) == begin
        held.clear()
        ctypes.memset(begin, 1, end - begin)

    assert in_a_forked_child(reuse) == 7
