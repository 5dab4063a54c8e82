"""The records of measurements: what ``flashmoe run --json`` writes, and the README's table drawn from them."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .baselines import ONE_PROCESS, is_rival

_NUMBER = {"type": "number"}
_COUNT = {"type": "integer", "minimum": 0}
_TEXT = {"type": "string", "minLength": 1}
_MAYBE_TEXT = {"type": ["string", "null"]}
_DTYPES = ("fp32", "tf32", "bf16", "fp16")  # in the order of the tables
_QUARTILES = {"type": "array", "items": _NUMBER, "minItems": 2, "maxItems": 2}


def _object(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {"type": "object", "properties": required | optional, "required": list(required)}


_LATENCY = _object(
    {"p50": {"type": "number", "exclusiveMinimum": 0}, "p95": _NUMBER, "quartiles": _QUARTILES, "samples": _COUNT,
     "gflops": _NUMBER}
)  # fmt: skip
_SKIPPED = _object({"name": _TEXT, "skipped": _TEXT})
_COMPARED = _object({
    "name": _TEXT, "ratio": _NUMBER, "ratio_quartiles": _QUARTILES, **_LATENCY["properties"],
}, relative_error=_NUMBER)  # fmt: skip
_TRAFFIC = {"type": "array", "items": {"type": ["object", "null"], "additionalProperties": {"type": "array", "items": _COUNT}}}

# JSON Schema 2020-12 of a record that ended well; seconds, bytes, and ratios unless a name says otherwise.
RUN_SCHEMA: dict[str, Any] = _object({
    "schema": {"const": 1},
    "ok": {"const": True},
    "failure": {"type": "null"},
    "command": {"type": "array", "items": _TEXT, "minItems": 2},
    "started": {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d"},
    "versions": _object({"flashmoe": _TEXT, "commit": _MAYBE_TEXT, "torch": _TEXT, "python": _TEXT,
                         "transformers": _MAYBE_TEXT}),
    "machine": _object({"processor": _TEXT, "architecture": _TEXT, "isa": _TEXT, "cores": _COUNT,
                        "usable_cores": _COUNT, "memory_bytes": _COUNT, "system": _TEXT}),
    "shape": _object({"name": _TEXT, "hidden_size": _COUNT, "intermediate_size": _COUNT, "num_experts": _COUNT,
                      "top_k": _COUNT, "router": _TEXT, "source": _TEXT, "activation": _TEXT,
                      "gated": {"type": "boolean"}, "scale": _COUNT}),
    "run": _object({"ranks": _COUNT, "tokens": _COUNT, "dtype": {"enum": list(_DTYPES)},
                    "input": {"enum": ["text", "random"]}, "threads": _COUNT, "seed": _COUNT, "iterations": _COUNT,
                    "warmup": _COUNT, "seconds": _NUMBER, "transport": _TEXT}),
    "routing": _object({"rows": _COUNT, "experts_used": _COUNT, "busiest_expert": _NUMBER, "busiest_rank": _NUMBER}),
    "error": _object({"max": _NUMBER, "relative": _NUMBER, "bound": _NUMBER, "finite": {"const": True},
                      "bitwise_repeat": {"const": True}}),
    "bytes_per_peer": _TRAFFIC,
    "rates": _object({"threads": _COUNT, "gemm_gflops": _NUMBER, "read_gb_s": _NUMBER}),
    "latency": _LATENCY,
    "baselines": {"type": "array", "items": {"anyOf": [_COMPARED, _SKIPPED]}},
    "flops": _COUNT,
    "floor": _object({"seconds": _NUMBER, "compute_seconds": _NUMBER, "read_seconds": _NUMBER,
                      "weight_bytes_touched": _COUNT, "share_of_speed": _NUMBER,
                      "share_of_speed_quartiles": _QUARTILES}),
    "elapsed_seconds": _NUMBER,
}, latency_with_router=_LATENCY, link=_object({"bytes": _COUNT, "gb_s": _NUMBER, "seconds": _NUMBER}),
   clock=_TEXT,
   bytes=_object({"weights": _COUNT, "x": _COUNT, "y": _COUNT, "between": _COUNT,
                  "sent": {"type": ["integer", "null"], "minimum": 0}}),
   timeline=_object({"seconds": _NUMBER, "workers": _COUNT, "utilization": _NUMBER, "tiles": _NUMBER,
                     "exposed": _NUMBER, "tail": _NUMBER, "lost_events": _COUNT}))  # fmt: skip


@dataclass(frozen=True)
class Record:
    """One run. ``data`` is as RUN_SCHEMA says."""

    name: str
    data: dict[str, Any]

    @property
    def layer(self) -> str:
        shape = self.data["shape"]
        return shape["name"] + (f" / {shape['scale']}" if shape["scale"] > 1 else "")

    @property
    def dtype(self) -> str:
        return self.data["run"]["dtype"]

    @property
    def tokens(self) -> int:
        """Of one rank."""
        return self.data["run"]["tokens"]

    @property
    def ranks(self) -> int:
        return self.data["run"]["ranks"]

    @property
    def order(self) -> tuple:
        return (self.ranks, _DTYPES.index(self.dtype), self.tokens, self.layer)

    def compared(self, name: str) -> dict[str, Any] | None:
        """What the run says of one baseline; None if that took no part."""
        return next((one for one in self.data["baselines"] if one["name"] == name and "ratio" in one), None)

    def rival(self) -> dict[str, Any] | None:
        """The fastest of what one would use instead."""
        timed = [one for one in self.data["baselines"] if "ratio" in one and is_rival(one["name"])]
        return min(timed, key=lambda one: one["p50"], default=None)

    def one_process(self) -> dict[str, Any] | None:
        """The same tokens and threads in one process, if the run had several."""
        return self.compared(ONE_PROCESS)


def read_records(folder: Path) -> list[Record]:
    """Every ``*.json`` of a folder that is a record of ``flashmoe run``, in the order of the tables.

    Raises:
        ValueError: the folder has none, or one does not follow its schema; says which, where, and what is wrong.
    """
    from jsonschema import Draft202012Validator

    validator, records = Draft202012Validator(RUN_SCHEMA), []
    for path in sorted(folder.glob("*.json")):
        try:
            data = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if isinstance(data, dict) and data.get("schema") != RUN_SCHEMA["properties"]["schema"]["const"]:
            continue  # of another kind of measurement
        error = next(validator.iter_errors(data), None)
        if error is not None:
            raise ValueError(f"{path}: {error.json_path}: {error.message}")
        records.append(Record(path.stem, data))
    if not records:
        raise ValueError(f"{folder} holds no record of `flashmoe run --json`")
    return sorted(records, key=lambda record: record.order)


def markdown_table(records: Iterable[Record]) -> str:
    """The README's table: one line a record, shares and ratios with their quartiles."""
    lines = ["| layer | T · W | share of the floor's speed | against | faster by |", "|---|---|---|---|---|"]
    for record in records:
        floor, rival = record.data["floor"], record.rival()
        low, high = (f"{100 * share:.0f}" for share in floor["share_of_speed_quartiles"])
        faster = "{:.2f} × ({:.2f} – {:.2f})".format(rival["ratio"], *rival["ratio_quartiles"]) if rival else ""
        lines.append(
            f"| {record.layer}, {record.dtype} | {record.tokens} · {record.ranks} | "
            f"{100 * floor['share_of_speed']:.0f} % ({low} – {high}) | {rival['name'] if rival else ''} | {faster} |"
        )
    return "\n".join(lines)
