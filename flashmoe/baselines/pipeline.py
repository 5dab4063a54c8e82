"""Expert parallelism as bulk-synchronous collectives over torch's world, the usual way of doing it."""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..routing import Routing
from .problem import Call, Problem, Skipped


def can_exchange(device: str) -> bool:
    """Whether torch's world can do an all-to-all of tensors there: ``cpu`` or ``cuda``."""
    return device == "cpu" or "cuda:nccl" in dist.get_backend_config()


class Exchange(torch.autograd.Function):
    """all_to_all_single of rows, whose gradients travel the same ways back."""

    @staticmethod
    def forward(ctx, rows: Tensor, receive: list[int], send: list[int]) -> Tensor:
        ctx.ways = send, receive
        return _exchanged(rows, receive, send)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _exchanged(grad.contiguous(), *ctx.ways), None, None


def _exchanged(rows: Tensor, receive: list[int], send: list[int]) -> Tensor:
    received = rows.new_empty(sum(receive), rows.shape[1])
    dist.all_to_all_single(received, rows, receive, send)
    return received


def grouped_mm_ffn(rows: Tensor, counts: Tensor, problem: Problem) -> Tensor:
    """The experts' FFN on ``rows`` [R, H] sorted by expert, ``counts`` [E_local] of them each."""
    offsets = counts.cumsum(0).to(torch.int32)
    hidden = problem.activate(F.grouped_mm(rows, problem.gate_up_proj.transpose(1, 2), offs=offsets))
    return F.grouped_mm(hidden, problem.down_proj.transpose(1, 2), offs=offsets)


def loop_ffn(rows: Tensor, counts: Tensor, problem: Problem) -> Tensor:
    """The same with one pair of products after the other; faster where torch's grouped_mm has no good kernel."""
    parts = rows.split(counts.tolist())
    return torch.cat([
        F.linear(problem.activate(F.linear(part, up)), down)
        for part, up, down in zip(parts, problem.gate_up_proj, problem.down_proj, strict=True)
        if part.shape[0]
    ] or [rows])  # fmt: skip


def make(ffn: Callable[[Tensor, Tensor, Problem], Tensor], problem: Problem) -> list[Call]:
    """Counts travel by all_to_all_single, then the rows (k copies of a token, sorted by expert), the experts run, the
    results travel back and are summed by weight.

    Raises:
        Skipped: this torch has no grouped_mm, some rank has no expert, or the world cannot exchange what GPUs hold.
    """
    if min(problem.experts_per_rank) == 0:
        raise Skipped("needs an expert on every rank")
    if not can_exchange(problem.device.type):
        raise Skipped("torch's world has no NCCL")
    if ffn is grouped_mm_ffn and not hasattr(F, "grouped_mm"):
        raise Skipped("this version of torch has no torch.nn.functional.grouped_mm")
    world_size, num_local = dist.get_world_size(), problem.experts_per_rank[dist.get_rank()]
    shape, device = problem.shape, problem.device
    one = torch.zeros(num_local, dtype=torch.int64, device=device)
    one[0] = 1
    try:  # before anybody waits for anybody: all ranks have the same dtype
        ffn(problem.inputs[0][0].new_zeros(1, shape.hidden_size), one, problem)
    except RuntimeError as error:
        raise Skipped(f"torch's product of these experts raised {error!r}"[:300]) from error

    def call(x: Tensor, routing: Routing, kept: int) -> Tensor:
        num_tokens, top_k = routing.topk_ids.shape
        order = routing.topk_ids.flatten().argsort(stable=True)[:kept]  # dropped entries have the largest id
        counts = torch.bincount(routing.topk_ids.flatten(), minlength=shape.num_experts)[: shape.num_experts]
        arriving = counts.new_empty(world_size * num_local)
        dist.all_to_all_single(arriving, counts, [num_local] * world_size, problem.experts_per_rank)
        send = [part.sum().item() for part in counts.split(problem.experts_per_rank)]
        receive = arriving.view(world_size, num_local).sum(1).tolist()
        rows = Exchange.apply(x[order // top_k], receive, send)
        # They came source by source, each sorted by expert; the experts want all sources together.
        expert = torch.arange(num_local, device=device).repeat(world_size).repeat_interleave(arriving)
        by_expert = expert.argsort(stable=True)
        out = ffn(rows[by_expert], arriving.view(world_size, num_local).sum(0), problem)
        results = torch.empty_like(rows)
        results[by_expert] = out
        returned = Exchange.apply(results, send, receive)
        unsorted = x.new_empty(num_tokens * top_k, x.shape[1])
        if kept < len(unsorted):
            unsorted.zero_()
        unsorted[order] = returned
        return (unsorted.view(num_tokens, top_k, -1) * routing.topk_weights.to(x.dtype).unsqueeze(-1)).sum(1)

    return [partial(call, x, routing, problem.kept(routing)) for x, routing in problem.inputs]
