"""bench/gpu_check.sh without a GPU: its steps fit into nine minutes, name what there is, and fail one by one."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from flashmoe import cli

ROOT = Path(__file__).resolve().parent.parent
# What a step would run: programs that tell what they were asked for, and `timeout`, which runs a step or has it fail.
LOGGED = """#!/bin/bash
echo "$(printf '%q ' "$(basename "$0")" "$@")" >> "$LOG"
"""
TIMEOUT = LOGGED + """shift 3
case "$*" in *"$FAILING"*) exit 124 ;; esac
exec "$@"
"""
PYTHON = LOGGED + """case "$*" in *"$FAILING"*) exit 1 ;; esac
"""
MPS = LOGGED + """[ "$1" = -d ] || echo "asked to $(cat) at ${CUDA_MPS_PIPE_DIRECTORY:-nowhere}" >> "$LOG"
"""
# What it compiles is a program that tells, too.
COMPILER = LOGGED + """cp "$PYTHON" "${!#}"
"""


@pytest.fixture
def ran(tmp_path):
    """ran(failing): the exit code, every command in its order, and the table."""

    def run(failing: str = "nothing fails") -> tuple[int, list[list[str]], list[str]]:
        programs, out, log = tmp_path / "bin", tmp_path / "out", tmp_path / "log"
        programs.mkdir(exist_ok=True)
        log.unlink(missing_ok=True)
        names = ["fake_python", "timeout", "nvcc", "compute-sanitizer", "nvidia-smi", "nvidia-cuda-mps-control"]
        others = {"timeout": TIMEOUT, "nvcc": COMPILER, "fake_python": PYTHON, "nvidia-cuda-mps-control": MPS}
        for name in names:
            (programs / name).write_text(others.get(name, LOGGED))
            (programs / name).chmod(0o755)
        environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHON": str(programs / "fake_python"),
                                    "CUDACXX": str(programs / "nvcc"), "LOG": str(log), "FAILING": failing}  # fmt: skip
        command = [ROOT / "bench" / "gpu_check.sh", out]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        commands = [shlex.split(line) for line in log.read_text().splitlines()]
        return done.returncode, commands, (out / "gpu_check.txt").read_text().splitlines()

    return run


def test_steps_fit_into_nine_minutes_and_name_what_there_is(ran):
    code, commands, table = ran()
    assert code == 0 and all(line.endswith(" ok") for line in table), table
    limits = [int(command[3]) for command in commands if command[0] == "timeout"]
    assert len(limits) == len(table) and sum(limits) < 540, limits
    asked = [command[1:] for command in commands if command[0] == "fake_python"]
    flashmoe = [command[2:] for command in asked if command[:2] == ["-m", "flashmoe"]]
    assert ["bench", "micro"] in [command[:2] for command in flashmoe] and "--trace" in sum(flashmoe, [])
    for command in flashmoe:
        options = cli._parser().parse_args(command)
        if "backward" in getattr(options, "passes", []):
            assert not {"triton", "virtual-8"} & set(options.baselines), "which would be made and tuned, and have none"
    files = [word for command in asked for word in command if word.startswith("tests/")]
    assert "tests/test_cuda_trace.py" in files and all((ROOT / file).exists() for file in files)
    assert {f"tests/{file.name}" for file in (ROOT / "tests").glob("test_cuda*.py")} - set(files) == {
        "tests/test_cuda_arguments.py"
    }, "which needs no GPU"


def test_engines_are_asked_before_what_is_made_of_them(ran):
    _, commands, table = ran()
    names = [command[0] for command in commands]
    compiled = commands[names.index("nvcc")]
    assert {"arch=compute_90a,code=sm_90a", "tests/cuda/engine_alone.cu"} <= set(compiled)
    assert (ROOT / "tests/cuda/engine_alone.cu").exists()
    assert [line.split()[0] for line in table[:2]] == ["build", "engines"] and names.count("engine_alone") == 1
    asks = [place for place, command in enumerate(commands) if any("info" in word for word in command)]
    assert names.index("nvcc") < names.index("engine_alone") < asks[0]


def test_tests_end_before_their_step_and_say_what_failed(ran):
    limit, steps = 0, 0
    for name, *words in ran()[1]:
        limit = int(words[2]) if name == "timeout" else limit
        given = dict(word.split("=") for word in words if "timeout=" in word)
        if name == "fake_python" and given:
            steps += 1
            assert 10 < int(given["timeout"]) < int(given["session_timeout"]) < limit, "later than a kernel gives up"
    assert steps == 6


@pytest.mark.parametrize("failing", ["nothing fails", "torch.zeros"])
def test_mps_is_ended_where_it_listens_also_if_it_is_of_no_use(ran, failing):
    told = [" ".join(command) for command in ran(failing)[1]]
    begun = next(place for place, command in enumerate(told) if command.startswith("nvidia-cuda-mps-control -d"))
    ended = [place for place, command in enumerate(told) if command.startswith("asked to quit")]
    asked = next(place for place, command in enumerate(told) if "tests/test_cuda_nvshmem.py" in command)
    assert len(ended) == 1 and begun < ended[0] and "nowhere" not in told[ended[0]]
    assert (ended[0] < asked) == (failing != "nothing fails"), "or the tests would find nobody there"


def test_a_step_over_its_limit_costs_only_itself(ran):
    code, commands, table = ran("test_cuda_trace.py")
    assert code == 1 and sum(command[0] == "timeout" for command in commands) == len(table)
    failed = [line for line in table if not line.endswith(" ok")]
    assert len(failed) == 1 and failed[0].startswith("trace ") and "FAILED: over its 24 s" in failed[0]
