"""Times the kernel on one GPU beside torch's grouped_mm chain, with cuBLAS on the same FLOPs as the ceiling.

    python bench/gpu_layer.py [--json FILE] [--models NAME ...] [--tokens T ...] [--ranks W ...]

All are timed in turns, with CUDA events, on random bf16 data; the result is checked before it is timed.
"""

import argparse
import json
import statistics
import sys

import torch
import torch.nn.functional as F

import flashmoe
from flashmoe import info
from flashmoe.models import SHAPES, LayerShape
from flashmoe.virtual_ranks import VirtualRanks

ROUNDS, WARMUP = 15, 3


def draw(shape: LayerShape, tokens: int):
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*size, scale=1.0):
        return torch.randn(*size, generator=generator, device="cuda", dtype=torch.bfloat16) * scale

    gate_up = normal(shape.num_experts, shape.up_rows, shape.hidden_size, scale=shape.hidden_size**-0.5)
    down = normal(shape.num_experts, shape.hidden_size, shape.intermediate_size, scale=shape.intermediate_size**-0.5)
    ids = torch.rand(tokens, shape.num_experts, generator=generator, device="cuda").topk(shape.top_k).indices
    weights = torch.rand(tokens, shape.top_k, generator=generator, device="cuda")
    return normal(tokens, shape.hidden_size), ids, weights, gate_up, down


def flashmoe_call(shape: LayerShape, ranks: int, x, ids, weights, gate_up, down):
    team = VirtualRanks(
        ranks, max_tokens=-(-len(x) // ranks), max_wire_bytes=shape.hidden_size * 2, max_top_k=shape.top_k,
        max_experts=shape.num_experts,
    )  # fmt: skip
    parts = [part.tensor_split(ranks) for part in (x, ids, weights)]
    experts = [part.chunk(ranks) for part in (gate_up, down)]
    return lambda: team(*parts, *experts, activation=shape.activation, gated=shape.gated)


def grouped_call(shape: LayerShape, x, ids, weights, gate_up, down):
    """Sort by expert, two grouped products, scatter-add: what one writes with torch alone."""
    activate = {"silu": F.silu, "relu": F.relu}[shape.activation]

    def call():
        order = ids.flatten().argsort()
        rows = order // shape.top_k
        ends = torch.bincount(ids.flatten(), minlength=shape.num_experts).cumsum(0).to(torch.int32)
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


def milliseconds(call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure(shape: LayerShape, tokens: int, ranks: int) -> dict:
    data = draw(shape, tokens)
    calls = {"flashmoe": flashmoe_call(shape, ranks, *data), "cublas, same FLOPs": ceiling_call(shape, tokens)}
    if hasattr(F, "grouped_mm"):
        calls["torch grouped_mm chain"] = grouped_call(shape, *data)
    checked = slice(0, min(tokens, 64))
    x, ids, weights, gate_up, down = data
    want = flashmoe.moe_reference(
        x[checked], ids[checked], weights[checked], gate_up, down, activation=shape.activation, gated=shape.gated
    )
    got = torch.cat(calls["flashmoe"]())[checked].float()
    error = ((got - want).abs().amax(-1) / want.abs().amax(-1)).max().item()
    samples = {name: [] for name in calls}
    for number in range(WARMUP + ROUNDS):
        for name, call in calls.items():
            elapsed = milliseconds(call)
            if number >= WARMUP:
                samples[name].append(elapsed)
    flops = 2 * tokens * shape.top_k * shape.expert_elements
    times = {
        name: {"p50_ms": statistics.median(s), "min_ms": min(s), "max_ms": max(s), "tflops": flops / statistics.median(s) / 1e9}
        for name, s in samples.items()
    }
    return {"model": shape.name, "tokens": tokens, "ranks": ranks, "relative_error": error, "times": times}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json")
    parser.add_argument("--models", nargs="+", default=["mixtral-8x7b", "qwen3-30b-a3b", "flashmoe-paper"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 128, 8192])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 8])
    options = parser.parse_args()
    results, failed = [], False
    for model in options.models:
        for tokens in options.tokens:
            for ranks in options.ranks:
                try:
                    one = measure(SHAPES[model], tokens, ranks)
                    times = "  ".join(f"{n} {t['p50_ms']:.3f} ms {t['tflops']:.0f} TFLOP/s" for n, t in one["times"].items())
                    ok = one["relative_error"] <= 2e-2
                    print(f"{model} T={tokens} W={ranks}  error {one['relative_error']:.1e}{'' if ok else ' TOO LARGE'}  {times}")
                except Exception as error:  # one shape must not cost the others their turn
                    one, ok = {"model": model, "tokens": tokens, "ranks": ranks, "failure": repr(error)}, False
                    print(f"{model} T={tokens} W={ranks}  FAILED: {error!r}")
                failed = failed or not ok
                results.append(one)
                sys.stdout.flush()
    record = {"schema": 1, "versions": info.versions(), "device": torch.cuda.get_device_name(), "results": results}
    if options.json:
        with open(options.json, "w") as file:
            json.dump(record, file, indent=1)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
