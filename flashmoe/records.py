"""The records of the layer: what ``flashmoe run --json`` and ``flashmoe bench layer --out`` write."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .baselines import CEILING, ONE_PROCESS, OURS, is_rival
from .run_options import PASSES
from .schema import (
    COMMAND, COUNT, FLAG, MACHINE, NUMBER, POSITIVE, QUARTILES, STARTED, TEXT, VERSIONS, check, kind_of, list_of,
    object_of, read_json,
)  # fmt: skip

_DTYPES = ("fp32", "tf32", "bf16", "fp16")  # in the order of the tables
_LATENCY = object_of({"p50": POSITIVE, "p95": NUMBER, "quartiles": QUARTILES, "samples": COUNT, "gflops": NUMBER})
_SKIPPED = object_of({"name": TEXT, "skipped": TEXT})
_GRADIENTS = object_of(dict.fromkeys(("x", "topk_weights", "gate_up_proj", "down_proj"), NUMBER))
_TIMED = object_of({"name": TEXT, **_LATENCY["properties"]}, relative_error=NUMBER, gradient_errors=_GRADIENTS)
_JUDGED = object_of(dict.fromkeys(_GRADIENTS["properties"], object_of({"relative": NUMBER, "bound": NUMBER})))
_TRAFFIC = list_of({"type": "object", "additionalProperties": list_of(COUNT)})

# What a record says of the layer itself: its times and how they compare, or why the backward pass of it is not timed.
_MEASURED = {"properties": {
    "baselines": list_of({"anyOf": [object_of({"ratio": NUMBER, "ratio_quartiles": QUARTILES}), _SKIPPED]}),
    "floor": object_of({"share_of_speed": NUMBER, "share_of_speed_quartiles": QUARTILES}),
}}  # fmt: skip
_NO_BACKWARD = {"properties": {
    "run": object_of({"passes": {"const": "backward"}}),
    "baselines": {"contains": object_of({"name": {"const": OURS}, "skipped": TEXT})},
}}  # fmt: skip
_BACKWARD = object_of({
    "timed": TEXT,
    "flops_by_product": object_of(dict.fromkeys(("forward", "row_gradients", "weight_gradients"), COUNT)),
    "bytes": object_of(dict.fromkeys(("weight_gradients", "grad_x", "grad_y"), COUNT)),
    "gradient_check": object_of({"bounds": _GRADIENTS, "tokens": COUNT, "experts": list_of(COUNT, at_least=1)}),
    "baselines": list_of({"anyOf": [_SKIPPED, object_of({"gradient_errors": _GRADIENTS}),
                                    object_of({"name": {"const": CEILING}})]}),
})  # fmt: skip

RUN_KIND = 1
# JSON Schema 2020-12 of a record that ended well; seconds, bytes, and ratios unless a name says otherwise.
RUN_SCHEMA: dict[str, Any] = object_of({
    "schema": {"const": RUN_KIND},
    "ok": {"const": True},
    "failure": {"type": "null"},
    "command": COMMAND,
    "started": STARTED,
    "versions": VERSIONS,
    "machine": MACHINE,
    "shape": object_of({"name": TEXT, "hidden_size": COUNT, "intermediate_size": COUNT, "num_experts": COUNT,
                        "top_k": COUNT, "router": TEXT, "source": TEXT, "activation": TEXT,
                        "gated": FLAG, "scale": COUNT}),
    "run": object_of({"ranks": COUNT, "tokens": COUNT, "dtype": {"enum": list(_DTYPES)},
                      "input": {"enum": ["text", "random"]}, "threads": COUNT, "seed": COUNT, "iterations": COUNT,
                      "warmup": COUNT, "seconds": NUMBER, "transport": TEXT}, passes={"enum": list(PASSES)}),
    "routing": object_of({"rows": COUNT, "experts_used": COUNT, "busiest_expert": NUMBER, "busiest_rank": NUMBER}),
    "error": object_of({"max": NUMBER, "relative": NUMBER, "bound": NUMBER, "finite": {"const": True},
                        "bitwise_repeat": {"const": True}},
                       gradients=_JUDGED),
    "bytes_per_peer": _TRAFFIC,
    "rates": object_of({"threads": COUNT, "gemm_gflops": NUMBER, "read_gb_s": NUMBER}),
    "baselines": list_of({"anyOf": [_TIMED, _SKIPPED]}),
    "flops": COUNT,
    "floor": object_of({"seconds": NUMBER, "compute_seconds": NUMBER, "read_seconds": NUMBER,
                        "weight_bytes_touched": COUNT}),
    "elapsed_seconds": NUMBER,
}, latency=_LATENCY, latency_with_router=_LATENCY, link=object_of({"bytes": COUNT, "gb_s": NUMBER, "seconds": NUMBER}),
   clock=TEXT,
   bytes=object_of({"weights": COUNT, "x": COUNT, "y": COUNT, "between": COUNT, "sent": COUNT}),
   timeline=object_of({"seconds": NUMBER, "workers": COUNT, "utilization": NUMBER, "tiles": NUMBER,
                       "exposed": NUMBER, "tail": NUMBER, "lost_events": COUNT},
                      overlap={"type": ["number", "null"]}, clock_step=NUMBER,
                      clock_error={"type": ["number", "null"]}, cost=POSITIVE, cost_quartiles=QUARTILES)) | {"allOf": [
    {"if": {"required": ["latency"]}, "then": _MEASURED, "else": _NO_BACKWARD},
    {"if": {"properties": {"run": object_of({"passes": {"const": "backward"}})}}, "then": _BACKWARD},
]}  # fmt: skip


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
    def passes(self) -> str:
        """forward, or backward where a call is both."""
        return self.data["run"].get("passes", PASSES[0])

    @property
    def order(self) -> tuple:
        return (PASSES.index(self.passes), self.ranks, _DTYPES.index(self.dtype), self.tokens, self.layer)

    def compared(self, name: str) -> dict[str, Any] | None:
        """What the run says of one baseline; None if that took no part."""
        return next((one for one in self.data["baselines"] if one["name"] == name and "skipped" not in one), None)

    def rival(self) -> dict[str, Any] | None:
        """The fastest of what one would use instead."""
        timed = [one for one in self.data["baselines"] if "skipped" not in one and is_rival(one["name"])]
        return min(timed, key=lambda one: one["p50"], default=None)

    def one_process(self) -> dict[str, Any] | None:
        """The same tokens and threads in one process, if the run had several."""
        return self.compared(ONE_PROCESS)


def run_record(path: Path, data: Any) -> Record:
    """
    Raises:
        ValueError: it does not follow RUN_SCHEMA; says where, and what is wrong.
    """
    check(path, data, RUN_SCHEMA)
    return Record(path.stem, data)


def read_records(folder: Path) -> list[Record]:
    """Every ``*.json`` of a folder that is a record of ``flashmoe run``, in the order of the tables.

    Raises:
        ValueError: the folder has none, or one does not follow its schema; says which, where, and what is wrong.
    """
    records = [
        run_record(path, data) for path in sorted(folder.glob("*.json")) if kind_of(data := read_json(path)) == RUN_KIND
    ]
    if not records:
        raise ValueError(f"{folder} holds no record of `flashmoe run --json`")
    return sorted(records, key=lambda record: record.order)
