"""The usual fused MoE in Triton: rows sorted by expert into padded blocks, two grouped products, the k rows added up.

It is tuned as its users would: a few tile configurations are tried on the GPU before it is timed, and the fastest one
is kept. In Triton's interpreter (TRITON_INTERPRET=1, on a CPU) there is nothing to tune.
"""

import math
import os
from functools import partial

import torch
from torch import Tensor

from ..gpu_timing import gpu_seconds
from ..routing import Routing
from .padded_blocks import padded_blocks
from .problem import Call, Problem, Skipped

Tiles = dict[str, int]
_TRIES = 3


def _tiles(m: int, n: int, k: int, group: int, warps: int, stages: int) -> Tiles:
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": group, "num_warps": warps, "num_stages": stages}


# Low blocks for experts with few rows, whose weights are all that counts; high ones for the others.
FEW_ROWS = (_tiles(16, 64, 128, 1, 4, 4), _tiles(16, 128, 64, 1, 4, 4), _tiles(32, 64, 128, 1, 4, 4))
MANY_ROWS = (
    _tiles(64, 128, 64, 8, 4, 4), _tiles(128, 128, 64, 8, 8, 3), _tiles(128, 256, 64, 8, 8, 3),
    _tiles(128, 128, 32, 8, 4, 4),
)  # fmt: skip
INTERPRETED = _tiles(16, 32, 32, 2, 4, 1)


def make(problem: Problem) -> list[Call]:
    """
    Raises:
        Skipped: no Triton, no GPU, or entries are dropped.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted:
        problem.needs_dtype(torch.float32, torch.float16)  # it takes the bits of bfloat16 for integers
    else:
        problem.needs_gpu()
    problem.needs_every_entry()
    try:
        from . import triton_kernels
    except ImportError as error:
        raise Skipped(f"needs Triton (pip install triton): {error}") from error
    shape, num_experts = problem.shape, problem.shape.num_experts
    exact = problem.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    precision = "ieee" if exact else "tf32"

    def call(tiles: Tiles, x: Tensor, routing: Routing, weights: Tensor) -> Tensor:
        (num_tokens, top_k), pairs = routing.topk_ids.shape, routing.topk_ids.numel()
        planned = padded_blocks(routing.topk_ids, num_experts, tiles["BLOCK_M"], tiles["GROUP_M"])
        product = partial(triton_kernels.product, planned=planned, pairs=pairs, precision=precision, tiles=tiles)
        hidden = product(x, problem.gate_up_proj, pairs_of_row=top_k, scales=None)
        hidden = triton_kernels.activation(hidden, shape.intermediate_size, shape.activation, shape.gated)
        out = product(hidden, problem.down_proj, pairs_of_row=1, scales=weights)
        return out.view(num_tokens, top_k, -1).sum(1)

    arguments = [(x, routing, routing.topk_weights.float().contiguous()) for x, routing in problem.inputs]
    rows_per_expert = problem.num_tokens * shape.top_k / num_experts
    possible = (INTERPRETED,) if interpreted else FEW_ROWS if rows_per_expert <= 32 else MANY_ROWS
    tiles = possible[0]
    if len(possible) > 1:
        tiles = min(possible, key=lambda one: _seconds(partial(call, one, *arguments[0])))
    return [partial(call, tiles, *one) for one in arguments]


def _seconds(call: Call) -> float:
    """Of the fastest of a few calls; infinite where the tiles ask for more than this GPU has."""
    try:
        call()
        return min(gpu_seconds(call) for _ in range(_TRIES))
    except Exception as error:
        if "out of resource" in str(error):
            return math.inf
        raise
