"""``flashmoe bench scale``: the layer on more GPUs than there are here, simulated; and how far that can be trusted."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..info import machine, versions
from ..models import SHAPES
from ..records import read_records
from . import paper, studies, tables, validation
from .machine import GPUS
from .record import KIND
from .scenario import Scenario
from .workload import Skew

HELP = "predict the layer on 8 to 1,024 GPUs by a simulation of its own order of work"
DESCRIPTION = (
    "Simulates one call of a layer on many GPUs: the kernel's own order of work, with tile times and links of a "
    "machine that is described by its data sheet. No GPU has run this: the numbers are predictions. The same "
    "simulation of a host is held against measured runs by --study validation."
)
_STUDIES = ("gpus", "paper", "validation", "all")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""

    def option(name: str, help: str, default: object = None, **how: Any) -> None:
        parser.add_argument(
            name, help=help if default is None else f"{help} (default: %(default)s)", default=default, **how
        )

    option("--study", "gpus: --model over --gpus; paper: the FlashMoE paper's experiments; validation: measured runs "
           "of this host; all: these and every model, as in the committed record", "gpus", choices=_STUDIES,
           metavar="S")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="with --study all: some of its points, in about a minute")
    option("--model", f"shape of the layer: {', '.join(SHAPES)}", "qwen3-30b-a3b", choices=list(SHAPES), metavar="NAME")
    option("--experts", "another number of experts than the model's", type=_positive, metavar="E")
    option("--gpus", "how many, as a list", "8,16,32,64,128,256,512,1024", type=_counts, metavar="LIST")
    option("--tokens", "of each rank", 8192, type=_positive, metavar="T")
    option("--dtype", "bf16, fp16, or fp32 rounded to tf32", "bf16", choices=["bf16", "fp16", "tf32"], metavar="D")
    option("--machine", "h100 or h200, eight to a node", "h100", choices=list(GPUS), metavar="M")
    option("--skew", "of the routing: uniform, zipf:S, or hot:X, one expert X times as likely as the mean", Skew(),
           type=_skew, metavar="KIND")  # fmt: skip
    option("--slow", "rank 0 computes so many times as long", 1.0, type=_factor, metavar="X")
    option("--late", "rank 0 enters so many microseconds after the others", 0.0, type=_delay, metavar="US")
    option("--senders", "what if at most so many workers of a rank sent at one time", type=_positive, metavar="N")
    option("--layers", "whose weights lie beside each other in a GPU's memory", 1, type=_positive, metavar="N")
    option("--follow", "ranks to follow; routing repeats after so many", type=_positive, metavar="N")
    option("--seed", "of the routing", 0, type=int, metavar="N")
    option("--results", "folders with records of `flashmoe run`, for validation", "bench/results,bench/results/scale",
           metavar="FOLDERS")  # fmt: skip
    option("--json", "write everything there too", metavar="FILE")


def run(options: argparse.Namespace, arguments: list[str]) -> int:
    """Simulate, print, write ``--json``; return the exit code."""
    started = time.time()

    def report(text: str) -> None:
        print(f"[{time.time() - started:6.1f} s] {text}", file=sys.stderr, flush=True)

    record: dict[str, Any] = {
        "schema": KIND,
        "command": ["flashmoe", *arguments],
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": machine(),
    }
    try:
        for name, study in _chosen(options, report).items():
            record[name] = study()
            print(f"\n{tables.TABLES[name](record[name])}", flush=True)
        record["elapsed_seconds"] = time.time() - started
        if options.json is not None:
            Path(options.json).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    except (ValueError, OSError, ImportError) as error:
        print(f"FAILED {error}", file=sys.stderr)
        return 1
    return 0


def _chosen(options: argparse.Namespace, report: Callable[[str], None]) -> dict[str, Callable[[], Any]]:
    """What to do, by its name in the record."""

    def validate() -> dict[str, Any]:
        found = [one for folder in options.results.split(",") for one in read_records(Path(folder))]
        records = [one for one in found if one.passes == "forward"]
        report(f"validation: {len(records)} measured runs")
        fit = validation.fit_host(records)
        return {"fit": asdict(fit), "fitted_to": validation.FITTED, "runs": validation.compare(records, fit)}

    def described() -> dict[str, Any]:
        return {name: asdict(gpu) for name, gpu in GPUS.items()}

    gpus = {"gpus": lambda: studies.answer(_asked(options), report)}
    published = {"paper": lambda: paper.reproduce(report)}
    measured = {"validation": validate}
    if options.quick and options.study != "all":
        raise ValueError("--quick is for --study all")
    some = {
        **measured, "machines": described, "paper": lambda: paper.reproduce(report, paper.QUICK),
        "gpus": lambda: studies.answer(studies.some_of_all_models(), report),
    }
    every = {
        **measured, "machines": described, **published,
        "following_fewer": lambda: studies.following_fewer(report),
        "gpus": lambda: studies.answer(studies.all_models(), report),
        "uneven": lambda: studies.answer(studies.uneven(), report),
        "fewer_senders": lambda: studies.answer(studies.fewer_senders(), report),
    }  # fmt: skip
    return {"gpus": gpus, "paper": published, "validation": measured, "all": some if options.quick else every}[options.study]


def _asked(options: argparse.Namespace) -> list[Scenario]:
    shape = SHAPES[options.model]
    if options.experts:
        shape = replace(shape, num_experts=options.experts)
    if shape.top_k > shape.num_experts:
        raise ValueError(f"--experts must be at least the model's top_k, {shape.top_k}, got {shape.num_experts}")
    return [
        Scenario(
            shape, replace(GPUS[options.machine], senders=options.senders), gpus, options.tokens, options.dtype,
            skew=options.skew, slow=options.slow, late_s=1e-6 * options.late, layers=options.layers,
            follow=options.follow, seed=options.seed,
        )
        for gpus in options.gpus
    ]  # fmt: skip


def _positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def _counts(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _factor(text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 0 < factor < 1e6:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return factor


def _delay(text: str) -> float:
    return 0.0 if text == "0" else _factor(text)


def _skew(text: str) -> Skew:
    try:
        return Skew.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
