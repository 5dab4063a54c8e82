"""The command line: ``flashmoe run``, ``flashmoe report`` and ``flashmoe info``."""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import _C, baselines, bench_cli, cuda_teams
from ._version import __version__
from .argument_types import baseline_names, count, positive, seconds
from .cores import usable_cores
from .info import information, information_text
from .models import SHAPES
from .page import write_report
from .run import run
from .run_options import GPU_DTYPES, RunOptions
from .run_world import in_a_world, processes_of_host
from .settings import NUM_WORKERS_VARIABLE, REMOTE_ONLY_VARIABLE, num_workers_asked, settings_of_environment
from .topology import topology, topology_text

_DEFAULT_MODEL, _DEFAULT_SCALE = "qwen3-30b-a3b", 4  # a minute at most on two cores


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command of ``arguments`` (default: the program's own); return its exit code.

    Raises:
        SystemExit: with code 2 for arguments that are no command, 0 after --help.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    options = parser.parse_args(arguments)
    return options.command(options, arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flashmoe", description="A Mixture-of-Experts layer as one operator.")
    parser.add_argument("--version", action="version", version=f"flashmoe {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run", help="run a named layer across local processes or on GPUs, checked and compared",
        description="Runs a named MoE layer on local processes, checks it against a float64 reference, times it beside "
        "what one would use instead, and prints a table. The exit code is 1 if the result is wrong. Under torchrun the "
        "ranks are the launcher's.",
    )  # fmt: skip

    def option(name: str, help: str, default: object = None, **how: object) -> None:
        if default is not None:
            how["default"], help = default, f"{help} (default: {default})"
        run.add_argument(name, help=help, **how)

    option("--model", f"shape of the layer: {', '.join(SHAPES)}", _DEFAULT_MODEL, choices=list(SHAPES),
           metavar="NAME")
    option("--scale", f"divides both widths (default: {_DEFAULT_SCALE} without --model, else 1)", type=positive,
           metavar="N")
    option("--tokens", "tokens per rank", 512, type=positive, metavar="T")
    option("--ranks", "processes; 1 means this one alone (default: 2; with --device cuda and without --virtual 1; "
           "under torchrun its world's size)", type=positive, metavar="W")
    option("--device", "cuda: each rank has a GPU", "cpu", choices=["cpu", "cuda"])
    option("--virtual", "with --device cuda: the ranks share one GPU, as one grid of one process", action="store_true")
    option("--dtype", f"of weights and tokens: {', '.join(GPU_DTYPES)}, the last on GPUs (default: fp32; with --device "
           "cuda bf16)", choices=list(GPU_DTYPES), metavar="D")
    option("--input", "text: hidden states of the standard library's sources; random: normal noise", "text",
           choices=["text", "random"], metavar="KIND")
    option("--iters", "rounds of timed calls", 20, type=positive, metavar="N")
    option("--warmup", "untimed calls before", 2, type=count, metavar="N")
    option("--seconds", "about how long to time; slow contenders get fewer samples", 20.0, type=seconds, metavar="S")
    option("--seed", "of weights and input", 0, type=count, metavar="N")
    option("--remote-only", "reach peers only by puts that are delayed and reordered, as over RDMA", type=count,
           metavar="SEED")
    option("--threads", "threads that compute, per rank (default: the usable cores shared out)", type=positive,
           metavar="N")
    option("--baselines", f"all, none, or some of: {', '.join(baselines.NAMES)}", "all", type=baseline_names,
           metavar="LIST")
    option("--json", "write everything there too", metavar="FILE")
    option("--trace", "write the timeline of one call there, for ui.perfetto.dev, and as .png beside it", metavar="FILE")
    run.set_defaults(command=_run, parser=run)

    bench_cli.add_commands(commands.add_parser("bench", help="measure many configurations, or predict them"))

    report = commands.add_parser(
        "report", help="figures and a page from the records of `flashmoe run` and `flashmoe bench`",
        description="Draws the records of a folder: figures as SVG and one static HTML page that holds them all.",
    )  # fmt: skip
    report.add_argument("results", nargs="?", default="bench/results", type=Path, metavar="FOLDER",
                        help="of the records (default: bench/results)")  # fmt: skip
    report.add_argument("--out", default="build/report", type=Path, metavar="FOLDER",
                        help="for index.html and the figures (default: build/report)")  # fmt: skip
    report.add_argument("--png", action="store_true", help="write each figure as PNG, too")
    report.add_argument("--tables", nargs="+", default=[], type=Path, metavar="FILE",
                        help="write what stands between the marks of these documents anew")  # fmt: skip
    report.set_defaults(command=_report)

    info = commands.add_parser("info", help="versions, features of the build, the machine")
    info.add_argument("--json", action="store_true", help="as JSON")
    info.add_argument("--distributed", action="store_true", help="of all ranks, under torchrun: where each is, what "
                      "device it has, how it reaches the others, and what is missing")
    info.set_defaults(command=_info)
    return parser


def _run(options: argparse.Namespace, arguments: list[str]) -> int:
    started = time.time()
    given = any(argument == "--model" or argument.startswith("--model=") for argument in arguments)
    try:
        shape = SHAPES[options.model].scaled(options.scale or (1 if given else _DEFAULT_SCALE))
    except ValueError as error:
        options.parser.error(f"argument --scale: {error}")
    try:
        # What the library takes from the environment becomes an option here, so that the record has it.
        workers, remote_only = num_workers_asked(None), settings_of_environment().remote_only
    except ValueError as error:
        options.parser.error(str(error))
    os.environ.pop(NUM_WORKERS_VARIABLE, None)
    os.environ.pop(REMOTE_ONLY_VARIABLE, None)
    options.ranks = _ranks(options)
    if options.ranks == 1 and options.remote_only is not None:
        options.parser.error("argument --remote-only: needs --ranks of at least 2, got 1")
    if options.ranks > 1 and options.remote_only is None:
        options.remote_only = remote_only
    if options.device == "cuda" and options.remote_only is not None:
        options.parser.error("argument --remote-only: is of ranks on CPUs, got --device cuda")
    if options.dtype == "tf32" and options.device == "cpu":
        options.parser.error("argument --dtype: tf32 needs --device cuda")
    cores, sharing = usable_cores(), 1 if options.virtual else processes_of_host(options.ranks)
    threads = options.threads or workers or max(1, cores // sharing)
    run_options = RunOptions(
        shape=shape, tokens=options.tokens, ranks=options.ranks, input=options.input,
        dtype=options.dtype or ("bf16" if options.device == "cuda" else "fp32"),
        iterations=options.iters, warmup=options.warmup, seconds=options.seconds, seed=options.seed,
        remote_only=options.remote_only, threads=threads, usable_threads=max(cores, threads),
        baselines=_chosen(options), started=started, trace=options.trace, device=options.device,
        virtual=options.virtual,
    )  # fmt: skip
    return run(run_options, options.json, ["flashmoe", *arguments])


def _ranks(options: argparse.Namespace) -> int:
    """How many there are to be; the parser's error if they, or their device, cannot be had."""
    error, on_gpu = options.parser.error, options.device == "cuda"
    if on_gpu and (lack := cuda_teams.missing()):
        error(f"argument --device: {lack}")
    if options.virtual and not on_gpu:
        error("argument --virtual: needs --device cuda, got cpu")
    if in_a_world():
        world = int(os.environ["WORLD_SIZE"])
        if options.virtual:
            error(f"argument --virtual: is of one process, and the launcher has started {world}")
        if options.ranks not in (None, world):
            error(f"argument --ranks: the launcher has started {world} ranks, got {options.ranks}")
        return world
    ranks = options.ranks or (1 if on_gpu and not options.virtual else 2)
    if on_gpu and not options.virtual and ranks > (gpus := _C.num_cuda_devices()):
        error(f"argument --ranks: each rank needs a GPU, {gpus} of {ranks} are here; with --virtual the ranks share it")
    return ranks


def _chosen(options: argparse.Namespace) -> tuple[str, ...]:
    """The baselines of this run; one that is named must fit the number of ranks."""
    there = baselines.on(options.device)
    possible = baselines.of_virtual_ranks(there) if options.virtual else baselines.of_ranks(options.ranks, there)
    if options.baselines == "all":
        return tuple(possible)
    for name in options.baselines:
        if name not in possible:
            options.parser.error(
                f"argument --baselines: with --ranks {options.ranks} choose from {', '.join(possible)}, got {name!r}"
            )
    return tuple(options.baselines)


def _report(options: argparse.Namespace, arguments: list[str]) -> int:
    try:
        for path in write_report(options.results, options.out, options.tables, options.png):
            print(path)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"FAILED {error}", file=sys.stderr)
        return 1
    return 0


def _info(options: argparse.Namespace, arguments: list[str]) -> int:
    if options.distributed:
        return _topology(options)
    known = information()
    print(json.dumps(known, indent=1) if options.json else information_text(known))
    return 0


def _topology(options: argparse.Namespace) -> int:
    ranks = topology()
    if os.environ.get("RANK") == "0":
        print(json.dumps(ranks, indent=1) if options.json else topology_text(ranks))
    return int(any("error" in found for found in ranks))


if __name__ == "__main__":
    sys.exit(main())
