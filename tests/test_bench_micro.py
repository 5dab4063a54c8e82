"""flashmoe bench micro: a benchmark of Python and one of C++ run, and their records are of single operations."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flashmoe import bench_micro
from flashmoe.cli import main

ROOT = Path(__file__).resolve().parent.parent


def run(tmp_path, chosen: str) -> dict[str, dict]:
    """By name the benchmarks of the JSON that a run of those chosen has written."""
    file = tmp_path / "micro.json"
    command = [sys.executable, "-m", "flashmoe", "bench", "micro", "-k", chosen, "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(file.read_text())
    assert record["flashmoe"]["machine"]["usable_cores"] >= 1 and record["flashmoe"]["versions"]["torch"]
    for one in record["benchmarks"]:
        assert one["name"] in done.stdout
    return {one["name"]: one for one in record["benchmarks"]}


def test_python_operations(tmp_path):
    found = run(tmp_path, "test_fused_moe_fixed_cost")
    assert set(found) == {"test_fused_moe_fixed_cost[0]", "test_fused_moe_fixed_cost[1]"}
    for one in found.values():
        assert 1e-7 < one["stats"]["median"] < 1e-2  # of one call, not of a round of many
        assert one["extra_info"]["operations_of_a_round"] >= 1


def test_primitives_are_built_and_measured(tmp_path):
    found = run(tmp_path, "test_take_alone or (test_signal and processes-size8192)")
    assert set(found) == {"test_take_alone[tiles6]", "test_signal[processes-size8192]"}
    signal = found["test_signal[processes-size8192]"]
    assert signal["group"] == "bench_transports" and signal["options"]["timer"].endswith("seconds_of_operations")
    rate = signal["extra_info"]["bytes_per_s"]
    assert rate == pytest.approx(8192 / signal["stats"]["median"])
    assert found["test_take_alone[tiles6]"]["stats"]["median"] < 1e-4


def test_what_is_missing_is_named(tmp_path, monkeypatch, capsys):
    found = {"pytest": True, "pytest_benchmark": None}
    monkeypatch.setattr(bench_micro.importlib.util, "find_spec", found.get)
    assert main(["bench", "micro"]) == 2
    assert "needs pytest-benchmark, which is not installed: `pip install 'flashmoe[test]'`" in capsys.readouterr().err
    monkeypatch.setattr(bench_micro, "FOLDER", tmp_path / "bench" / "micro")
    assert main(["bench", "micro"]) == 2
    assert f"there is no {tmp_path / 'bench' / 'micro'}" in capsys.readouterr().err
