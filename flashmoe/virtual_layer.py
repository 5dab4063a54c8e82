"""A layer whose experts all lie on one GPU, called as several virtual ranks of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .models import LayerShape
from .routing import Router, Routing
from .virtual_ranks import VirtualRanks

__all__ = ["VirtualLayer"]


class VirtualLayer:
    """What a layer of one process is to its caller; each rank has neighbouring experts and as many of the tokens.

    Args:
        gate_up_proj, down_proj: of all experts, on the GPU.
        experts_per_rank: one count for each rank; they may differ.
        max_tokens: of one rank.
        router: of calls without a routing.
    """

    def __init__(
        self, shape: LayerShape, gate_up_proj: Tensor, down_proj: Tensor, experts_per_rank: Sequence[int],
        max_tokens: int, router: Router | None = None,
    ) -> None:  # fmt: skip
        self.gate_up_proj, self.down_proj, self.router = gate_up_proj, down_proj, router
        self.ranks = VirtualRanks(
            len(experts_per_rank), max_tokens=max_tokens, max_wire_bytes=shape.hidden_size * down_proj.dtype.itemsize,
            max_top_k=shape.top_k, max_experts=shape.num_experts,
        )  # fmt: skip
        self._shape = shape
        self._experts = [weights.detach().split(list(experts_per_rank)) for weights in (gate_up_proj, down_proj)]
        owner = [rank for rank, count in enumerate(experts_per_rank) for _ in range(count)]
        uneven = len(set(experts_per_rank)) > 1
        self._expert_map = torch.tensor(owner, dtype=torch.int32, device="cpu") if uneven else None

    def __call__(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        routing = self.router(x) if routing is None else routing
        size, y = self.ranks.ep_size, torch.empty_like(x)
        parts = [part.tensor_split(size) for part in (x, routing.topk_ids, routing.topk_weights.float())]
        self.ranks(
            *parts, *self._experts, activation=self._shape.activation, gated=self._shape.gated,
            num_experts=self._shape.num_experts, expert_map=self._expert_map, out=y.tensor_split(size),
        )  # fmt: skip
        return y

    @property
    def stats(self) -> list[dict[str, Any]]:
        """By rank, of the last call, for which this waits."""
        return [self.ranks.team.stats(0, rank) for rank in range(self.ranks.ep_size)]
