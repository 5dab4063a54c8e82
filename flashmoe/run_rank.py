"""One rank's part of ``flashmoe run``: build the layer, check it against the reference, time it beside the baselines."""

import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from . import baselines
from .accuracy import Check, checked_tokens
from .activations import random_activations, text_activations
from .contention import ProcessorTime
from .measure import Contender, Ranks, gemm_gflops, read_gb_s, speedup, spread, take_turns
from .models import LayerShape
from .module import MoE
from .routing import Routing, make_router

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class RunOptions:
    """What ``flashmoe run`` was asked for, as each rank gets it; ``started`` is a time.time()."""

    shape: LayerShape
    tokens: int
    ranks: int
    dtype: str
    input: str
    iterations: int
    warmup: int
    seconds: float
    seed: int
    remote_only: int | None
    threads: int
    usable_threads: int
    baselines: tuple[str, ...]
    started: float

    @property
    def experts_per_rank(self) -> list[int]:
        """Neighbouring experts, as evenly as they go."""
        bounds = [rank * self.shape.num_experts // self.ranks for rank in range(self.ranks + 1)]
        return [high - low for low, high in zip(bounds, bounds[1:], strict=False)]


def say(options: RunOptions, text: str) -> None:
    """One line of progress on stderr."""
    print(f"[{time.time() - options.started:6.1f} s] {text}", file=sys.stderr, flush=True)


@torch.no_grad()
def run_rank(options: RunOptions) -> dict[str, Any] | None:
    """Everything that is measured, as JSON-like values, on rank 0; None on the others."""
    ranks = Ranks()
    report = partial(say, options) if ranks.rank == 0 else lambda text: None
    torch.set_num_threads(options.threads)
    shape, dtype = options.shape, DTYPES[options.dtype]

    report(f"weights: {shape.num_experts} experts of {shape.expert_elements / 1e6:.2f} M elements")
    layer, whole = _build(options, ranks)
    report(f"activations: {options.tokens} tokens a rank, {options.input}")
    activations = text_activations if options.input == "text" else random_activations
    x = activations(options.tokens, shape.hidden_size, rank=ranks.rank, seed=options.seed).to(dtype)
    routing = layer.router(x)
    y = layer(x, routing)
    stats = ranks.collect_objects(layer.stats)
    repeat = ranks.collect_objects(bool(torch.equal(_bits(y), _bits(layer(x, routing)))))

    threads = min(options.threads * options.ranks, options.usable_threads)  # what all ranks have together
    all_x, all_y = (ranks.collect(rows.float()) for rows in (x, y))  # float32 holds every dtype's values
    ids, weights = ranks.collect(routing.topk_ids), ranks.collect(routing.topk_weights)
    result: dict[str, Any] = {}
    check = None
    if ranks.rank == 0:
        all_x, everything = all_x.to(dtype), Routing(ids, weights, shape.num_experts)
        report(f"reference: {checked_tokens(shape, len(all_x))} of {len(all_x)} tokens in float64")
        torch.set_num_threads(threads)
        check = Check(shape, whole, all_x, everything, options.tokens)
        result = {
            "routing": _load(options, everything),
            "error": check.error_of(all_y) | {"bitwise_repeat": all(repeat)},
            "bytes_per_peer": [rank["bytes_per_peer"] for rank in stats],
            "rows_computed": [sum(rank["tokens_per_expert"]) for rank in stats],
        }

    report(f"floor: rates of this machine with {threads} threads")
    rates = _rates(threads, ranks)
    ours = Contender("flashmoe", lambda: layer(x, routing), options.threads)
    contenders = [ours, Contender("with router", lambda: layer(x), options.threads)]
    skipped, errors = {}, {}
    for name in options.baselines:
        report(f"baseline: {name}")
        try:
            if name == baselines.ONE_PROCESS:
                call = (lambda: whole(all_x, everything)) if ranks.rank == 0 else None
                contender = Contender(name, call, threads)
            else:
                contender = Contender(name, _baseline(name, options, layer, x, routing), options.threads)
            rows = contender.call() if contender.call else y
            rows = rows.float() if name == baselines.ONE_PROCESS else ranks.collect(rows.float())
        except Exception as error:
            # Another's code may not support a shape; its failure is not ours. A pipeline that fails on one rank would
            # leave the others waiting, so that is an error.
            if not (isinstance(error, baselines.Skipped) or name.startswith("hf-")):
                raise
            skipped[name] = str(error) if isinstance(error, baselines.Skipped) else f"it raised {error!r}"
            continue
        if ranks.rank == 0:
            errors[name] = check.error_of(rows)["relative"]
        contenders.append(contender)

    report("timing: " + ", ".join(contender.name for contender in contenders))
    processors = ProcessorTime()
    take_turns(contenders, ranks, options.iterations, options.warmup, options.seconds, report)
    processor_seconds = ranks.collect_objects(processors.mine())
    rates = {key: max(rates[key], again) for key, again in _rates(threads, ranks).items()}  # neighbours come and go
    if ranks.rank:
        return None
    flops = shape.flops(ids.numel())
    result["rates"] = rates
    result["cores_while_timing"] = processors.shares(sum(processor_seconds))
    result |= {"latency": spread(ours.samples), "latency_with_router": spread(contenders[1].samples)}
    result["baselines"] = [
        {"name": other.name, "relative_error": errors[other.name], **spread(other.samples), **speedup(ours, other)}
        for other in contenders[2:]
    ] + [{"name": name, "skipped": reason} for name, reason in skipped.items()]
    for timed in (result["latency"], *result["baselines"]):
        if "p50" in timed:
            timed["gflops"] = flops / timed["p50"] / 1e9
    return result | _floor(options, result, flops)


def _build(options: RunOptions, ranks: Ranks) -> tuple[MoE, MoE | None]:
    """This rank's layer and, on rank 0, the same layer with all experts; they share weights."""
    shape, group, owner = options.shape, None, None
    sizes = (shape.hidden_size, shape.intermediate_size, shape.num_experts, shape.top_k)
    common = {"activation": shape.activation, "gated": shape.gated, "dtype": DTYPES[options.dtype]}
    torch.manual_seed(options.seed)
    router = make_router(shape.router, shape.hidden_size, shape.num_experts, shape.top_k, **shape.router_options)
    torch.nn.init.normal_(router.weight, std=shape.hidden_size**-0.5)  # logits of unit variance
    if options.ranks == 1:
        layer = MoE(*sizes, router=router, **common)
        return layer, layer
    group, counts = dist.group.WORLD, options.experts_per_rank
    if len(set(counts)) > 1:
        owner = [rank for rank, count in enumerate(counts) for _ in range(count)]
    if ranks.rank > 0:
        return MoE(*sizes, router=router, group=group, expert_map=owner, **common), None
    whole = MoE(*sizes, router=router, **common)
    layer = MoE(*sizes, router=router, group=group, expert_map=owner, device="meta", **common)
    if owner is not None:
        layer.expert_map = torch.tensor(owner, dtype=torch.int32)
    layer.gate_up_proj = torch.nn.Parameter(whole.gate_up_proj[: counts[0]], False)
    layer.down_proj = torch.nn.Parameter(whole.down_proj[: counts[0]], False)
    return layer, whole


def _baseline(name: str, options: RunOptions, layer: MoE, x: torch.Tensor, routing: Routing):
    if name.startswith("hf-"):
        implementation = name.removeprefix("hf-")
        return baselines.hugging_face(
            implementation, options.shape, x, routing, layer.gate_up_proj, layer.down_proj
        )
    return baselines.pipeline(
        name, options.shape, x, routing, layer.gate_up_proj, layer.down_proj, options.experts_per_rank
    )


def _rates(threads: int, ranks: Ranks) -> dict[str, float]:
    """What this machine can do, measured on rank 0 while the others wait."""
    ranks.barrier()
    rates = {"threads": threads}
    if ranks.rank == 0:
        rates |= {"gemm_gflops": gemm_gflops(threads), "read_gb_s": read_gb_s(threads)}
    ranks.barrier()
    return rates


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


def _floor(options: RunOptions, result: dict[str, Any], flops: int) -> dict[str, Any]:
    """The least time that the measured rates allow, were the work spread evenly, and how near the median comes."""
    rates, median = result["rates"], result["latency"]["p50"]
    touched = result["routing"]["experts_used"] * options.shape.expert_elements * DTYPES[options.dtype].itemsize
    compute, read = flops / (rates["gemm_gflops"] * 1e9), touched / (rates["read_gb_s"] * 1e9)
    floor = max(compute, read)
    return {
        "floor": {
            "seconds": floor, "compute_seconds": compute, "read_seconds": read, "weight_bytes_touched": touched,
            "share_of_speed": floor / median,
        },
        "flops": flops,
        "gemm_share": result["latency"]["gflops"] / rates["gemm_gflops"],
    }  # fmt: skip


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
