"""Times fused_moe on one GPU beside torch's grouped_mm chain and Triton, with cuBLAS on the same FLOPs as the ceiling.

    python bench/gpu_layer.py [--json FILE] [--models NAME ...] [--tokens T ...] [--decode T ...] [--ranks W ...]
                              [--seconds S]

Random bf16 data; each result is checked before it is timed. Prefill is timed with CUDA events, call by call; decode in
CUDA graphs, beside the time that its experts' weights take from memory at the bandwidth of a large copy. All contenders
of a shape take turns. No shape is begun after S seconds.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F

import flashmoe
from flashmoe import info
from flashmoe.models import SHAPES, LayerShape
from flashmoe.routing import make_router
from flashmoe.virtual_ranks import VirtualRanks

# With as many experts as the largest layer that the paper measures.
SHAPES = SHAPES | {"flashmoe-paper": dataclasses.replace(SHAPES["flashmoe-paper"], num_experts=128)}
PREFILL = {"flashmoe-paper": 2}  # times as many tokens as the others
ROUNDS, WARMUP = 15, 3
CALLS_OF_A_GRAPH = 10
TOLERANCE = 2e-2
ROUTER = "the router, beside them"


def draw(shape: LayerShape, tokens: int):
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*size, scale=1.0):
        return torch.empty(size, device="cuda", dtype=torch.bfloat16).normal_(std=scale, generator=generator)

    gate_up = normal(shape.num_experts, shape.up_rows, shape.hidden_size, scale=shape.hidden_size**-0.5)
    down = normal(shape.num_experts, shape.hidden_size, shape.intermediate_size, scale=shape.intermediate_size**-0.5)
    ids = torch.rand(tokens, shape.num_experts, generator=generator, device="cuda").topk(shape.top_k).indices
    weights = torch.rand(tokens, shape.top_k, generator=generator, device="cuda")
    return normal(tokens, shape.hidden_size), ids, weights, gate_up, down


def ranks_call(shape: LayerShape, ranks: int, x, ids, weights, gate_up, down):
    """The same call by virtual ranks."""
    team = VirtualRanks(
        ranks, max_tokens=-(-len(x) // ranks), max_wire_bytes=shape.hidden_size * 2, max_top_k=shape.top_k,
        max_experts=shape.num_experts,
    )  # fmt: skip
    parts = [part.tensor_split(ranks) for part in (x, ids, weights)]
    experts = [part.chunk(ranks) for part in (gate_up, down)]
    return lambda: torch.cat(team(*parts, *experts, activation=shape.activation, gated=shape.gated))


def grouped_call(shape: LayerShape, x, ids, weights, gate_up, down):
    """Sort by expert, two grouped products, scatter-add: what one writes with torch alone."""
    activate = {"silu": F.silu, "relu": F.relu}[shape.activation]
    experts = torch.arange(shape.num_experts, device=x.device)

    def call():
        sorted_ids, order = ids.flatten().sort()
        rows = order // shape.top_k
        ends = torch.searchsorted(sorted_ids, experts, right=True).to(torch.int32)  # a bincount would wait
        hidden = F.grouped_mm(x[rows], gate_up.transpose(1, 2), offs=ends)
        if shape.gated:
            gate, up = hidden.chunk(2, -1)
            hidden = activate(gate) * up
        else:
            hidden = activate(hidden)
        out = F.grouped_mm(hidden, down.transpose(1, 2), offs=ends)
        return torch.zeros_like(x).index_add_(0, rows, out * weights.flatten()[order, None].to(x.dtype))

    return call


def ceiling_call(shape: LayerShape, tokens: int):
    """Dense products with as many FLOPs."""
    rows = tokens * shape.top_k
    x, up = (torch.randn(n, shape.hidden_size, device="cuda", dtype=torch.bfloat16) for n in (rows, shape.up_rows))
    hidden, down = (
        torch.randn(n, shape.intermediate_size, device="cuda", dtype=torch.bfloat16) for n in (rows, shape.hidden_size)
    )
    return lambda: (x @ up.T, hidden @ down.T)


def contenders(shape: LayerShape, data, ranks: list[int]) -> tuple[dict, dict]:
    """Calls by name, checked against the reference, and why others are missing."""
    x, ids, weights, gate_up, down = data
    options = {"activation": shape.activation, "gated": shape.gated}
    made = {
        "flashmoe": lambda: lambda: flashmoe.fused_moe(*data, **options),
        **{f"flashmoe, W = {w}": lambda w=w: ranks_call(shape, w, *data) for w in ranks if w > 1},
        "torch grouped_mm chain": lambda: grouped_call(shape, *data),
        "triton": lambda: triton_call(data, options),
    }
    few = slice(0, min(len(x), 64))
    want = flashmoe.moe_reference(x[few], ids[few], weights[few], gate_up, down, **options)
    calls, missing = {}, {}
    for name, make in made.items():
        try:
            call = make()
            got = call()[few].float()
            error = ((got - want).abs().amax(-1) / want.abs().amax(-1)).max().item()
            if not error <= TOLERANCE:
                raise ValueError(f"relative error {error:.1e}")
            calls[name] = call
        except Exception as error:  # one contender must not cost the others their turn
            missing[name] = f"{type(error).__name__}: {error}"[:300]
    return calls, missing


def triton_call(data, options):
    from triton_moe import triton_moe  # where there is no Triton the others are timed

    return lambda: triton_moe(*data, **options)


def router_call(shape: LayerShape, x):
    """What MoE does before fused_moe: scores and top-k, by torch."""
    router = make_router(shape.router, shape.hidden_size, shape.num_experts, shape.top_k, **shape.router_options,
                         device="cuda", dtype=x.dtype)  # fmt: skip
    return lambda: router(x)


def milliseconds(call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def timed(calls: dict, calls_of_each: int = 1) -> dict:
    samples = {name: [] for name in calls}
    for number in range(WARMUP + ROUNDS):
        for name, call in calls.items():
            elapsed = milliseconds(call) / calls_of_each
            if number >= WARMUP:
                samples[name].append(elapsed)
    return {name: {"p50_ms": statistics.median(s), "min_ms": min(s), "max_ms": max(s)} for name, s in samples.items()}


def in_graph(call):
    """Replays a graph of several calls, one after the other."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS_OF_A_GRAPH):
            call()
    return graph.replay


