"""A layer and the tokens of every rank, drawn from one seed: every rank knows the truth without a message."""

import threading
from collections.abc import Sequence

import torch

import flashmoe
from flashmoe import _C, moe_reference


class Problem:
    """A layer and the tokens of each of ``ep_size`` ranks."""

    def __init__(
        self,
        seed: int,
        tokens: Sequence[int],
        *,
        hidden_size: int = 64,
        intermediate_size: int = 96,
        num_experts: int = 12,
        top_k: int = 3,
        dtype: torch.dtype = torch.float32,
        owners: Sequence[int] | None = None,
        one_rank: int | None = None,
        dropped: bool = False,
        backward: bool = False,
    ):
        """``backward``: a run is a forward and a backward call."""
        ep_size = len(tokens)
        g = torch.Generator().manual_seed(seed)
        gate_up_proj = torch.randn(num_experts, 2 * intermediate_size, hidden_size, generator=g)
        down_proj = torch.randn(num_experts, hidden_size, intermediate_size, generator=g)
        self.gate_up_proj, self.down_proj = gate_up_proj.mul_(0.1).to(dtype), down_proj.mul_(0.1).to(dtype)
        self.expert_map = None if owners is None else torch.tensor(owners, dtype=torch.int32)
        block = num_experts // ep_size
        self.owners = [e // block for e in range(num_experts)] if owners is None else list(owners)
        self.x, self.topk_ids, self.topk_weights = [], [], []
        for num_tokens in tokens:
            scores = torch.rand(num_tokens, num_experts, generator=g)
            if one_rank is not None:
                scores += torch.tensor([float(owner == one_rank) for owner in self.owners])
            ids = scores.topk(top_k, dim=1).indices if num_tokens else torch.empty(0, top_k, dtype=torch.int64)
            if dropped:
                ids[torch.rand(ids.shape, generator=g) < 0.3] = num_experts
            self.x.append(torch.randn(num_tokens, hidden_size, generator=g).to(dtype))
            self.topk_ids.append(ids)
            self.topk_weights.append(torch.rand(num_tokens, top_k, generator=g))
        for leaf in (self.gate_up_proj, self.down_proj, *self.x, *self.topk_weights):
            leaf.requires_grad_(backward)

    def weights(self, ep_rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        mine = [e for e, owner in enumerate(self.owners) if owner == ep_rank]
        return self.gate_up_proj[mine], self.down_proj[mine]

    def run(self, ep_rank: int, process_group: object, layer: int = 0) -> torch.Tensor:
        y = flashmoe.fused_moe(
            self.x[ep_rank], self.topk_ids[ep_rank], self.topk_weights[ep_rank], *self.weights(ep_rank),
            group=process_group, expert_map=self.expert_map, layer=layer,
        )  # fmt: skip
        if y.requires_grad:
            y.sum().backward()
        return y.detach()

    def alone(self, ep_rank: int) -> torch.Tensor:
        """The same tokens where one process owns every expert."""
        return flashmoe.fused_moe(
            self.x[ep_rank], self.topk_ids[ep_rank], self.topk_weights[ep_rank], self.gate_up_proj, self.down_proj
        )

    def as_threads(self, **team_arguments: object) -> list[torch.Tensor]:
        """All ranks' results where each rank is a thread of this process."""
        x = self.x[0]
        limits = _C.Limits(
            len(self.x), max(1, *(len(rows) for rows in self.x)), x.shape[1] * x.element_size(),
            self.topk_ids[0].shape[1], len(self.owners),
        )  # fmt: skip
        team = _C.local_team(limits, timeout_s=20.0, entry_timeout_s=20.0, **team_arguments)
        results: list = [None] * len(team)

        def one(ep_rank: int) -> None:
            results[ep_rank] = self.run(ep_rank, team[ep_rank])

        threads = [threading.Thread(target=one, args=(ep_rank,)) for ep_rank in range(len(team))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(result is not None for result in results)
        return results

    def check(self, ep_rank: int, y: torch.Tensor) -> None:
        truth = moe_reference(
            self.x[ep_rank], self.topk_ids[ep_rank], self.topk_weights[ep_rank], self.gate_up_proj, self.down_proj
        )
        # bf16 rounds the result and, between the two products, the activations: 2^-8 each.
        tolerance = 1e-5 if y.dtype == torch.float32 else 1.5e-2
        torch.testing.assert_close(y.float(), truth, rtol=tolerance, atol=tolerance)
