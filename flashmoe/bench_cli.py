"""The command line of ``flashmoe bench``."""

import argparse
import os
from pathlib import Path
from types import ModuleType

from . import baselines, cuda_teams
from .argument_types import baseline_names, count, positive, seconds
from .bench_layer import PAPER_CAPACITY, bench, configurations
from .bench_micro import bench_micro
from .cores import usable_cores
from .models import SHAPES
from .run_options import GPU_DTYPES, PASSES, RunOptions
from .run_world import in_a_world
from .simulation import command as scale
from .skew import SKEWS

_PAPER = "flashmoe-paper"
# Benches in modules of their own, with HELP, DESCRIPTION, add_options() and run().
COMMANDS: dict[str, ModuleType] = {"scale": scale}


def add_commands(parser: argparse.ArgumentParser) -> None:
    """What can be benched, one command each."""
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    _add_layer(commands)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.DESCRIPTION)
        module.add_options(command)
        command.set_defaults(command=module.run, parser=command)
    _add_micro(commands)


def _add_layer(commands: argparse._SubParsersAction) -> None:
    layer = commands.add_parser(
        "layer", help="the layer, over shapes, tokens, ranks, dtypes and routing",
        description="Measures every combination of the lists given: checked against a float64 reference, timed in "
        "turns with what one would use instead, beside the time that the work would need of each resource alone. "
        "Under torchrun the ranks are the launcher's.",
    )  # fmt: skip
    add = layer.add_argument
    add("--models", nargs="+", default=["qwen3-30b-a3b"], choices=list(SHAPES), metavar="NAME",
        help=f"of {', '.join(SHAPES)} (default: qwen3-30b-a3b)")
    add("--scale", type=positive, default=1, metavar="N", help="divides both widths of every model (default: 1)")
    add("--experts", type=positive, metavar="N", help="in every model (default: as published)")
    add("--tokens", nargs="+", type=positive, default=[1, 512], metavar="T", help="per rank (default: 1 512)")
    add("--ranks", nargs="+", type=positive, default=None, metavar="W",
        help="processes on this host (default: 1 2; under torchrun its world's size)")
    add("--dtypes", nargs="+", choices=list(GPU_DTYPES), metavar="D",
        help=f"{', '.join(GPU_DTYPES)}, the last on GPUs (default: fp32 bf16; with --device cuda bf16, and tf32 with "
             "--paper)")
    add("--skews", nargs="+", choices=SKEWS, default=["router"], metavar="S",
        help=f"where tokens go: {', '.join(SKEWS)} (default: router)")
    add("--passes", nargs="+", choices=PASSES, default=["forward"], metavar="P",
        help="forward; backward: a training step's worth, forward and then the gradients of tokens, top-k weights and "
             "experts (default: forward)")
    add("--capacity-factor", type=seconds, metavar="F",
        help="drop what exceeds F times an expert's equal share (default: nothing is dropped)")
    add("--paper", action="store_true",
        help=f"like the FlashMoE paper's own comparison: {_PAPER}, uniform routing, capacity factor {PAPER_CAPACITY:g}")
    add("--device", choices=["cpu", "cuda"], default="cpu",
        help="cuda: each rank has a GPU; one rank is timed by the GPU's events (default: cpu)")
    add("--graph", action="store_true",
        help="replay each contender's calls from a CUDA graph, as decoding does: one rank on a GPU")
    add("--inputs", type=positive, default=2, metavar="N", help="that take turns, so that rows are cold (default: 2)")
    add("--input", choices=["text", "random"], default="text", metavar="KIND", help="text or random (default: text)")
    add("--iters", type=positive, default=10, metavar="N", help="rounds of timed calls (default: 10)")
    add("--warmup", type=count, default=1, metavar="N", help="untimed calls before (default: 1)")
    add("--seconds", type=seconds, default=8.0, metavar="S", help="about, for each configuration (default: 8)")
    add("--seconds-total", type=seconds, default=1e6, metavar="S",
        help="begin no configuration after so many; lists are worked off in their order, all models first")
    add("--seed", type=count, default=0, metavar="N", help="of weights, input and routing (default: 0)")
    add("--baselines", type=baseline_names, default="all", metavar="LIST",
        help=f"all, none, or some of: {', '.join(baselines.NAMES)} (default: all that fit ranks and device)")
    add("--out", type=Path, metavar="FOLDER", help="write a record of each there, for `flashmoe report`")
    layer.set_defaults(command=_bench_layer, parser=layer)


def _add_micro(commands: argparse._SubParsersAction) -> None:
    micro = commands.add_parser(
        "micro", help="the parts that a call is made of, one by one",
        description="Measures puts and signals by transport, the plan, dispatch, gather, tile products, activations, "
        "combine, queues, epochs and calls, each checked once; on a GPU where there is one. The same as `pytest "
        "bench/micro` in a checkout.",
    )  # fmt: skip
    micro.add_argument("-k", dest="chosen", metavar="EXPRESSION", help="only those whose names match, as pytest's -k")
    micro.add_argument("--json", type=Path, metavar="FILE", help="write pytest-benchmark's JSON there")
    micro.add_argument("--thorough", action="store_true", help="more sizes, many minutes")
    micro.set_defaults(command=lambda options, _: bench_micro(options.chosen, options.json, options.thorough))


def _bench_layer(options: argparse.Namespace, arguments: list[str]) -> int:
    error, on_gpu = options.parser.error, options.device == "cuda"
    ranks = options.ranks or ([1] if on_gpu else [1, 2])
    if in_a_world():
        world = int(os.environ["WORLD_SIZE"])
        if options.ranks not in (None, [world]):
            error(f"argument --ranks: the launcher has started {world} ranks, got {options.ranks}")
        ranks = [world]
    if options.dtypes is None:
        options.dtypes = (["tf32"] if options.paper else []) + ["bf16"] if on_gpu else ["fp32", "bf16"]
    if "tf32" in options.dtypes and not on_gpu:
        error("argument --dtypes: tf32 needs --device cuda")
    if options.graph and (not on_gpu or ranks != [1]):
        error(f"argument --graph: needs --device cuda and --ranks 1, got {options.device} and {ranks}")
    if on_gpu and (lack := cuda_teams.missing()):
        error(f"argument --device: {lack}")
    if options.paper:
        options.models, options.skews = [_PAPER], ["uniform"]
        options.capacity_factor = PAPER_CAPACITY
    try:
        shapes = [SHAPES[name].scaled(options.scale) for name in options.models]
    except ValueError as wrong:
        error(f"argument --scale: {wrong}")
    try:
        shapes = [shape.with_experts(options.experts) for shape in shapes] if options.experts else shapes
    except ValueError as wrong:
        error(f"argument --experts: {wrong}")
    names = baselines.on(options.device) if options.baselines == "all" else options.baselines
    base = RunOptions(
        shape=shapes[0], tokens=1, ranks=1, dtype="fp32", input=options.input, iterations=options.iters,
        warmup=options.warmup, seconds=options.seconds, seed=options.seed, remote_only=None, threads=1,
        usable_threads=1, baselines=tuple(names), started=0.0, capacity_factor=options.capacity_factor,
        inputs=options.inputs, device=options.device, graph=options.graph,
    )  # fmt: skip
    lists = ranks, options.dtypes, options.tokens, options.skews, options.passes
    wanted = configurations(base, shapes, *lists, usable_cores())
    return bench(list(wanted), options.out, ["flashmoe", *arguments], options.seconds_total)
