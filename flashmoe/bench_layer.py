"""``flashmoe bench layer``: one layer over many configurations, each checked, timed and compared in one table.

Under torchrun it runs in the world that is there, on any number of hosts; else it starts the ranks itself. One
configuration is one record, as of ``flashmoe run``, so `flashmoe report` draws them.
"""

import dataclasses
import itertools
import os
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from . import baselines, distributed
from .launch import launch
from .models import LayerShape
from .records import Record
from .report import milliseconds, percent, table
from .run import arena_sizes, check_memory, failure_of, finish, new_record, write
from .run_options import RunOptions
from .run_rank import run_rank

_HEAD = tuple("layer,dtype,T,W,skew,p50,quartiles,GFLOP/s,compute,memory,link,against,faster by".split(","))
# The paper's own comparison (arXiv 2506.04667, section 4): every expert takes its equal share of tokens and no more.
PAPER_CAPACITY = 1.0


def in_a_world() -> bool:
    """Whether a launcher has started this process as one of several ranks."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def configurations(
    base: RunOptions, shapes: Iterable[LayerShape], ranks: Iterable[int], dtypes: Iterable[str],
    tokens: Iterable[int], skews: Iterable[str], cores: int,
) -> Iterator[RunOptions]:  # fmt: skip
    """Every combination; shapes change slowest. The ``cores`` of a host are shared out among its ranks."""
    for shape, num_ranks, dtype, num_tokens, skew in itertools.product(shapes, ranks, dtypes, tokens, skews):
        threads = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE") or num_ranks))
        possible = baselines.of_ranks(num_ranks)
        yield dataclasses.replace(
            base, shape=shape, ranks=num_ranks, dtype=dtype, tokens=num_tokens, skew=skew, threads=threads,
            usable_threads=max(cores, threads), started=time.time(),
            baselines=tuple(name for name in base.baselines if name in possible),
        )  # fmt: skip


def bench(wanted: list[RunOptions], out: Path | None, command: list[str]) -> int:
    """Measure all of them, one after the other; print a line each, and write a record each into ``out``.

    A configuration that fails costs only itself. Returns the exit code, 1 if any failed.
    """
    speaks = not in_a_world() or int(os.environ["RANK"]) == 0
    rows, failures = [_HEAD], []
    for number, options in enumerate(wanted, 1):
        name = name_of(options)
        if speaks:
            print(f"[{number}/{len(wanted)}] {name}", flush=True)
        record = new_record(options, command)
        try:
            check_memory(options)
            measured = _measure(options)
            if not speaks:
                continue
            record |= measured
            record["failure"] = failure_of(record["error"])
        except Exception as error:
            if in_a_world():
                raise  # the ranks would part
            traceback.print_exc()
            record["failure"] = f"{type(error).__name__}: {error}"
        finish(record, options)
        if record["failure"] is None:
            rows.append(_line(Record(name, record), options.skew))
        else:
            failures.append(f"FAILED {name}: {record['failure']}")
            print(failures[-1], flush=True)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            write(record, out / f"{name}.json")
    if speaks:
        print("\n" + table(rows) + "\n")
        print("\n".join(failures) if failures else f"OK {len(wanted)} configurations", flush=True)
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
    return ".".join(parts)


def _measure(options: RunOptions) -> dict[str, Any] | None:
    if options.ranks == 1:
        return run_rank(options)
    sizes = arena_sizes(options, options.shape)
    how = {"num_workers": options.threads, "device": options.device}
    if not in_a_world():
        return launch(run_rank, options.ranks, options, init_kwargs=sizes | how)[0]
    # What an earlier configuration made may be too small, and its groups are in use.
    if distributed.is_initialized():
        distributed.reserve(**sizes)
    else:
        if options.device == "cuda" and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl")  # what is compared with exchanges by NCCL
        distributed.init(**sizes, **how)
    measured = run_rank(options)
    dist.barrier()
    return measured


def _line(record: Record, skew: str) -> tuple[str, ...]:
    """One row of the table: shares of the time that the work would need of each resource alone."""
    data, rival = record.data, record.rival()
    latency, floor, link = data["latency"], data["floor"], data.get("link")
    low, high = latency["quartiles"]
    return (
        record.layer, record.dtype, str(record.tokens), str(record.ranks), skew, milliseconds(latency["p50"]),
        f"{milliseconds(low)} – {milliseconds(high)}", f"{latency['gflops']:.1f}",
        percent(floor["compute_seconds"] / latency["p50"]), percent(floor["read_seconds"] / latency["p50"]),
        percent(link["seconds"] / latency["p50"]) if link else "–", rival["name"] if rival else "–",
        "{:.2f} × ({:.2f} – {:.2f})".format(rival["ratio"], *rival["ratio_quartiles"]) if rival else "–",
    )  # fmt: skip
