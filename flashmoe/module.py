"""The layer: a router, the experts' weights, and one call of the operator."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from . import groups, ops
from .arguments import ACTIVATION_CODES
from .routing import Routing, make_router

__all__ = ["MoE", "expert_parameters"]

# Layers are numbered per group in the order in which they are made, from 1: that order is the same on all ranks
# of a model, so the number names the layer in a call (0 is a call of fused_moe without a layer).
_layer_numbers: collections.defaultdict[str | None, itertools.count] = collections.defaultdict(
    lambda: itertools.count(1)
)


def next_layer_number(group: str | None) -> int:
    return next(_layer_numbers[group])


class MoE(nn.Module):
    """A Mixture-of-Experts layer: y = Σ over the top-k experts of weight · down(act(gate(x)) · up(x)).

    hidden_size        H: what the router sees, what travels, and what the experts take in
    intermediate_size  I: the width inside an expert
    num_experts        E, over all ranks of the group
    top_k              experts per token
    router             a name from flashmoe.routing.ROUTERS (with its default options), or a module or function
                       x [T, H] → Routing or (topk_ids, topk_weights)
    activation, gated  as in flashmoe.fused_moe; bias: whether the projections have biases
    group              None: this process owns every expert. A ProcessGroup, or its flashmoe name: the layer is
                       one of several that must be made and called in the same order on all its ranks
    expert_map         the rank that owns each expert, E integers; None: equal contiguous blocks
    max_tokens         a call with more tokens on this rank raises ValueError; None: the group's limit alone

    Parameters, of ``dtype`` on ``device``: ``router.weight`` [E, H], ``gate_up_proj`` [E_local, 2I, H] (gate rows
    first; [E_local, I, H] if not gated), ``down_proj`` [E_local, H, I], and with bias ``gate_up_bias``
    [E_local, 2I] and ``down_bias`` [E_local, H]: the layout of Hugging Face transformers 5. They hold this rank's
    experts, ``local_experts``, in ascending order.

    They start as normal noise of standard deviation 0.02 (biases zero), drawn per expert from torch's seed: ranks
    seeded alike make the layer that one process would make, whatever the placement.

    Raises ValueError for sizes that do not fit each other or the group.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        router: str | Callable[[Tensor], Routing | tuple[Tensor, Tensor]] = "softmax_topk",
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
        group=None,
        expert_map: Tensor | Sequence[int] | None = None,
        max_tokens: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            "hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_experts": num_experts,
            "top_k": top_k, "max_tokens": 1 if max_tokens is None else max_tokens,
        }  # fmt: skip
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if activation not in ACTIVATION_CODES:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATION_CODES)}, got {activation!r}")
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_experts, self.top_k = num_experts, top_k
        self.activation, self.gated, self.max_tokens = activation, gated, max_tokens

        # The group by name, as the operator takes it: a module that holds no handle can be copied and pickled.
        self.group: str | None = None if group is None else groups.name_of(group)
        self.ep_rank, self.ep_size = 0, 1
        if self.group is not None:
            handle = groups.find(self.group)
            self.ep_rank, self.ep_size = handle.ep_rank, handle.ep_size
            if self.ep_size > 1:  # the group of one rank grows with its calls
                _check_limits(handle.limits, max_tokens, top_k, num_experts)
        # No buffer, since it stays on the CPU when the layer moves: the operator reads it there.
        self.expert_map = self._placement(expert_map)
        self.layer = next_layer_number(self.group)

        options = {"device": device, "dtype": dtype}
        if isinstance(router, str):
            self.router = make_router(router, hidden_size, num_experts, top_k, **options)
        else:
            self.router = make_router(router, hidden_size, num_experts, top_k)
        num_local, up = len(self.local_experts), (2 if gated else 1) * intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num_local, up, hidden_size, **options))
        self.down_proj = nn.Parameter(torch.empty(num_local, hidden_size, intermediate_size, **options))
        self.gate_up_bias = nn.Parameter(torch.empty(num_local, up, **options)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(num_local, hidden_size, **options)) if bias else None
        self.reset_parameters()

    def _placement(self, expert_map) -> Tensor | None:
        """Checks the expert map, and sets local_experts by it."""
        num_experts, ep_size = self.num_experts, self.ep_size
        if expert_map is None:
            if num_experts % ep_size:
                raise ValueError(
                    f"num_experts must be a multiple of the group's size {ep_size} without an expert_map, "
                    f"got {num_experts}"
                )
            num_local = num_experts // ep_size
            self.local_experts = list(range(self.ep_rank * num_local, (self.ep_rank + 1) * num_local))
            return None
        ranks = expert_map.tolist() if isinstance(expert_map, Tensor) else list(expert_map)
        if len(ranks) != num_experts:
            raise ValueError(f"expert_map must hold num_experts = {num_experts} ranks, got {len(ranks)}")
        for expert, rank in enumerate(ranks):
            if not (isinstance(rank, int) and 0 <= rank < ep_size):
                raise ValueError(f"expert_map[{expert}] must be a rank in [0, {ep_size}), got {rank!r}")
        self.local_experts = [expert for expert, rank in enumerate(ranks) if rank == self.ep_rank]
        return torch.tensor(ranks, dtype=torch.int32, device="cpu")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the experts' weights anew; an expert's values do not depend on the rank that holds it."""
        seed = int(torch.randint(2**62, (), device="cpu"))
        for index, expert in enumerate(self.local_experts if self.down_proj.device.type != "meta" else []):
            generator = torch.Generator(self.down_proj.device).manual_seed(seed + expert)
            self.gate_up_proj[index].normal_(std=0.02, generator=generator)
            self.down_proj[index].normal_(std=0.02, generator=generator)
        for bias in (self.gate_up_bias, self.down_bias):
            if bias is not None:
                bias.zero_()

    def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        """x [..., H] → y [..., H]. ``routing`` replays a record instead of asking the router.

        Raises what flashmoe.fused_moe raises, and ValueError for more than max_tokens tokens or a routing made
        for another number of experts.
        """
        if x.ndim == 0 or x.shape[-1] != self.hidden_size:
            raise ValueError(f"x must have shape (..., hidden_size = {self.hidden_size}), got {tuple(x.shape)}")
        tokens = x.reshape(-1, self.hidden_size)
        if self.max_tokens is not None and tokens.shape[0] > self.max_tokens:
            raise ValueError(f"x must hold at most max_tokens = {self.max_tokens} tokens, got {tokens.shape[0]}")
        if routing is None:
            routing = self.router(tokens)
        if isinstance(routing, Routing):
            if routing.num_experts != self.num_experts:
                raise ValueError(f"routing must be for {self.num_experts} experts, got {routing.num_experts}")
            routing = routing.topk_ids, routing.topk_weights
        topk_ids, topk_weights = routing
        return ops.fused_moe(
            x, topk_ids, topk_weights, self.gate_up_proj, self.down_proj,
            activation=self.activation, gated=self.gated,
            gate_up_bias=self.gate_up_bias, down_bias=self.down_bias,
            group=self.group, expert_map=self.expert_map, layer=self.layer,
        )  # fmt: skip

    @property
    def stats(self) -> dict | None:
        """Of this layer's last call, forward or backward, None before the first: ``tokens_per_expert``, the rows each
        local expert computed (from all ranks), and ``bytes_per_peer``, what this rank sent to each rank by kind
        (header, rows, results, signals) as counted where it was sent. After a call on a GPU this waits for the GPU,
        and tells of the last call that ran there, also in the replay of a graph.
        """
        return groups.stats_of_call(self.group, self.layer)

    def extra_repr(self) -> str:
        placement = f"{len(self.local_experts)} of them on rank {self.ep_rank} of {self.ep_size}"
        return (
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, "
            f"num_experts={self.num_experts} ({placement}), top_k={self.top_k}, activation={self.activation!r}, "
            f"gated={self.gated}, bias={self.down_bias is not None}, dtype={self.down_proj.dtype}"
        )


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model's layers that are of this rank's experts alone, by their names in the model.

    No other rank of their group holds them, so nothing may average them over it (docs/training.md). Those of layers
    without a group, or with a group of one rank, are not among them.
    """
    return {
        f"{place}.{name}" if place else name: parameter
        for place, layer in model.named_modules()
        if isinstance(layer, MoE) and layer.ep_size > 1
        for name, parameter in layer.named_parameters(recurse=False)
    }


def _check_limits(limits, max_tokens: int | None, top_k: int, num_experts: int) -> None:
    for name, value, limit in (
        ("max_tokens", max_tokens, limits.max_tokens),
        ("top_k", top_k, limits.max_top_k),
        ("num_experts", num_experts, limits.max_experts),
    ):
        if value is not None and value > limit:
            raise ValueError(f"{name} must be at most the group's limit {limit}, got {value}")
