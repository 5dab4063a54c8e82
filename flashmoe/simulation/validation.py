"""How well the simulation tells what was measured: fitted to a few runs of one process, held against all others."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..records import Record
from .machine import HostFit
from .measured import shape_of, simulated_seconds, workload_of
from .workload import Workload

# One run for each number that is fitted; all of one process.
FITTED = {
    "math_share": "qwen3.w1.t512.fp32",
    "call_s": "qwen3.w1.t1.fp32",
    "widen_s": "mixtral-4.w1.t16.bf16",
}
_RANGES = {"math_share": (0.3, 1.5), "call_s": (0.0, 5e-3), "widen_s": (0.0, 1e-8)}
_ROUNDS, _HALVINGS = 3, 14  # the numbers hardly depend on each other


def fit_host(records: Sequence[Record]) -> HostFit:
    """
    Raises:
        ValueError: a run that it takes is missing, or its routing comes out otherwise here.
    """
    named = {record.name: record for record in records}
    missing = sorted(set(FITTED.values()) - set(named))
    if missing:
        raise ValueError(f"no record of {', '.join(missing)}")
    fit = HostFit(math_share=0.9, call_s=0.0, widen_s=0.0)
    workloads = {name: workload_of(named[name]) for name in FITTED.values()}
    for _ in range(_ROUNDS):
        for number, name in FITTED.items():
            record, seconds = named[name], named[name].data["latency"]["p50"]

            def excess(value: float, number=number, record=record, name=name, seconds=seconds, fit=fit) -> float:
                return simulated_seconds(record, workloads[name], replace(fit, **{number: value})) - seconds

            fit = replace(fit, **{number: _zero(excess, *_RANGES[number])})
    return fit


def compare(records: Sequence[Record], fit: HostFit) -> list[dict[str, Any]]:
    """Each run beside its simulation, in the order of the records; one whose routing cannot be made again says why."""
    compared = []
    for record in records:
        entry: dict[str, Any] = {"name": record.name, "fitted": record.name in FITTED.values()}
        try:
            workload = workload_of(record)
        except ValueError as error:
            compared.append(entry | {"skipped": str(error)})
            continue
        compared.append(entry | _comparison(record, workload, fit))
    return compared


def _comparison(record: Record, workload: Workload, fit: HostFit) -> dict[str, Any]:
    latency, run, simulated = record.data["latency"], record.data["run"], simulated_seconds(record, workload, fit)
    return {
        "model": shape_of(record).name,
        "scale": shape_of(record).scale,
        "ranks": run["ranks"],
        "tokens": run["tokens"],
        "dtype": run["dtype"],
        "measured_s": latency["p50"],
        "quartiles_s": latency["quartiles"],
        "simulated_s": simulated,
        "error": simulated / latency["p50"] - 1,
    }


def _zero(f: Callable[[float], float], low: float, high: float) -> float:
    """Where a monotonic function is zero, or the end of the range that is nearest to it."""
    at_low, at_high = f(low), f(high)
    if at_low * at_high > 0:
        return low if abs(at_low) < abs(at_high) else high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        at_middle = f(middle)
        if at_low * at_middle > 0:
            low, at_low = middle, at_middle
        else:
            high = middle
    return (low + high) / 2
