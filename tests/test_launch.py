"""The ways to start ranks: flashmoe.launch from a module, a script and a session, and torchrun."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import distributed_cases as cases
import pytest
import torch
import torch.distributed as dist
from rank_world import fresh_environment

import flashmoe
from flashmoe.launch import RankError


def test_launch():
    """Results by rank, arguments, the world that ranks find, and functions that cannot be imported."""
    factor = 3
    results = flashmoe.launch(
        lambda x, *, y: (cases.arena()["max_tokens"], cases.rank() * factor, x + y, torch.get_num_threads()),
        2, torch.ones(2), y=torch.full((2,), 4.0), timeout_s=120, init_kwargs=dict(max_tokens=5),
    )  # fmt: skip
    assert [result[:2] for result in results] == [(5, 0), (5, 3)]
    assert all(torch.equal(result[2], torch.full((2,), 5.0)) and result[3] >= 1 for result in results)
    assert not any(child.name.startswith("flashmoe rank") for child in multiprocessing.active_children())


def test_launch_raises_what_a_rank_raised_first():
    """Rank 0 loses its peer because rank 1 raises: the root cause is what counts."""

    def one_fails():
        if cases.rank() == 1:
            raise KeyError("the root cause")
        cases.calls((0, 1), [3, 4], 1)

    with pytest.raises(KeyError, match="the root cause") as raised:
        flashmoe.launch(one_fails, 2, timeout_s=120)
    assert isinstance(raised.value.__cause__, RankError)
    assert str(raised.value.__cause__).startswith("rank 1 raised:") and "in one_fails" in str(raised.value.__cause__)


def test_launch_reports_a_signal_and_ends_the_others():
    def one_is_killed(folder):
        Path(folder, str(os.getpid())).touch()
        dist.barrier()
        if cases.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)

    with tempfile.TemporaryDirectory() as folder:
        with pytest.raises(RankError, match="rank 1 was killed by SIGKILL"):
            flashmoe.launch(one_is_killed, 2, folder, timeout_s=120)
        pids = os.listdir(folder)
        assert len(pids) == 2 and not any(Path("/proc", pid).exists() for pid in pids)


def test_launch_ends_in_time():
    with pytest.raises(TimeoutError, match="rank 0 had not returned after 4 s"):
        flashmoe.launch(lambda: time.sleep(600), 1, timeout_s=4)


def test_launch_arguments():
    with pytest.raises(ValueError, match="nproc must be an integer of at least 1, got 0"):
        flashmoe.launch(print, 0)
    with pytest.raises(TypeError, match="fn must be a function, got int"):
        flashmoe.launch(3, 1)
    with pytest.raises(TypeError, match="cannot be sent to another process"):
        flashmoe.launch(print, 1, threading.Lock())


SESSION = """
import torch.distributed, flashmoe
offset = 10
def helper(n): return n + offset
def work(n): return helper(n) * 100 + torch.distributed.get_rank()
print(flashmoe.launch(work, 2, 5, timeout_s=120))
class Local: pass
try: flashmoe.launch(work, 2, Local())
except TypeError as error: print(error)
"""


def test_launch_where_main_is_no_file():
    """As in a notebook: the functions exist in this interpreter alone."""
    session = subprocess.run(
        [sys.executable], input=SESSION, capture_output=True, text=True, timeout=120, env=fresh_environment()
    )
    assert session.returncode == 0, session.stderr
    first, second = session.stdout.splitlines()
    assert first == "[1500, 1501]"
    assert "class Local exists in this interpreter alone; put it into a module file" in second


SCRIPT = """
import sys
import torch, torch.distributed as dist
import flashmoe

def main():
    flashmoe.distributed.init(max_tokens=16, max_wire_bytes=256, max_experts=8, max_top_k=2)
    layer = flashmoe.MoE(64, 32, 8, 2, group=dist.group.WORLD)
    with torch.no_grad():
        y = layer(torch.randn(4 + dist.get_rank(), 64))
    assert y.shape == (4 + dist.get_rank(), 64)
    sys.stdout.write(f"rank {dist.get_rank()} of {dist.get_world_size()}\\n")
    return dist.get_rank()

if __name__ == "__main__":
    if "launch" in sys.argv:
        assert flashmoe.launch(main, 2, timeout_s=120) == [0, 1]
        assert not dist.is_initialized()
    else:
        main()
        flashmoe.distributed.finalize()
        assert not dist.is_initialized(), "init() has initialised it, so finalize() must undo that"
"""


@pytest.mark.parametrize("how", ["torchrun", "launch"])
def test_one_script_both_ways(tmp_path, how):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint"]
    command = [*torchrun, "localhost:0", str(script)] if how == "torchrun" else [str(script), "launch"]
    run = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=120, env=fresh_environment()
    )
    assert run.returncode == 0, run.stderr
    assert sorted(run.stdout.splitlines()) == ["rank 0 of 2", "rank 1 of 2"]
