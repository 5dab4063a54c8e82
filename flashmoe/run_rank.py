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
from .contenders import Judge, Make, enter, prepare
from .contention import ProcessorTime
from .gpu_timing import gpu_seconds
from .gradient_accuracy import GradientCheck
from .itemised import bytes_of, floor_of, flops_of, link_of, load_of, speed
from .measure import Contender, Ranks, gemm, host_seconds, linking, reading, speedup, spread, take_turns
from .module import MoE
from .routing import Routing, make_router
from .run_inputs import collect, draw, draw_gradient
from .run_options import RunOptions
from .run_trace import Traced, summary, write_timeline
from .training_step import TIMED
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
    forward = [partial(layer, *one) for one in inputs]
    ours, y = prepare(baselines.OURS, forward, threads, options.graph and not options.backward)
    repeat = ranks.collect_objects(torch.equal(_bits(y), _bits(layer(x, routing))))
    stats = layer.stats if options.virtual else ranks.collect_objects(layer.stats)

    result: dict[str, Any] = {}
    check = gradients = None
    everything = [collect(ranks, *one) for one in inputs]
    grad_y = [draw_gradient(options, ranks, one, number) for number, (one, _) in enumerate(inputs) if options.backward]
    all_grad_y = [ranks.collect(one.float()) for one in grad_y]
    all_y = ranks.collect(y.float())
    if ranks.rank == 0:
        all_x, all_routing = everything[0]
        report(f"reference: {checked_tokens(shape, len(all_x))} of {len(all_x)} tokens in float64")
        torch.set_num_threads(options.all_threads)
        check = Check(shape, whole, all_x, all_routing, options.tokens, options.dtype == "tf32")
        if options.backward:
            all_grad_y = [one.to(x.dtype) for one in all_grad_y]
            gradients = GradientCheck(shape, whole, *everything[0], all_grad_y[0], options.dtype == "tf32")
        result = {
            "timed": TIMED[options.passes],
            "routing": load_of(options, all_routing),
            "error": check.error_of(all_y) | {"bitwise_repeat": all(repeat)},
            "bytes_per_peer": [rank["bytes_per_peer"] for rank in stats],
            "rows_computed": [sum(rank["tokens_per_expert"]) for rank in stats],
        }

    judge = Judge(ranks, options.experts_per_rank, check, gradients, ranks.told(gradients.experts if gradients else ()))
    problem, results = _problem(options, inputs, layer, grad_y), []
    if options.backward:
        report("backward pass: flashmoe")
        ours, said = enter(baselines.OURS, _calls_of(layer), problem, judge, threads, options.graph)
        if ours is None:
            results.append(said)
        if gradients is not None and "gradient_errors" in said:
            errors, bounds = said["gradient_errors"], gradients.bounds
            judged = {leaf: {"relative": errors[leaf], "bound": bounds[leaf]} for leaf in errors}
            result["error"] |= {"relative": said["relative_error"], "gradients": judged}
    contenders, routed = [ours] if ours else [], None
    if options.routes and not options.backward:
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
    for name in options.baselines:
        report(f"baseline: {name}")
        if name == baselines.ONE_PROCESS:
            entered, said = _one_process(options, whole, everything, all_grad_y, judge)
        else:
            entered, said = enter(name, baselines.baseline(name).make, problem, judge, threads, options.graph)
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
    rows = sum(int(routing.tokens_per_expert().sum()) for _, routing in everything) // len(everything)
    flops_by_product = flops_of(shape, rows, options.backward)
    flops = sum(flops_by_product.values())
    timed = {contender.name: contender for contender in contenders}
    for entry in results:
        if entry["name"] in timed:
            other = timed[entry["name"]]
            entry |= speed(other, flops) | (speedup(ours, other) if ours else {})
    result |= {
        "rates": {
            "threads": options.all_threads,
            "gemm_gflops": amounts[0] / spread(pure[0].samples)["p50"] / 1e9,
            "read_gb_s": amounts[1] / spread(pure[1].samples)["p50"] / 1e9,
        },
        "clock": "GPU events" if clock is gpu_seconds else "host",
        "cores_while_timing": cores,
        "baselines": results,
        "flops": flops,
        "flops_by_product": flops_by_product,
    }
    if ours is not None:
        result["latency"] = speed(ours, flops)
    if gradients is not None:
        result["gradient_check"] = {
            "bounds": gradients.bounds, "tokens": len(gradients.tokens), "experts": list(gradients.experts)
        }  # fmt: skip
    if timeline is not None:
        result["timeline"] = summary(timeline, ours, traced)
        write_timeline(timeline, Path(options.trace), report)
    if routed is not None:
        result["latency_with_router"] = speed(routed, flops)
    if link is not None and link.samples:
        result["link"] = link_of(options, result["bytes_per_peer"], sent / spread(link.samples)["p50"])
    moved = result["bytes"] = bytes_of(options, result["routing"], result["bytes_per_peer"])
    reads = (moved["weights"] + moved.get("weight_gradients", 0)) / amounts[1]
    return result | floor_of(ours, *pure, flops / amounts[0], moved, reads)


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


def _problem(options: RunOptions, inputs: list[Any], layer: MoE, grad_y: list[torch.Tensor]) -> baselines.Problem:
    """As contenders get it; its weights are the layer's own parameters where they are to get gradients."""
    weights = layer.gate_up_proj, layer.down_proj
    counts = options.experts_per_rank
    if not options.backward:
        return baselines.Problem(options.shape, inputs, *(one.detach() for one in weights), counts)
    for one in weights:
        one.requires_grad_()
    wanting = [
        (x.detach().requires_grad_(), Routing(r.topk_ids, r.topk_weights.detach().requires_grad_(), r.num_experts))
        for x, r in inputs
    ]
    return baselines.Problem(options.shape, wanting, *weights, counts, tuple(grad_y))


def _calls_of(layer: MoE) -> Make:
    return lambda problem: [partial(layer, *one) for one in problem.inputs]


def _one_process(
    options: RunOptions, whole: MoE | None, everything: list[Any], grad_y: list[Any], judge: Judge
) -> tuple[Contender | None, dict[str, Any]]:
    """The same tokens by the layer with all experts on rank 0, with the threads of all."""
    name, entered, said = baselines.ONE_PROCESS, None, {}
    if whole is not None:
        problem = _problem(options, everything, whole, grad_y)
        entered, said = enter(name, _calls_of(whole), problem, judge.alone(), options.all_threads, options.graph)
    if judge.ranks.told(entered is not None) and entered is None:
        entered = Contender(name, None, options.all_threads)
    return entered, said


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
