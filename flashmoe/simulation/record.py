"""The record of ``flashmoe bench scale``: its schema. A study that was not asked for is not there."""

from typing import Any

from ..schema import (
    COMMAND, COUNT, FLAG, MACHINE, MAYBE_TEXT, NOT_NEGATIVE, NUMBER, POSITIVE, QUARTILES, STARTED, TEXT, VERSIONS,
    list_of, map_of, object_of,
)  # fmt: skip

KIND = "scale-1"

_SHARE = {"type": "number", "minimum": 0, "maximum": 1}
_MAYBE_COUNT = {"type": ["integer", "null"], "minimum": 1}
_MAYBE_NUMBER = {"type": ["number", "null"]}

_RUN = object_of({"name": TEXT, "fitted": FLAG, "model": TEXT, "scale": COUNT, "ranks": COUNT, "tokens": COUNT,
                  "dtype": TEXT, "measured_s": POSITIVE, "quartiles_s": QUARTILES, "simulated_s": POSITIVE,
                  "error": NUMBER})  # fmt: skip
_SKIPPED_RUN = object_of({"name": TEXT, "fitted": FLAG, "skipped": TEXT})
_FIT = ("math_share", "call_s", "widen_s")

_WIRE = object_of({"bytes_per_s": POSITIVE, "latency_s": NOT_NEGATIVE, "put_s": NOT_NEGATIVE, "staged": FLAG})
_DEVICE = object_of({
    "name": TEXT, "source": TEXT, "workers": COUNT, "near": _WIRE, "far": _WIRE, "ring_blocks": COUNT,
    "ranks_per_node": COUNT, "has_agents": FLAG, "cores": _MAYBE_COUNT, "senders": _MAYBE_COUNT,
    "memory_bytes": POSITIVE, "cache_read": _MAYBE_NUMBER, "worker_cache_read": _MAYBE_NUMBER,
    **dict.fromkeys(("math_flops", "memory_read", "worker_read", "cache_bytes", "copy", "add"), POSITIVE),
    **dict.fromkeys(
        ("tile_s", "widen_s", "plan_s", "plan_pair_s", "plan_peer_s", "header_s", "notice_s"), NOT_NEGATIVE
    ),
})  # fmt: skip

_SPEED = {
    "engine": TEXT, "seconds": POSITIVE, "seconds_with_free_wires": POSITIVE, "exposed_seconds": NOT_NEGATIVE,
    "hidden_share": _SHARE, "utilisation": _SHARE, "flops_per_gpu": POSITIVE, "tokens_per_s": POSITIVE,
}  # fmt: skip
_ANSWER = object_of({
    "model": TEXT, "experts": COUNT, "machine": TEXT, "senders": _MAYBE_COUNT, "dtype": TEXT,
    "capacity_factor": _MAYBE_NUMBER, "gpus": COUNT, "ep_size": COUNT, "followed": COUNT, "tokens": COUNT, "skew": TEXT,
    "slow": POSITIVE, "late_s": NOT_NEGATIVE, **_SPEED, "wire_seconds": NOT_NEGATIVE, "busiest_rank": POSITIVE,
    "busy_seconds": map_of(NOT_NEGATIVE),
    "memory_bytes": object_of(dict.fromkeys(("heap", "staging", "weights", "rest", "total"), COUNT)),
})  # fmt: skip
_REJECTED = object_of({"model": TEXT, "tokens": COUNT, "gpus": COUNT, "ep_size": COUNT, "rejected": TEXT})
# By what it has and not by `anyOf`, so that a broken answer is told by the number that is missing.
_ANSWERS = list_of({"if": {"required": ["rejected"]}, "then": _REJECTED, "else": _ANSWER})

_EFFICIENCY = object_of(dict.fromkeys(("published", "tf32_capacity_1", "bf16_dropless"), POSITIVE))
_POINT = object_of({
    "experiment": TEXT, "gpus": COUNT, "tokens": COUNT, "experts": COUNT, "read_off": FLAG, "published_s": POSITIVE,
    "baselines_s": map_of(POSITIVE), "tf32_capacity_1": object_of(_SPEED), "bf16_dropless": object_of(_SPEED),
}, overlap_efficiency=_EFFICIENCY)  # fmt: skip
_FOLLOWED = object_of({"model": TEXT, "gpus": COUNT, "tokens": COUNT, "follow": COUNT, "seconds": POSITIVE,
                       "seconds_of_all": POSITIVE, "error": NUMBER})  # fmt: skip

# Seconds, bytes, FLOPs a second, and shares unless a name says otherwise.
SCHEMA: dict[str, Any] = object_of({
    "schema": {"const": KIND}, "command": COMMAND, "started": STARTED, "versions": VERSIONS, "machine": MACHINE,
    "elapsed_seconds": NOT_NEGATIVE,
}, validation=object_of({
    "fit": object_of(dict.fromkeys(_FIT, NUMBER)), "fitted_to": object_of(dict.fromkeys(_FIT, TEXT)),
    "runs": list_of({"if": {"required": ["skipped"]}, "then": _SKIPPED_RUN, "else": _RUN}),
}), machines=map_of(_DEVICE), paper=list_of(_POINT), following_fewer=list_of(_FOLLOWED), gpus=_ANSWERS,
    uneven=_ANSWERS, fewer_senders=_ANSWERS)  # fmt: skip
