"""flashmoe bench micro: benchmarks of Python and of C++ run, and their records are of single operations."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flashmoe import bench_micro
from flashmoe.cli import main
from flashmoe.results import read_results

ROOT = Path(__file__).resolve().parent.parent
CHOSEN = (
    "test_fused_moe_fixed_cost or test_take_alone or (test_signal and processes-size8192) or (test_dispatch and tokens16)"
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A record of a few benchmarks as the command writes it, what it printed, and the seconds it took."""
    file = tmp_path_factory.mktemp("micro") / "micro.json"
    command = [sys.executable, "-m", "flashmoe", "bench", "micro", "-k", CHOSEN, "--json", str(file)]
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return read_results(file.parent).micro, done.stdout, time.perf_counter() - begin


def test_record_is_of_what_was_asked_for_and_follows_its_schema(ran):
    record, printed, _ = ran
    assert {one["name"] for one in record.data["benchmarks"]} == {
        "test_fused_moe_fixed_cost[0]", "test_fused_moe_fixed_cost[1]", "test_take_alone[tiles6]",
        "test_signal[processes-size8192]", "test_dispatch[tokens16-ranks2]",
    }  # fmt: skip
    for one in record.data["benchmarks"]:
        assert one["name"] in printed
    made = record.data["flashmoe"]
    assert made["command"][:2] == ["pytest", "bench/micro"] and made["machine"]["usable_cores"] >= 1
    (signal,) = record.chosen("signal", ends="processes")
    assert signal.name == "signal: processes, size 8192" and signal.amounts == {"bytes": 8192}


def test_times_are_seconds_of_one_operation(ran):
    """All that was timed fits into the time that went by, and nothing is quicker than the machine can be."""
    record, _, elapsed = ran
    measured = {}
    for one in record.data["benchmarks"]:
        operations = one["extra_info"]["operations_of_a_round"] * one["stats"]["rounds"]
        measured[one["name"]] = operations * one["stats"]["mean"]
    assert sum(measured.values()) < elapsed, measured
    assert all(one.median > 1e-7 for one in record.chosen("fused_moe_fixed_cost"))  # a call from Python to C++
    (signal,) = record.chosen("signal")
    assert signal.rates["bytes"] < 1e12  # out of one core's cache into another's


FAKE = """
import conftest
import pytest

@pytest.mark.benchmark(timer=conftest.seconds_of_operations, group="bench_fake")
def test_three_microseconds(measure):
    measure(lambda n: 3e-6, bytes=6, items=0)
"""


def test_rounds_of_many_operations_are_told_as_one(tmp_path):
    """An operation that says of itself that one takes 3 us, whatever the machine does."""
    (tmp_path / "bench_fake.py").write_text(FAKE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "--rootdir", str(tmp_path), "-c", os.devnull,
               "--benchmark-json", str(tmp_path / "micro.json"), str(tmp_path / "bench_fake.py")]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(bench_micro.FOLDER), str(ROOT)])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    (one,) = read_results(tmp_path).micro.operations
    assert one.median == pytest.approx(3e-6) and one.quartiles == pytest.approx((3e-6, 3e-6))
    assert one.amounts == {"bytes": 6} and one.rates["bytes"] == pytest.approx(2e6)
    (benchmark,) = json.loads((tmp_path / "micro.json").read_text())["benchmarks"]
    assert benchmark["extra_info"]["bytes_per_s"] == pytest.approx(2e6)
    assert 1000 < benchmark["extra_info"]["operations_of_a_round"] <= 1 << 22
    assert "3 µs" in done.stdout and "2.00 MB/s" in done.stdout


def test_what_is_missing_is_named(tmp_path, monkeypatch, capsys):
    found = {"pytest": True, "pytest_benchmark": None}
    monkeypatch.setattr(bench_micro.importlib.util, "find_spec", found.get)
    assert main(["bench", "micro"]) == 2
    assert "needs pytest-benchmark, which is not installed: `pip install 'flashmoe[test]'`" in capsys.readouterr().err
    monkeypatch.setattr(bench_micro, "FOLDER", tmp_path / "bench" / "micro")
    assert main(["bench", "micro"]) == 2
    assert f"there is no {tmp_path / 'bench' / 'micro'}" in capsys.readouterr().err
