"""``flashmoe bench layer``: one layer over many configurations, each checked, timed and compared in one table.

Under torchrun it runs in the world that is there, on any number of hosts; else it starts the ranks itself. One
configuration is one record, as of ``flashmoe run``, so `flashmoe report` draws them.
"""

import dataclasses
import gc
import itertools
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from . import baselines
from .models import LayerShape
from .records import Record
from .report import comparison, milliseconds, percent, table
from .run import check_memory, failure_of, finish, new_record, write
from .run_options import RunOptions
from .run_world import in_a_world, measure, processes_of_host, speaks

_HEAD = tuple("layer,pass,dtype,T,W,skew,p50,quartiles,GFLOP/s,compute,memory,link,against,faster by".split(","))
# The paper's own comparison (arXiv 2506.04667, section 4): every expert takes its equal share of tokens and no more.
PAPER_CAPACITY = 1.0


def configurations(
    base: RunOptions, shapes: Iterable[LayerShape], ranks: Iterable[int], dtypes: Iterable[str],
    tokens: Iterable[int], skews: Iterable[str], passes: Iterable[str], cores: int,
) -> Iterator[RunOptions]:  # fmt: skip
    """Every combination; all shapes are measured before the next ranks, dtype, tokens, skew, pass, in the order given:
    should the time not do for all, the most valuable come first. The ``cores`` of a host are shared out among its
    ranks."""
    lists = passes, skews, tokens, dtypes, ranks, shapes
    for each_pass, skew, num_tokens, dtype, num_ranks, shape in itertools.product(*lists):
        threads = max(1, cores // processes_of_host(num_ranks))
        yield dataclasses.replace(
            base, shape=shape, ranks=num_ranks, dtype=dtype, tokens=num_tokens, skew=skew, threads=threads,
            passes=each_pass,
            usable_threads=max(cores, threads), started=time.time(),
            baselines=tuple(baselines.of_ranks(num_ranks, base.baselines)),
        )  # fmt: skip


def bench(wanted: list[RunOptions], out: Path | None, command: list[str], seconds: float) -> int:
    """Measure all of them, one after the other; print a line each, and write a record each into ``out``.

    A configuration that fails costs only itself; none is begun after ``seconds``. Returns the exit code, 1 if any
    failed.
    """
    began, done, rows, failures = time.monotonic(), 0, [_HEAD], []
    while done < len(wanted) and not _told(time.monotonic() - began > seconds):
        options, done = wanted[done], done + 1
        name = name_of(options)
        if speaks():
            print(f"[{done}/{len(wanted)}] {name}", flush=True)
        record = _record_of(options, command)
        if not speaks():
            continue
        if record["failure"] is None:
            floor = f"floor {milliseconds(record['floor']['seconds'])}"
            if ours := record.get("latency"):
                share = f"{percent(record['floor']['share_of_speed'])} of the floor's speed"
                print(f"flashmoe  p50 {milliseconds(ours['p50'])}, {ours['gflops']:.1f} GFLOP/s, {share}; {floor}")
            else:
                print(floor)
            print(comparison(record), flush=True)
            rows.append(_line(Record(name, record), options.skew))
        else:
            failures.append(f"FAILED {name}: {record['failure']}")
            print(failures[-1], flush=True)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            write(record, out / f"{name}.json")
    if speaks():
        print("\n" + table(rows) + "\n")
        if any("*" in cell for row in rows for cell in row):
            print("*: the experts' weights stay in the GPU's L2 cache from call to call; rows do not\n")
        if done < len(wanted):
            print(f"after {seconds:g} s not begun: {', '.join(map(name_of, wanted[done:]))}")
        print("\n".join(failures) if failures else f"OK {done} configurations", flush=True)
    return 1 if failures else 0


def name_of(options: RunOptions) -> str:
    """Of a record's file."""
    shape = options.shape
    layer = shape.name + (f"-{shape.scale}" if shape.scale > 1 else "")
    parts = [layer, f"w{options.ranks}", f"t{options.tokens}", options.dtype]
    if options.skew != "router":
        parts.append(options.skew)
    if options.capacity_factor is not None:
        parts.append(f"capacity{options.capacity_factor:g}")
    if options.graph:
        parts.append("graph")
    if options.backward:
        parts.append("backward")
    return ".".join(parts)


def _told(value: bool) -> bool:
    """What rank 0 says, where a launcher's ranks must go on together."""
    values = [value]
    if in_a_world() and dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def _record_of(options: RunOptions, command: list[str]) -> dict[str, Any]:
    """Of one configuration, on the rank that speaks; says how it ended."""
    record = new_record(options, command)
    try:
        check_memory(options)
        measured = measure(options)
        if measured is not None:
            record |= measured
            record["failure"] = failure_of(record["error"])
    except Exception as error:
        if in_a_world():
            raise  # the ranks would part
        traceback.print_exc()
        record["failure"] = f"{type(error).__name__}: {error}"
    finish(record, options)
    if options.device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()  # virtual ranks and other libraries allocate for themselves
    return record


def _in_cache(record: dict[str, Any]) -> bool:
    return record["floor"]["weight_bytes_touched"] <= record["machine"].get("gpu_l2_bytes", 0)


def _line(record: Record, skew: str) -> tuple[str, ...]:
    """One row of the table: shares of the time that the work would need of each resource alone. Where the layer has no
    time of its own, the shares are of the fastest rival's."""
    data, rival = record.data, record.rival()
    floor, link = data["floor"], data.get("link")
    what = record.layer, record.passes, record.dtype, str(record.tokens), str(record.ranks), skew
    latency = data.get("latency")
    timed = latency or rival
    if timed is None:
        return *what, "no backward", *["–"] * (len(_HEAD) - len(what) - 1)
    low, high = timed["quartiles"]
    times = milliseconds(timed["p50"]), f"{milliseconds(low)} – {milliseconds(high)}", f"{timed['gflops']:.1f}"
    if not latency:
        times = f"no backward; {rival['name']} {times[0]}", *times[1:]
    return (
        *what, *times, percent(floor["compute_seconds"] / timed["p50"]),
        percent(floor["read_seconds"] / timed["p50"]) + "*" * _in_cache(data),
        percent(link["seconds"] / timed["p50"]) if link else "–", rival["name"] if rival else "–",
        "{:.2f} × ({:.2f} – {:.2f})".format(rival["ratio"], *rival["ratio_quartiles"]) if latency and rival else "–",
    )  # fmt: skip
