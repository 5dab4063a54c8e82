"""The record of ``flashmoe bench micro``: pytest-benchmark's JSON, as far as it is relied on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .schema import (
    COMMAND, COUNT, FLAG, MACHINE, NOT_NEGATIVE, POSITIVE, STARTED, TEXT, VERSIONS, check, list_of, map_of, object_of,
)  # fmt: skip

KIND = "micro-1"
AMOUNTS = ("bytes", "flops", "items")  # of one operation

_VALUE = {"type": ["string", "integer", "number", "boolean"]}
_BENCHMARK = object_of({
    "name": {"type": "string", "pattern": r"^test_\w+(\[.+\])?$"},
    "group": {"type": "string", "pattern": r"^bench_\w+$"},
    "params": {"anyOf": [map_of(_VALUE), {"type": "null"}]},
    "extra_info": object_of({"operations_of_a_round": COUNT}, **{
        name: NOT_NEGATIVE for amount in AMOUNTS for name in (amount, f"{amount}_per_s")
    }),
    "stats": object_of({**dict.fromkeys(("min", "q1", "median", "q3", "max"), POSITIVE), "rounds": COUNT}),
})  # fmt: skip

# Seconds of one operation; and by the median what one moves, computes or handles a second.
SCHEMA: dict[str, Any] = object_of({
    "schema": {"const": KIND},
    "datetime": STARTED,
    "flashmoe": object_of({"versions": VERSIONS, "machine": MACHINE, "command": COMMAND, "torch_threads": COUNT,
                           "thorough": FLAG}),
    "benchmarks": list_of(_BENCHMARK, at_least=1),
})  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """One part of a call, measured by itself.

    Attributes:
        what: the benchmark's function, without its test_.
        group: its file, without its bench_.
        parameters: by name.
        median, quartiles: seconds of one.
        amounts: what one moves, computes or handles: bytes, flops, items.
    """

    what: str
    group: str
    parameters: dict[str, Any]
    median: float
    quartiles: tuple[float, float]
    amounts: dict[str, float]

    @property
    def rates(self) -> dict[str, float]:
        """Amounts a second, by the median."""
        return {amount: count / self.median for amount, count in self.amounts.items()}

    @property
    def name(self) -> str:
        values = ", ".join(
            str(value) if isinstance(value, str) else f"{name} {value}" for name, value in self.parameters.items()
        )
        return self.what.replace("_", " ") + (f": {values}" if values else "")


@dataclass(frozen=True)
class MicroRecord:
    """One run of the benchmarks. ``data`` is as SCHEMA says."""

    name: str
    data: dict[str, Any]

    @property
    def operations(self) -> list[Operation]:
        return [_operation(one) for one in self.data["benchmarks"]]

    def chosen(self, what: str, **parameters: Any) -> list[Operation]:
        """Those of one benchmark with these parameters, in the record's order."""
        return [
            one for one in self.operations
            if one.what == what and parameters.items() <= one.parameters.items()
        ]  # fmt: skip


def micro_record(path: Path, data: Any) -> MicroRecord:
    """
    Raises:
        ValueError: it does not follow SCHEMA; says where, and what is wrong.
    """
    check(path, data, SCHEMA)
    return MicroRecord(path.stem, data)


def _operation(one: dict[str, Any]) -> Operation:
    stats, info = one["stats"], one["extra_info"]
    return Operation(
        what=one["name"].partition("[")[0].removeprefix("test_"),
        group=one["group"].removeprefix("bench_"),
        parameters=one["params"] or {},
        median=stats["median"],
        quartiles=(stats["q1"], stats["q3"]),
        amounts={amount: info[amount] for amount in AMOUNTS if info.get(amount)},
    )
