"""The same call by several virtual ranks on this GPU: the whole distributed protocol on one card."""

from functools import partial

import torch
from torch import Tensor

from ..routing import Routing
from .problem import Call, Problem, Skipped


def make(ranks: int, problem: Problem) -> list[Call]:
    """
    Raises:
        Skipped: there is no GPU, or the experts do not go into so many equal parts.
    """
    problem.needs_gpu()
    shape = problem.shape
    if shape.num_experts % ranks:
        raise Skipped(f"{shape.num_experts} experts do not go into {ranks} equal parts")
    from ..virtual_ranks import VirtualRanks

    team = VirtualRanks(
        ranks, max_tokens=-(-problem.num_tokens // ranks), max_wire_bytes=shape.hidden_size * problem.dtype.itemsize,
        max_top_k=shape.top_k, max_experts=shape.num_experts,
    )  # fmt: skip
    experts = [weights.chunk(ranks) for weights in (problem.gate_up_proj, problem.down_proj)]

    def call(x: Tensor, routing: Routing, weights: Tensor) -> Tensor:
        y = torch.empty_like(x)
        parts = [part.tensor_split(ranks) for part in (x, routing.topk_ids, weights)]
        team(*parts, *experts, activation=shape.activation, gated=shape.gated, out=y.tensor_split(ranks))
        return y

    return [partial(call, x, routing, routing.topk_weights.float()) for x, routing in problem.inputs]
