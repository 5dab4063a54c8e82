"""Experts of transformers 5 with the weights as they are, told to use one of its implementations."""

from functools import partial
from types import SimpleNamespace

import torch

from .._C import available_memory
from .problem import Call, Problem, Skipped

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}


def make(implementation: str, problem: Problem) -> list[Call]:
    """The class is the one of a published model with this kind of expert; it gets the router's choice in x's dtype, as
    in that model.

    Raises:
        Skipped: transformers is missing or too old, the implementation needs too much memory, or entries are dropped.
    """
    problem.needs_every_entry()
    shape = problem.shape
    if implementation == "batched_mm":
        needed = problem.num_tokens * shape.top_k * shape.expert_elements * problem.dtype.itemsize
        needed *= 2 if problem.backward else 1  # the copies' gradients
        on_gpu = problem.device.type == "cuda"
        limit = (torch.cuda.mem_get_info(problem.device)[0] if on_gpu else available_memory()) // 4
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
    activation = _ACTIVATIONS[shape.activation]
    config = SimpleNamespace(
        num_experts=shape.num_experts, n_routed_experts=shape.num_experts, hidden_size=shape.hidden_size,
        moe_intermediate_size=shape.intermediate_size, moe_latent_size=None, hidden_act=activation,
        mlp_hidden_act=activation, _experts_implementation=implementation,
    )  # fmt: skip
    with torch.device("meta"):
        experts = Experts(config)
    up_name = "gate_up_proj" if shape.gated else "up_proj"
    for name, weights in ((up_name, problem.gate_up_proj), ("down_proj", problem.down_proj)):
        delattr(experts, name)  # a parameter would be another leaf, and the gradient would be its own
        setattr(experts, name, weights)
    return [
        partial(experts, x, routing.topk_ids, routing.topk_weights.to(x.dtype)) for x, routing in problem.inputs
    ]
