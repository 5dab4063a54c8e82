"""What one writes with torch alone: sort by expert, two grouped products, add up. One process."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..routing import Routing
from .problem import Call, Problem, Skipped


def make(problem: Problem) -> list[Call]:
    """
    Raises:
        Skipped: this torch has no grouped_mm.
    """
    if not hasattr(F, "grouped_mm"):
        raise Skipped("this version of torch has no torch.nn.functional.grouped_mm")
    ids_dtype = problem.inputs[0][1].topk_ids.dtype
    experts = torch.arange(problem.shape.num_experts, dtype=ids_dtype, device=problem.device)
    gate_up, down = (weights.transpose(1, 2) for weights in (problem.gate_up_proj, problem.down_proj))

    def call(x: Tensor, routing: Routing, kept: int) -> Tensor:
        ids, order = routing.topk_ids.flatten().sort()
        order = order[:kept]  # dropped entries have the largest id
        rows = order // problem.shape.top_k
        # On a GPU a bincount would wait for its own result.
        ends = torch.searchsorted(ids, experts, right=True).to(torch.int32)
        hidden = problem.activate(F.grouped_mm(x[rows], gate_up, offs=ends))
        out = F.grouped_mm(hidden, down, offs=ends)
        weights = routing.topk_weights.flatten()[order, None].to(x.dtype)
        return torch.zeros_like(x).index_add_(0, rows, out * weights)

    return [partial(call, x, routing, problem.kept(routing)) for x, routing in problem.inputs]
