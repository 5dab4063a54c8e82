"""Small problems for baselines, and how far a result is from the reference."""

import torch

from flashmoe.baselines import Problem
from flashmoe.models import LayerShape
from flashmoe.reference import moe_reference
from flashmoe.routing import Routing

__all__ = ["drawn_problem", "worst_error"]


def drawn_problem(
    tokens: int, top_k: int, experts: int, hidden: int, inner: int, *, activation: str = "silu", gated: bool = True,
    dtype: torch.dtype = torch.float32, used: int | None = None, dropped: float = 0.0, inputs: int = 2,
    backward: bool = False,
) -> Problem:  # fmt: skip
    """The tokens go to the first ``used`` experts only; a share of the entries is ``dropped``. With ``backward`` all
    of it wants gradients."""
    shape = LayerShape("drawn", hidden, inner, experts, top_k, "softmax_topk", "", activation=activation, gated=gated)
    generator = torch.Generator().manual_seed(tokens + hidden)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    pairs = []
    for _ in range(inputs):
        ids = torch.rand(tokens, used or experts, generator=generator).topk(top_k).indices
        ids[torch.rand(ids.shape, generator=generator) < dropped] = experts
        weights = torch.rand(tokens, top_k, generator=generator) + 0.1
        pairs.append((normal(tokens, hidden).to(dtype), Routing(ids, weights, experts)))
    gate_up, down = normal(experts, shape.up_rows, hidden) * hidden**-0.5, normal(experts, hidden, inner) * inner**-0.5
    weights = gate_up.to(dtype), down.to(dtype)
    if not backward:
        return Problem(shape, pairs, *weights, [experts])
    for leaf in (*weights, *(leaf for x, routing in pairs for leaf in (x, routing.topk_weights))):
        leaf.requires_grad_()
    return Problem(shape, pairs, *weights, [experts], tuple(normal(tokens, hidden).to(dtype) for _ in pairs))


def worst_error(problem: Problem, results: list[torch.Tensor]) -> float:
    """Of any row of any input, relative to the reference's norm of that row."""
    worst = 0.0
    for (x, routing), y in zip(problem.inputs, results, strict=True):
        assert y.dtype == x.dtype and y.shape == x.shape
        want = moe_reference(
            x, routing.topk_ids, routing.topk_weights, problem.gate_up_proj, problem.down_proj,
            activation=problem.shape.activation, gated=problem.shape.gated, compute_dtype=torch.float64,
        )  # fmt: skip
        error = (y.double() - want).norm(dim=1) / want.norm(dim=1).clamp_min(1e-30)
        worst = max(worst, float(error.nan_to_num(nan=torch.inf).max()))
    return worst
