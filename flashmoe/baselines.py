"""What one would use instead of flashmoe: Hugging Face's expert implementations, and a pipeline of collectives."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ._C import available_memory
from .models import LayerShape
from .reference import ACTIVATIONS
from .routing import Routing

HUGGING_FACE = ("eager", "grouped_mm", "batched_mm")
PIPELINES = ("pipeline-grouped_mm", "pipeline-loop")
ONE_PROCESS = "one-process"
NAMES = (*(f"hf-{name}" for name in HUGGING_FACE), *PIPELINES, ONE_PROCESS)

_HF_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}


def of_ranks(ranks: int) -> list[str]:
    """The baselines that a run of so many ranks can be compared with."""
    if ranks == 1:
        return [f"hf-{name}" for name in HUGGING_FACE]
    return [*PIPELINES, ONE_PROCESS]


class Skipped(Exception):
    """A baseline that cannot take part; the message says why."""


def hugging_face(
    implementation: str, shape: LayerShape, x: Tensor, routing: Routing, gate_up_proj: Tensor, down_proj: Tensor
) -> Callable[[], Tensor]:
    """Experts of transformers 5 with the weights as they are, told to use one of its implementations.

    The class is the one of a published model with this kind of expert; it gets the router's choice in x's dtype, as
    in that model.

    Args:
        x: [T, hidden_size]; the projections hold all experts.

    Raises:
        Skipped: transformers is missing or too old, the implementation needs too much memory, or entries are dropped.
    """
    if int(routing.tokens_per_expert().sum()) < routing.topk_ids.numel():
        raise Skipped("drops nothing")
    if implementation == "batched_mm":
        needed = routing.topk_ids.numel() * shape.expert_elements * x.element_size()
        limit = (torch.cuda.mem_get_info(x.device)[0] if x.is_cuda else available_memory()) // 4
        if needed > limit:
            raise Skipped(
                f"copies every row's expert: {needed / 2**30:.1f} GiB, more than a quarter of the memory left"
            )
    try:
        if shape.gated:
            from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts as Experts
        else:
            from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts as Experts
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise Skipped(f"needs transformers 5 (pip install 'flashmoe[bench]'): {error}") from error
    if implementation != "eager" and implementation not in ALL_EXPERTS_FUNCTIONS:
        raise Skipped("not in this version of transformers")
    activation = _HF_ACTIVATIONS[shape.activation]
    config = SimpleNamespace(
        num_experts=shape.num_experts, n_routed_experts=shape.num_experts, hidden_size=shape.hidden_size,
        moe_intermediate_size=shape.intermediate_size, moe_latent_size=None, hidden_act=activation,
        mlp_hidden_act=activation, _experts_implementation=implementation,
    )  # fmt: skip
    with torch.device("meta"):
        experts = Experts(config)
    setattr(experts, "gate_up_proj" if shape.gated else "up_proj", torch.nn.Parameter(gate_up_proj, False))
    experts.down_proj = torch.nn.Parameter(down_proj, False)
    weights = routing.topk_weights.to(x.dtype)
    return lambda: experts(x, routing.topk_ids, weights)


def can_exchange(device: str) -> bool:
    """Whether torch's world can do an all-to-all of tensors there: ``cpu`` or ``cuda``."""
    return device == "cpu" or "cuda:nccl" in dist.get_backend_config()


def grouped_mm_ffn(rows: Tensor, counts: Tensor, gate_up_proj: Tensor, down_proj: Tensor, act: Callable) -> Tensor:
    """The experts' FFN on ``rows`` [R, H] sorted by expert, ``counts`` [E_local] of them each."""
    offsets = counts.cumsum(0).to(torch.int32)
    hidden = act(F.grouped_mm(rows, gate_up_proj.transpose(1, 2), offs=offsets))
    return F.grouped_mm(hidden, down_proj.transpose(1, 2), offs=offsets)


def loop_ffn(rows: Tensor, counts: Tensor, gate_up_proj: Tensor, down_proj: Tensor, act: Callable) -> Tensor:
    """The same with one pair of products after the other; faster where torch's grouped_mm has no good kernel."""
    parts = rows.split(counts.tolist())
    return torch.cat([
        F.linear(act(F.linear(part, up)), down)
        for part, up, down in zip(parts, gate_up_proj, down_proj, strict=True)
        if part.shape[0]
    ] or [rows])  # fmt: skip


def pipeline(
    name: str, shape: LayerShape, x: Tensor, routing: Routing, gate_up_proj: Tensor, down_proj: Tensor,
    experts_per_rank: list[int],
) -> Callable[[], Tensor]:  # fmt: skip
    """Expert parallelism as bulk-synchronous collectives over torch's world, the usual way of doing it.

    Counts travel by all_to_all_single, then the rows (k copies of a token, sorted by expert), the experts run, the
    results travel back and are summed by weight.

    Args:
        x: this rank's [T, hidden_size]; the projections hold this rank's experts.
        experts_per_rank: neighbouring experts, rank by rank.

    Raises:
        Skipped: this torch has no grouped_mm, some rank has no expert, or the world cannot exchange what GPUs hold.
    """
    if min(experts_per_rank) == 0:
        raise Skipped("needs an expert on every rank")
    if not can_exchange(x.device.type):
        raise Skipped("torch's world has no NCCL")
    ffn = grouped_mm_ffn if name == "pipeline-grouped_mm" else loop_ffn
    if ffn is grouped_mm_ffn and not hasattr(F, "grouped_mm"):
        raise Skipped("this version of torch has no torch.nn.functional.grouped_mm")
    act = ACTIVATIONS[shape.activation]
    if shape.gated:
        plain = act

        def act(hidden: Tensor) -> Tensor:
            gate, up = hidden.chunk(2, dim=-1)
            return plain(gate) * up

    num_tokens, top_k = routing.topk_ids.shape
    num_kept = int(routing.tokens_per_expert().sum())
    world_size, rank = dist.get_world_size(), dist.get_rank()
    num_local = experts_per_rank[rank]
    weights = routing.topk_weights.to(x.dtype).unsqueeze(-1)

    def call() -> Tensor:
        order = routing.topk_ids.flatten().argsort(stable=True)[:num_kept]  # dropped entries have the largest id
        counts = torch.bincount(routing.topk_ids.flatten(), minlength=shape.num_experts)[: shape.num_experts]
        arriving = counts.new_empty(world_size * num_local)
        dist.all_to_all_single(arriving, counts, [num_local] * world_size, experts_per_rank)
        send = [part.sum().item() for part in counts.split(experts_per_rank)]
        receive = arriving.view(world_size, num_local).sum(1).tolist()
        rows = x.new_empty(sum(receive), x.shape[1])
        dist.all_to_all_single(rows, x[order // top_k], receive, send)
        # They came source by source, each sorted by expert; the experts want all sources together.
        expert = torch.arange(num_local, device=x.device).repeat(world_size).repeat_interleave(arriving)
        by_expert = expert.argsort(stable=True)
        out = ffn(rows[by_expert], arriving.view(world_size, num_local).sum(0), gate_up_proj, down_proj, act)
        results = torch.empty_like(rows)
        results[by_expert] = out
        returned = x.new_empty(num_kept, x.shape[1])
        dist.all_to_all_single(returned, results, send, receive)
        unsorted = x.new_empty(num_tokens * top_k, x.shape[1])
        if num_kept < len(unsorted):
            unsorted.zero_()
        unsorted[order] = returned
        return (unsorted.view(num_tokens, top_k, -1) * weights).sum(1)

    return call
