"""``flashmoe run``: one named MoE layer on all ranks, checked, timed and compared; a record and an exit code."""

import dataclasses
import json
import math
import time
import traceback
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from . import report, run_world
from ._C import available_memory
from .info import machine, versions
from .models import LayerShape
from .run_options import RunOptions
from .settings import Settings, settings_of_environment

_PROCESS_BYTES = 400 << 20  # Python, torch, transformers and the buffers of the measurement itself


class NotEnoughMemory(RuntimeError):
    """The run would not fit into this machine's memory."""


def run(options: RunOptions, json_file: str | None, command: list[str]) -> int:
    """Run, print, write ``json_file``; return the exit code. Of a launcher's processes one does all but run."""
    record = new_record(options, command)
    if run_world.speaks():
        print(report.head(record), flush=True)
    try:
        check_memory(options)
        measured = run_world.measure(options)
        if measured is None:
            return 0
        record |= measured
        print("\n" + report.body(record) + "\n", flush=True)
        record["failure"] = failure_of(record["error"])
    except Exception as error:
        if run_world.in_a_world():
            raise  # the ranks would part
        if isinstance(error, NotEnoughMemory):
            record["failure"] = str(error)
        else:
            traceback.print_exc()
            record["failure"] = f"{type(error).__name__}: {error}"
    finish(record, options)
    if json_file is not None:
        try:
            write(record, Path(json_file))
        except OSError as error:
            record["ok"], record["failure"] = False, f"cannot write {json_file}: {error.strerror}"
    print(report.verdict(record) if record["ok"] else f"FAILED {record['failure']}", flush=True)
    return 0 if record["ok"] else 1


def new_record(options: RunOptions, command: list[str]) -> dict[str, Any]:
    """What is known before anything is measured."""
    asked = ("ranks", "tokens", "dtype", "input", "threads", "seed", "iterations", "warmup", "seconds", "remote_only",
             "skew", "capacity_factor", "inputs", "device", "graph", "virtual", "passes")  # fmt: skip
    return {
        "schema": 1,
        "ok": False,
        "failure": None,
        "command": command,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": machine() | (_gpu() if options.device == "cuda" else {}),
        "shape": dataclasses.asdict(options.shape),
        "run": {name: getattr(options, name) for name in asked} | {"transport": _transport(options)},
    }


def finish(record: dict[str, Any], options: RunOptions) -> None:
    """Says how it ended."""
    record["ok"] = record["failure"] is None
    record["elapsed_seconds"] = time.time() - options.started


def write(record: dict[str, Any], path: Path) -> None:
    """As JSON.

    Raises:
        OSError: the file cannot be written.
    """
    path.write_text(json.dumps(_finite(record), indent=1, allow_nan=False) + "\n")


def failure_of(error: dict[str, Any]) -> str | None:
    """Why a result with these errors is not to be trusted, or None."""
    place = f"rank {error['worst']['rank']}, token {error['worst']['token']}"
    if not error["finite"]:
        return "the result is not finite"
    if not error["relative"] <= error["bound"]:
        return f"relative error {error['relative']:.2e} is above its bound {error['bound']:.2e} ({place})"
    for name, one in error.get("gradients", {}).items():
        if not one["relative"] <= one["bound"]:
            return f"relative error {one['relative']:.2e} of {name}'s gradient is above its bound {one['bound']:.2e}"
    if not error["bitwise_repeat"]:
        return "a second call with the same inputs gave other bits"
    return None


def bytes_needed(options: RunOptions, shape: LayerShape) -> int:
    """About how much memory the run takes on this machine: weights, symmetric memory, rows and the processes."""
    itemsize, tokens = options.torch_dtype.itemsize, options.tokens
    # Rank 0 also holds the experts of the others, for the reference and for the run in one process.
    copies = 2 - 1 / options.ranks
    weights = int(copies * shape.num_experts * shape.expert_elements * itemsize)
    if options.backward:  # gradients of one contender, and what its backward pass makes them of
        weights += 2 * shape.num_experts * shape.expert_elements * itemsize
    reference = 8 * shape.expert_elements * (3 if options.backward else 1)
    symmetric = 0
    if options.ranks > 1:
        symmetric = options.ranks * Settings(**run_world.arena_sizes(options, shape)).arena_bytes(options.ranks)
    rows = options.ranks * tokens * shape.top_k * (2 * shape.hidden_size + 2 * shape.up_rows) * max(itemsize, 4)
    return weights + reference + symmetric + rows + options.ranks * _PROCESS_BYTES


def check_memory(options: RunOptions) -> None:
    """Before anything is built.

    Raises:
        NotEnoughMemory: says what is needed, what is there, and which scale would fit.
    """
    needed, there = bytes_needed(options, options.shape), available_memory()
    if needed <= there or options.device != "cpu":  # of a GPU torch tells, by name
        return
    shape = options.shape
    common = math.gcd(shape.hidden_size, shape.intermediate_size)
    fitting = next(
        (scale for scale in range(2, common // 16 + 1)
         if common % scale == 0 and bytes_needed(options, shape.scaled(scale)) <= there), None
    )  # fmt: skip
    advice = "take fewer tokens or ranks" if fitting is None else f"--scale {fitting * shape.scale} fits"
    raise NotEnoughMemory(
        f"not enough memory: {shape.name} at scale {shape.scale} in {options.dtype} with {options.ranks} ranks needs "
        f"about {needed / 2**30:.1f} GiB, {there / 2**30:.1f} GiB are left; {advice}"
    )


def _gpu() -> dict[str, Any]:
    return {"gpu": torch.cuda.get_device_name(), "gpu_l2_bytes": torch.cuda.get_device_properties().L2_cache_size}


def _transport(options: RunOptions) -> str:
    if options.ranks == 1:
        return "one process"
    if options.virtual:
        return "memory of one GPU, which virtual ranks share"
    if options.device == "cuda":
        return "NVSHMEM"
    if options.remote_only is None:
        return "UCX" if settings_of_environment().transport == "ucx" else "shared memory"
    return f"delayed and reordered puts (seed {options.remote_only})"


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
