#!/usr/bin/env python3
"""Check protocol.pml with spin: the protocol must hold as it is, and fail with every rule that is broken on purpose.

    verify.py                    all configurations, two at a time; exit status 0 iff every one is as expected
    verify.py --trace BREAK_QUIET    print the shortest failing run of a broken rule
    verify.py --only W=2         only the configurations whose definitions contain this text
"""
import argparse
import concurrent.futures
import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

MODEL = pathlib.Path(__file__).resolve().with_name("protocol.pml")
HOLDS, WRONG_DATA, WAITS_FOREVER = "holds", "wrong data", "waits forever"
MEMORY_MB = 2900                # per run; two run at a time


@dataclasses.dataclass(frozen=True)
class Check:
    definitions: str            # -D for the model, without the -D
    expected: str
    ignore: str = ""            # pan option: -E ignores waiting forever, -A ignores assertions


# Long ones first, so that two workers finish together. STRICT also asserts consequences of the rules (README.md).
HOLDING = [
    Check("W=3 CALLS=1 MERGE CHUNKS=1 PARTS=1 FANOUT=1 ABORTS=1 STRICT", HOLDS),
    Check("W=3 ENDLESS MERGE CHUNKS=2 PARTS=2 FANOUT=1 STRICT", HOLDS),
    Check("W=3 ENDLESS MERGE CHUNKS=1 PARTS=1 STRICT", HOLDS),
    Check("W=3 ENDLESS MERGE CHUNKS=1 PARTS=1 FANOUT=1 BACKWARD STRICT", HOLDS),
    Check("W=3 ENDLESS CHUNKS=1 PARTS=1 FANOUT=1 STRICT", HOLDS),
    Check("W=2 ENDLESS BACKWARD ABORTS=2 STRICT", HOLDS),
    Check("W=2 CALLS=3 BACKWARD STRICT", HOLDS),
    Check("W=2 CALLS=2 ABORTS=2 STRICT", HOLDS),
    Check("W=2 ENDLESS ABORTS=2 STRICT", HOLDS),
    Check("W=2 CALLS=3 STRICT", HOLDS),
    Check("W=2 CALLS=3 RING=1 STRICT", HOLDS),
    Check("W=2 CALLS=3 FENCE", HOLDS),
    Check("W=2 ENDLESS STRICT", HOLDS),
    Check("W=2 ENDLESS RING=1 STRICT", HOLDS),
    Check("W=2 ENDLESS FENCE", HOLDS),
    Check("W=2 ENDLESS BACKWARD STRICT", HOLDS),
    Check("W=2 ENDLESS BACKWARD RING=1 STRICT", HOLDS),
    Check("W=2 ENDLESS BACKWARD FENCE", HOLDS),
    # Rules that may be broken here, and only here: README.md says why.
    Check("W=2 CALLS=3 BREAK_STAGING", HOLDS),
    Check("W=2 CALLS=3 BREAK_OWN_STAGING", HOLDS),
]
BREAKING = [
    Check("W=2 CALLS=3 BREAK_QUIET", WAITS_FOREVER),
    Check("W=2 CALLS=3 BREAK_ONE_DECIDER", WRONG_DATA),
    Check("W=2 CALLS=3 BREAK_FLAG_COUNTER", WRONG_DATA),
    Check("W=2 CALLS=3 BREAK_FLAG_COUNTER", WAITS_FOREVER, ignore="-A"),
    Check("W=2 CALLS=3 BREAK_PAYLOAD_FIRST", WRONG_DATA),
    Check("W=2 CALLS=3 BREAK_NEWER_EPOCH", WAITS_FOREVER),
    Check("W=2 CALLS=3 BREAK_EQUALITY", WRONG_DATA),
    Check("W=2 CALLS=3 BREAK_RESULT_EQUALITY", WRONG_DATA),
    Check("W=2 CALLS=3 BREAK_REPLY_CONSUMED", WRONG_DATA),
    Check("W=2 CALLS=3 RING=1 BREAK_STAGING", WRONG_DATA),
    Check("W=3 CALLS=1 CHUNKS=1 PARTS=1 FANOUT=1 MERGE BREAK_STAGING", WRONG_DATA),
    Check("W=2 CALLS=3 BREAK_SERVE", WAITS_FOREVER),
    Check("W=2 CALLS=2 ABORTS=1 BREAK_STICKY", WRONG_DATA, ignore="-E"),
    Check("W=2 CALLS=2 ABORTS=1 BREAK_STICKY", WAITS_FOREVER, ignore="-A"),
    Check("W=2 CALLS=2 ABORTS=1 BREAK_OWN_STAGING", WRONG_DATA),
    Check("W=2 CALLS=1 BREAK_TEARDOWN", WRONG_DATA),
    Check("W=2 CALLS=3 BACKWARD BREAK_RELEASE", WRONG_DATA),
    Check("W=2 CALLS=3 BACKWARD BREAK_RELEASE_CONSUMED", WRONG_DATA),
    Check("W=2 CALLS=3 BACKWARD BREAK_RELEASE_EQUALITY", WRONG_DATA),
    Check("W=2 CALLS=3 BACKWARD BREAK_RELEASE_NO_ROWS", WAITS_FOREVER),
]