def bytes_per_second() -> float:
    """Of memory, reading and writing, in a copy that no cache holds."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    to = torch.empty_like(source)
    return 2 * source.numel() / (min(milliseconds(lambda: to.copy_(source)) for _ in range(5)) / 1e3)


def measure_prefill(shape: LayerShape, tokens: int, ranks: list[int]) -> dict:
    data = draw(shape, tokens)
    calls, missing = contenders(shape, data, ranks)
    calls["cublas, same FLOPs"] = ceiling_call(shape, tokens)
    times = timed(calls | {ROUTER: router_call(shape, data[0])})
    for name, one in times.items():
        if name != ROUTER:
            one["tflops"] = shape.flops(tokens * shape.top_k) / one["p50_ms"] / 1e9
    return {"kind": "prefill", "times": times, "missing": missing}


def measure_decode(shape: LayerShape, tokens: int, bandwidth: float) -> dict:
    data = draw(shape, tokens)
    calls, missing = contenders(shape, data, [])
    graphs = {}
    for name, call in [*calls.items(), (ROUTER, router_call(shape, data[0]))]:
        try:
            graphs[name] = in_graph(call)
        except Exception as error:
            missing[name] = f"in a graph: {type(error).__name__}: {error}"[:300]
    times = timed(graphs, CALLS_OF_A_GRAPH)
    read = data[1].unique().numel() * shape.expert_elements * 2
    floor = read / bandwidth * 1e3
    for name, one in times.items():
        if name != ROUTER:
            one["share_of_floor"] = floor / one["p50_ms"]
    return {"kind": "decode", "weight_bytes": read, "floor_ms": floor, "times": times, "missing": missing}


def line(one: dict) -> str:
    text = f"{one['model']:16s} {one['kind']:8s} T = {one['tokens']:5d}"
    if "failure" in one:
        return f"{text}  FAILED: {one['failure']}"
    if "floor_ms" in one:
        text += f"  memory's floor {one['floor_ms']:.3f} ms"
    for name, t in one["times"].items():
        rate = f"{t['tflops']:.0f} TFLOP/s" if "tflops" in t else ""
        rate = f"{100 * t['share_of_floor']:.0f} %" if "share_of_floor" in t else rate
        text += f"\n    {name:24s} {t['p50_ms']:9.3f} ms  {rate}"
    return text + "".join(f"\n    {name:24s} MISSING: {why}" for name, why in one["missing"].items())


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json")
    parser.add_argument("--models", nargs="+", default=["mixtral-8x7b", "qwen3-30b-a3b", "flashmoe-paper"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 512])
    parser.add_argument("--decode", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--ranks", nargs="+", type=int, default=[8])
    parser.add_argument("--seconds", type=float, default=1e9)
    options = parser.parse_args()
    started, bandwidth = time.monotonic(), bytes_per_second()
    record = {
        "schema": 2, "versions": info.versions(), "build": flashmoe.build_info(), "device": torch.cuda.get_device_name(),
        "bytes_per_second": bandwidth, "results": [],
    }  # fmt: skip
    print(f"{record['device']}: {bandwidth / 1e12:.2f} TB/s in a copy")
    # All models of a kind before the next, should the time not do for all.
    wanted = [("prefill", model, n * PREFILL.get(model, 1)) for n in options.tokens for model in options.models]
    wanted += [("decode", model, n) for n in options.decode for model in options.models]
    failed = False
    for kind, model, tokens in wanted:
        if time.monotonic() - started > options.seconds:
            one = {"kind": kind, "failure": "no time was left"}
        else:
            try:
                shape = SHAPES[model]
                if kind == "prefill":
                    one = measure_prefill(shape, tokens, options.ranks)
                else:
                    one = measure_decode(shape, tokens, bandwidth)
            except Exception as error:  # nor one shape the others
                one = {"kind": kind, "failure": f"{type(error).__name__}: {error}"[:300]}
        one |= {"model": model, "tokens": tokens}
        failed = failed or "failure" in one or "flashmoe" in one["missing"]
        record["results"].append(one)
        print(line(one), flush=True)
        if options.json:
            with open(options.json, "w") as file:
                json.dump(record, file, indent=1)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
