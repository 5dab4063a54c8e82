"""``flashmoe bench micro``: the benchmarks of a checkout's bench/micro, run by pytest in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "bench" / "micro"


def bench_micro(chosen: str | None, json: Path | None, thorough: bool) -> int:
    """Runs those whose names match ``chosen`` (pytest's -k); pytest's exit code, 2 where something is missing."""
    trouble = _missing()
    if trouble:
        print(f"FAILED {trouble}", file=sys.stderr)
        return 2
    root = FOLDER.parents[1]
    # Relative, since the record tells the command and is read on other machines.
    command = [sys.executable, "-m", "pytest", "bench/micro", "--rootdir=.", "--benchmark-quiet", "-q"]
    if chosen is not None:
        command += ["-k", chosen]
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        command.append(f"--benchmark-json={os.path.relpath(json, root)}")
    if thorough:
        command.append("--thorough")
    return subprocess.run(command, cwd=root).returncode


def _missing() -> str | None:
    if not (FOLDER / "conftest.py").exists():
        return (
            f"flashmoe bench micro needs a checkout's bench/micro beside the package, and there is no {FOLDER}: "
            "in a clone, `make bench`, or `pip install -e .[test]` and then this command"
        )
    for module, distribution in (("pytest", "pytest"), ("pytest_benchmark", "pytest-benchmark")):
        if importlib.util.find_spec(module) is None:
            return f"flashmoe bench micro needs {distribution}, which is not installed: `pip install 'flashmoe[test]'`"
    return None