class CannotCheck(Exception):
    """The check could not be carried out; says nothing about the protocol."""


def run(command, directory):
    return subprocess.run(command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def model_options(check):
    # Breadth-first search finds a shortest failing run, depth-first needs less memory for the whole state space.
    return [f"-D{d}" for d in check.definitions.split()] + (["-DSHORTEST"] if check.expected != HOLDS else [])


def search(check, directory):
    """Returns (result, number of states, pan's own words about the error)."""
    generated = run(["spin", "-a", *model_options(check), str(MODEL)], directory)
    if generated.returncode or not os.path.exists(os.path.join(directory, "pan.c")):
        raise CannotCheck(f"spin -a failed:\n{generated.stdout}")
    options = ["-DSAFETY", "-DCOLLAPSE", "-DNOREDUCE", "-DVECTORSZ=1024", f"-DMEMLIM={MEMORY_MB}"]
    if check.expected != HOLDS:
        options.append("-DBFS")
    # Compiling takes longer than a small search.
    large = check.expected == HOLDS and check.definitions.startswith("W=3")
    compiled = run(["gcc", "-O2" if large else "-O0", "-w", *options, "-o", "pan", "pan.c"], directory)
    if compiled.returncode:
        raise CannotCheck(f"gcc failed on spin's output:\n{compiled.stdout}")
    limits = ["-w25", "-m12000000"] if large else ["-m1000000"]
    out = run(["./pan", *limits, *([check.ignore] if check.ignore else [])], directory).stdout
    errors = re.search(r"errors: (\d+)", out)
    states = re.search(r"([\d.e+]+) states, stored", out)
    if not errors or not states:
        raise CannotCheck(f"pan ended without a result:\n{out[-2000:]}")
    num_states = int(float(states.group(1)))
    if int(errors.group(1)) == 0:
        # A search that was cut short reports no errors either, and proves nothing.
        cut = re.search(r"max search depth too small|Search not completed|out of memory|-DMEMLIM", out)
        if cut:
            raise CannotCheck(f"the search was cut short ({cut.group(0)}) after {num_states:,} states")
        return HOLDS, num_states, ""
    words = re.search(r"^pan:\s*\d+:\s*(.*?)(?: \(at depth \d+\))?$", out, re.M)
    words = words.group(1) if words else "?"
    return (WAITS_FOREVER if "invalid end state" in words else WRONG_DATA), num_states, words


def carry_out(check):
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="flashmoe-model-") as directory:
        try:
            result, states, _ = search(check, directory)
        except CannotCheck as why:
            result, states = f"not checked: {why}", 0
    return check, result, states, time.monotonic() - start


def print_trace(check):
    with tempfile.TemporaryDirectory(prefix="flashmoe-model-") as directory:
        result, states, words = search(check, directory)
        print(f"{check.definitions}: {result} (spin: {words or 'no error'})")
        if result == HOLDS:
            return
        replay = run(["spin", "-t", "-k", f"{MODEL.name}.trail", "-T", *model_options(check), str(MODEL)], directory).stdout
    for line in replay.splitlines():
        if re.match(r"\s*(rank \d|put \d)", line):
            print("   ", line.strip())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", metavar="BREAK_RULE")
    parser.add_argument("--only", metavar="TEXT", default="")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    arguments = parser.parse_args()

    for tool in ("spin", "gcc"):
        if not shutil.which(tool):
            print(f"verify: '{tool}' was not found. Install the package '{tool}' (Debian, Ubuntu: apt-get install {tool}).",
                  file=sys.stderr)
            return 2

    if arguments.trace:
        checks = [c for c in BREAKING if arguments.trace in c.definitions.split()]
        if not checks:
            names = sorted({d for c in BREAKING for d in c.definitions.split() if "BREAK" in d})
            print(f"verify: --trace must be one of {', '.join(names)}; got {arguments.trace}", file=sys.stderr)
            return 2
        try:
            for check in checks:
                print_trace(check)
        except CannotCheck as why:
            print(f"verify: {why}", file=sys.stderr)
            return 1
        return 0

    checks = [c for c in HOLDING + BREAKING if arguments.only in c.definitions]
    if not checks:
        print(f"verify: no configuration contains '{arguments.only}'", file=sys.stderr)
        return 2
    start = time.monotonic()
    done = {}
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        for future in concurrent.futures.as_completed([pool.submit(carry_out, check) for check in checks]):
            check, result, states, seconds = future.result()
            done[check] = result
            verdict = "ok" if result == check.expected else "NOT AS EXPECTED"
            name = check.definitions + (f" ({check.ignore})" if check.ignore else "")
            print(f"{name:62} {states:>9,} states {seconds:6.1f} s  {result:13}  expected: {check.expected:13}  {verdict}",
                  flush=True)
    failed = [c for c in checks if done[c] != c.expected]
    print(f"{len(checks)} configurations in {time.monotonic() - start:.0f} s: "
          + (f"{len(failed)} NOT AS EXPECTED" if failed else "all as expected"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
