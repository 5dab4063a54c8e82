"""What every benchmark of bench/micro gets: sizes, the C++ primitives, and `measure`.

An operation is measured by itself: what is called repeats it n times, in C++ or between two CUDA events, and returns
the seconds of one. pytest-benchmark gets these as its clock (`seconds_of_operations`), so that its statistics, JSON and
comparisons are of single operations, and neither its own cost nor Python's counts.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import build_primitives
import pytest
import torch

from flashmoe import info, micro_record
from flashmoe.report import seconds_of

ROUND_S = 0.01  # about how long each of a benchmark's rounds lasts
ROUNDS = 15

_clock = 0.0
_table = pytest.StashKey[list[tuple[str, str]]]()


def seconds_of_operations() -> float:
    return _clock


def pytest_addoption(parser):
    parser.addoption("--thorough", action="store_true", help="more sizes than fit two minutes")


def pytest_configure(config):
    config.stash[_table] = []
    config.addinivalue_line("markers", "sizes(name, quick, more): values of an argument; `more` only with --thorough")


def pytest_generate_tests(metafunc):
    for mark in metafunc.definition.iter_markers("sizes"):
        name, quick, more = mark.args
        values = [*quick, *more] if metafunc.config.getoption("thorough") else quick
        metafunc.parametrize(name, values, ids=[_named(name, value) for value in values])


def _named(name: str, value: int | str | tuple) -> str:
    """A number with its name, as tokens16; of several arguments the values."""
    if isinstance(value, tuple):
        return "-".join(map(str, value))
    return f"{name}{value}" if isinstance(value, int) else value


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.benchmark(timer=seconds_of_operations, group=item.path.stem))


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def micro():
    """The C++ primitives, built if they are not, or are older than their sources."""
    return build_primitives.load()


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request, micro):
    """Each instruction set that the CPU engine has kernels for."""
    if request.param not in micro.isas():
        pytest.skip(f"this machine or this build has no kernels for {request.param}")
    return request.param


@pytest.fixture
def measure(benchmark, request) -> Callable[..., float]:
    """measure(operation, bytes=…, flops=…, items=…): times operation(n), which returns the seconds of one of n.

    What one operation moves, computes or handles makes rates beside its time, by the median round.
    """

    def run(operation: Callable[[int], float], **amounts: float) -> float:
        n, seconds = 1, operation(1)
        while n * seconds < ROUND_S / 2 and n < 1 << 22:
            n = min(1 << 22, max(2 * n, int(ROUND_S / max(seconds, 1e-10)))) if n * seconds > ROUND_S / 50 else 8 * n
            seconds = operation(n)

        def one_round() -> None:
            global _clock
            _clock += operation(n)

        rounds = max(3, min(ROUNDS, int(ROUNDS * ROUND_S * 3 / (n * seconds))))
        benchmark.pedantic(one_round, rounds=rounds, warmup_rounds=1)
        if benchmark.stats is None:  # --benchmark-disable
            return seconds
        median = benchmark.stats.stats.median
        rates = {f"{name}_per_s": amount / median for name, amount in amounts.items()}
        benchmark.extra_info.update(operations_of_a_round=n, **amounts, **rates)
        of_rounds = benchmark.stats.stats
        request.config.stash[_table].append(
            (request.node.nodeid.rsplit("/", 1)[-1], _line(median, of_rounds.q1, of_rounds.q3, rates))
        )
        return median

    return run


def _line(median: float, low: float, high: float, rates: dict[str, float]) -> str:
    text = f"{seconds_of(median):>8}  ({seconds_of(low)} – {seconds_of(high)})"
    units = {"bytes_per_s": "B/s", "flops_per_s": "FLOP/s", "items_per_s": "/s"}
    return f"{text:<34}" + "  ".join(f"{_rate(rate)}{units[name]}" for name, rate in rates.items() if rate)


def _rate(per_second: float) -> str:
    factor, prefix = next(pair for pair in ((1e9, "G"), (1e6, "M"), (1e3, "k"), (0, "")) if per_second >= pair[0])
    return f"{per_second / (factor or 1):8.2f} {prefix}"


def pytest_terminal_summary(terminalreporter, config):
    if table := config.stash[_table]:
        terminalreporter.section("of one operation: median (quartiles), rate")
        width = max(len(name) for name, _ in table)
        for name, line in table:
            terminalreporter.write_line(f"{name:<{width}}  {line}".rstrip())


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config, benchmarks, output_json):
    """As flashmoe.micro_record has it: with what it was measured on; pytest-benchmark can compare it still."""
    output_json["schema"] = micro_record.KIND
    output_json["flashmoe"] = {
        "versions": info.versions(), "machine": info.machine(), "torch_threads": torch.get_num_threads(),
        "command": ["pytest", *sys.argv[1:]], "thorough": config.getoption("thorough"),
    }  # fmt: skip
    output_json.update(machine_info={}, commit_info={})  # which pytest-benchmark's own comparison asks for
    for one in output_json["benchmarks"]:
        del one["options"], one["param"]
        for every_round_or_unused in ("data", "ld15iqr", "hd15iqr", "iqr_outliers", "stddev_outliers", "total"):
            del one["stats"][every_round_or_unused]
