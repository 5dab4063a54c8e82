"""Models of Hugging Face transformers 5 with their experts computed here.

:func:`register` adds the name ``flashmoe`` to two of transformers' lists:

    flashmoe.hugging_face.register()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="flashmoe")

is one process with all experts, under ``torch.compile`` too. Of transformers 5.23 or later, and under torchrun,

    flashmoe.distributed.init()
    config = DistributedConfig(fsdp_size=W, ep_size=W, ep_implementation="flashmoe")
    model = AutoModelForCausalLM.from_pretrained(name, distributed_config=config)

loads to each rank its own experts, which compute the tokens of all. Import this module by its name: it needs
transformers, which flashmoe alone does not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.activations import ACT2FN
from transformers.integrations import moe

from . import groups
from .module import next_layer_number
from .ops import fused_moe

try:
    from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface
except ImportError:  # older than 5.23
    EPImplementation, EPImplementationInterface = object, None

__all__ = ["ExpertParallel", "experts_forward", "register"]

_ACTIVATIONS = {
    type(ACT2FN[theirs]): ours
    for theirs, ours in {
        "silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "relu": "relu",
    }.items()
}  # fmt: skip


def register() -> None:
    """Make ``experts_implementation="flashmoe"`` known to transformers, and ``ep_implementation="flashmoe"`` where it
    has such a choice. May be called again."""
    moe.ALL_EXPERTS_FUNCTIONS.register("flashmoe", experts_forward)
    if EPImplementationInterface is not None:
        EPImplementationInterface.register("flashmoe", ExpertParallel)


def experts_forward(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, group=None, layer: int = 0
) -> Tensor:
    """What transformers calls in place of the forward of an experts module: hidden_states [T, H] → [T, H].

    top_k_index [T, k]: the number of experts means none. group, layer: as in flashmoe.fused_moe.

    Raises what flashmoe.fused_moe raises, and NotImplementedError for a kind of expert that it does not compute:
    weights that are transposed or interleaved, another activation or gate, a norm behind each expert.
    """
    if unlike := _unlike_ours(experts):
        raise NotImplementedError(f"flashmoe does not compute {type(experts).__name__}: {unlike}")
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    return fused_moe(
        hidden_states, top_k_index, top_k_weights, getattr(experts, up), experts.down_proj,
        activation=_ACTIVATIONS[type(experts.act_fn)], gated=experts.has_gate,
        gate_up_bias=getattr(experts, f"{up}_bias") if experts.has_bias else None,
        down_bias=experts.down_proj_bias if experts.has_bias else None,
        group=group, layer=layer,
    )  # fmt: skip


class ExpertParallel(EPImplementation):
    """The experts of one layer, spread over the ranks of ``ep_mesh`` in equal blocks; ranks of ``tp_mesh`` hold the same
    batch. transformers makes one for each layer, in the order of the layers."""

    def __init__(self, experts: nn.Module, ep_mesh, tp_mesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self._experts = experts
        self._group = groups.name_of(ep_mesh.get_group())
        self._layer = next_layer_number(self._group)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], top_k_index [T, k] of all ranks' experts, top_k_weights [T, k] → [T, H]"""
        alike = self.tp_mesh.size() > 1
        batch = hidden_states, top_k_index, top_k_weights
        # A batch that several ranks hold is divided among them, or each of its tokens would be computed as often.
        mine = [self._my_rows(one) for one in batch] if alike else batch
        y = experts_forward(self._experts, *mine, group=self._group, layer=self._layer)
        return self._all_rows(y, hidden_states.shape) if alike else y

    def _my_rows(self, of_all: Tensor) -> Tensor:
        whole = DTensor.from_local(of_all, self.tp_mesh, [Replicate()], run_check=False)
        return whole.redistribute(placements=[Shard(0)]).to_local()

    def _all_rows(self, mine: Tensor, shape: torch.Size) -> Tensor:
        # The shape, since ranks may have different numbers of rows.
        return DTensor.from_local(mine, self.tp_mesh, [Shard(0)], shape=shape, stride=(shape[1], 1)).full_tensor()


def _unlike_ours(experts: nn.Module) -> str | None:
    """How the experts differ from what flashmoe.fused_moe computes."""
    if experts.is_transposed:
        return "their weights are [E, inputs, outputs]"
    if not experts.is_concatenated:
        return "rows of gate and up alternate"
    if getattr(experts, "has_post_expert_norm", False):
        return "a norm follows each"
    if experts.has_gate and type(experts)._apply_gate is not moe._default_apply_gate:
        return "their gate is a function of their own"
    if type(experts.act_fn) not in _ACTIVATIONS:
        return f"their activation is {type(experts.act_fn).__name__}"
    return None
