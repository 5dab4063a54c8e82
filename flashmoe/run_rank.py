"""One rank's part of ``flashmoe run``: build the layer, check it against the reference, time it beside others."""

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from . import baselines
from .accuracy import Check, checked_tokens
from .contenders import enter, prepare
from .contention import ProcessorTime
from .gpu_timing import gpu_seconds
from .measure import (
    Contender, Ranks, gemm, host_seconds, linking, quantile, reading, speedup, spread, take_turns,
)  # fmt: skip
from .module import MoE
from .routing import Routing, make_router
from .run_inputs import collect, draw
from .run_options import RunOptions
from .run_trace import Traced, summary, write_timeline
from .virtual_layer import VirtualLayer


def say(options: RunOptions, text: str) -> None:
    """One line of progress on stderr."""
    print(f"[{time.time() - options.started:6.1f} s] {text}", file=sys.stderr, flush=True)


@torch.no_grad()
def run_rank(options: RunOptions) -> dict[str, Any] | None:
    """Everything that is measured, as JSON-like values, on rank 0; None on the others."""
    ranks = Ranks()
    report = partial(say, options) if ranks.rank == 0 else lambda text: None
    torch.set_num_threads(options.threads)
    if options.device == "cuda":
        torch.backends.cuda.matmul.fp32_precision = "tf32" if options.dtype == "tf32" else "ieee"
    shape = options.shape

    report(f"weights: {shape.num_experts} experts of {shape.expert_elements / 1e6:.2f} M elements")
    layer, whole = _build(options, ranks)
    report(f"activations: {options.tokens} tokens a rank, {options.input}")
    inputs = [draw(options, ranks, layer, number) for number in range(options.inputs)]
    x, routing = inputs[0]
    threads = options.threads
    ours, y = prepare("flashmoe", [partial(layer, *one) for one in inputs], threads, options.graph)
    repeat = ranks.collect_objects(torch.equal(_bits(y), _bits(layer(x, routing))))
    stats = layer.stats if options.virtual else ranks.collect_objects(layer.stats)

    result: dict[str, Any] = {}
    check = None
    everything = [collect(ranks, *one) for one in inputs]
    all_y = ranks.collect(y.float())
    if ranks.rank == 0:
        all_x, all_routing = everything[0]
        report(f"reference: {checked_tokens(shape, len(all_x))} of {len(all_x)} tokens in float64")
        torch.set_num_threads(options.all_threads)
        check = Check(shape, whole, all_x, all_routing, options.tokens, options.dtype == "tf32")
        result = {
            "routing": _load(options, all_routing),
            "error": check.error_of(all_y) | {"bitwise_repeat": all(repeat)},
            "bytes_per_peer": [rank["bytes_per_peer"] for rank in stats],
            "rows_computed": [sum(rank["tokens_per_expert"]) for rank in stats],
        }

    contenders, routed = [ours], None
    if options.routes:
        try:
            routed = prepare("with router", [partial(layer, x) for x, _ in inputs], threads, options.graph)[0]
            contenders.append(routed)
        except RuntimeError as error:
            if not options.graph:
                raise
            report(f"the router cannot be captured: {error}")  # not every router can, the layer behind it must
    rates = gemm(options.all_threads, options.device, x.dtype), reading(options.all_threads, options.device)
    pure, amounts = zip(*rates, strict=True)
    for one in pure:  # one rank measures what the machine does with the threads of all
        one.call = one.call if ranks.rank == 0 else None
    contenders.extend(pure)
    link, sent = linking(threads, options.device, ranks) if ranks.size > 1 else (None, 0)
    if link is not None and baselines.can_exchange(options.device):
        contenders.append(link)
    weights = layer.gate_up_proj.detach(), layer.down_proj.detach()
    problem = baselines.Problem(shape, inputs, *weights, options.experts_per_rank)
    results = []
    for name in options.baselines:
        report(f"baseline: {name}")
        if name == baselines.ONE_PROCESS:
            entered, said = _one_process(options, whole, everything, check)
        else:
            entered, said = enter(name, problem, ranks, check, threads, options.graph)
        results.append(said)
        if entered is not None:
            contenders.append(entered)

    traced = Traced(ours, layer, ranks) if options.trace else None
    if traced is not None:
        contenders.append(traced)

    report("timing: " + ", ".join(contender.name for contender in contenders))
    processors = ProcessorTime()
    # A GPU's own events know nothing of other ranks.
    clock = gpu_seconds if options.device == "cuda" and ranks.size == 1 else host_seconds
    take_turns(contenders, ranks, options.iterations, options.warmup, options.seconds, report, clock)
    timeline = traced.timeline(ranks) if traced is not None else None
    processor_seconds = ranks.collect_objects(processors.mine())
    cores = processors.shares(sum(processor_seconds)) if ranks.rank == 0 else None
    if ranks.rank:
        return None
    flops = shape.flops(sum(int(routing.tokens_per_expert().sum()) for _, routing in everything) // len(everything))
    timed = {contender.name: contender for contender in contenders}
    for entry in results:
        if entry["name"] in timed:
            other = timed[entry["name"]]
            entry |= _speed(other, flops) | speedup(ours, other)
    result |= {
        "rates": {
            "threads": options.all_threads,
            "gemm_gflops": amounts[0] / spread(pure[0].samples)["p50"] / 1e9,
            "read_gb_s": amounts[1] / spread(pure[1].samples)["p50"] / 1e9,
        },
        "clock": "GPU events" if clock is gpu_seconds else "host",
        "cores_while_timing": cores,
        "latency": _speed(ours, flops),
        "baselines": results,
        "flops": flops,
    }
    if timeline is not None:
        result["timeline"] = summary(timeline, ours, traced)
        write_timeline(timeline, Path(options.trace), report)
    if routed is not None:
        result["latency_with_router"] = _speed(routed, flops)
    if link is not None and link.samples and all(result["bytes_per_peer"]):
        result["link"] = _link(result["bytes_per_peer"], sent / spread(link.samples)["p50"])
    result["bytes"] = _bytes(options, result["routing"], result["bytes_per_peer"])
    touched = result["bytes"]["weights"]
    return result | _floor(ours, *pure, flops / amounts[0], touched, touched / amounts[1])


def _build(options: RunOptions, ranks: Ranks) -> tuple[MoE | VirtualLayer, MoE | None]:
    """This rank's layer and, on rank 0, the same layer with all experts; they share weights."""
    shape, group, owner = options.shape, None, None
    sizes = (shape.hidden_size, shape.intermediate_size, shape.num_experts, shape.top_k)
    common = {"activation": shape.activation, "gated": shape.gated, "dtype": options.torch_dtype}
    common["device"] = options.device
    torch.manual_seed(options.seed)
    router = make_router(shape.router, shape.hidden_size, shape.num_experts, shape.top_k, **shape.router_options)
    torch.nn.init.normal_(router.weight, std=shape.hidden_size**-0.5)  # logits of unit variance
    router = router.to(options.device)
    if options.processes == 1:
        whole = MoE(*sizes, router=router, **common)
        weights = whole.gate_up_proj, whole.down_proj
        if not options.virtual:
            return whole, whole
        return VirtualLayer(shape, *weights, options.experts_per_rank, options.tokens, router), whole
    group, counts = dist.group.WORLD, options.experts_per_rank
    if len(set(counts)) > 1:
        owner = [rank for rank, count in enumerate(counts) for _ in range(count)]
    if ranks.rank > 0:
        return MoE(*sizes, router=router, group=group, expert_map=owner, **common), None
    whole = MoE(*sizes, router=router, **common)
    layer = MoE(*sizes, router=router, group=group, expert_map=owner, **common | {"device": "meta"})
    if owner is not None:
        layer.expert_map = torch.tensor(owner, dtype=torch.int32)
    layer.gate_up_proj = torch.nn.Parameter(whole.gate_up_proj[: counts[0]], False)
    layer.down_proj = torch.nn.Parameter(whole.down_proj[: counts[0]], False)
    return layer, whole


def _one_process(
    options: RunOptions, whole: MoE | None, everything: list[Any], check: Check | None
) -> tuple[Contender, dict[str, Any]]:
    """The same tokens by the layer with all experts on rank 0, with the threads of all."""
    if check is None:
        return Contender(baselines.ONE_PROCESS, None, options.all_threads), {}
    calls = [partial(whole, *one) for one in everything]
    entered, y = prepare(baselines.ONE_PROCESS, calls, options.all_threads, options.graph)
    return entered, {"name": entered.name, "relative_error": check.error_of(y.float())["relative"]}


def _speed(contender: Contender, flops: int) -> dict[str, Any]:
    latency = spread(contender.samples)
    return latency | {"gflops": flops / latency["p50"] / 1e9}


def _load(options: RunOptions, routing: Routing) -> dict[str, Any]:
    """How uneven the routing is: maxima over means."""
    experts = routing.tokens_per_expert()
    ranks = torch.stack([part.sum() for part in experts.split(options.experts_per_rank)])
    return {
        "rows": int(experts.sum()),
        "experts_used": int((experts > 0).sum()),
        "busiest_expert": float(experts.max() / experts.double().mean()),
        "busiest_rank": float(ranks.max() / ranks.double().mean()),
    }


def _bytes(options: RunOptions, load: dict[str, Any], bytes_per_peer: list[Any]) -> dict[str, int | None]:
    """What a call of all ranks moves at least: each touched expert's weights, x and y once; the rows between the two
    products, which need not leave a cache; and what was sent to other ranks, None where that is not counted."""
    shape, itemsize = options.shape, options.torch_dtype.itemsize
    rows = options.ranks * options.tokens * shape.hidden_size * itemsize
    return {
        "weights": load["experts_used"] * shape.expert_elements * itemsize,
        "x": rows,
        "y": rows,
        "between": load["rows"] * shape.intermediate_size * itemsize,
        "sent": sum(sum(map(sum, rank.values())) for rank in bytes_per_peer) if all(bytes_per_peer) else None,
    }


def _link(bytes_per_peer: list[dict[str, list[int]]], rate: float) -> dict[str, Any]:
    """What the busiest rank sends, at the rate (bytes/s) at which all ranks copy memory at one time."""
    sent = max(sum(map(sum, rank.values())) for rank in bytes_per_peer)
    return {"bytes": sent, "gb_s": rate / 1e9, "seconds": sent / rate}


def _floor(
    ours: Contender, product: Contender, read: Contender, products: float, touched: int, reads: float
) -> dict[str, Any]:
    """The least time that this machine allows, were the work spread evenly, and how near ours comes to it.

    The work is worth ``products`` pure products and ``reads`` pure readings of ``touched`` bytes of weights. Shares
    of speed are medians and quartiles of ratios round by round: the machine is not equally fast in all rounds.
    """
    rounds = [number for number in ours.turns if number in product.turns and number in read.turns]
    compute = [products * product.turns[number] for number in rounds]
    read_all = [reads * read.turns[number] for number in rounds]
    shares = [max(pair) / ours.turns[number] for number, *pair in zip(rounds, compute, read_all, strict=True)]
    gemm_shares = [seconds / ours.turns[number] for number, seconds in zip(rounds, compute, strict=True)]
    floor = {
        "seconds": max(quantile(compute, 0.5), quantile(read_all, 0.5)),
        "compute_seconds": quantile(compute, 0.5),
        "read_seconds": quantile(read_all, 0.5),
        "weight_bytes_touched": touched,
        "share_of_speed": quantile(shares, 0.5),
        "share_of_speed_quartiles": [quantile(shares, 0.25), quantile(shares, 0.75)],
    }
    return {"floor": floor, "gemm_share": quantile(gemm_shares, 0.5)}


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
