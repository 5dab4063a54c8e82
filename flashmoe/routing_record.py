"""The record that routers return and layers replay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Routing:
    """Which experts each token goes to, and with what weight.

    A list of (token, logical expert, weight) triples, held as a (T, k) table: entry (t, j) sends token t to
    expert ``topk_ids[t, j]``. An id equal to ``num_experts`` (or -1) means *dropped*; the weight beside it is
    never read. :meth:`coo` gives the triples, :meth:`from_coo` builds the table from them.

    topk_ids      [T, k] int32 or int64
    topk_weights  [T, k] floating point; routers give float32
    num_experts   E, how many logical experts there are
    logits        [T, E] float32, where the router has them
    exact_load    True if the router guarantees how many tokens each group of experts gets, whatever the input
    """

    topk_ids: Tensor
    topk_weights: Tensor
    num_experts: int
    logits: Tensor | None = None
    exact_load: bool = False

    def __post_init__(self) -> None:
        if self.topk_ids.ndim != 2:
            raise ValueError(f"topk_ids must have shape (T, k), got {tuple(self.topk_ids.shape)}")
        if self.topk_weights.shape != self.topk_ids.shape:
            raise ValueError(
                f"topk_weights must have the shape of topk_ids, {tuple(self.topk_ids.shape)}, "
                f"got {tuple(self.topk_weights.shape)}"
            )

    @classmethod
    def from_coo(
        cls,
        token: Tensor,
        expert: Tensor,
        weight: Tensor,
        num_tokens: int,
        num_experts: int,
        *,
        logits: Tensor | None = None,
        exact_load: bool = False,
    ) -> Routing:
        """The record of n triples: token [n], expert [n] (integers), weight [n] (floating point).

        k becomes the largest number of experts any token has (at least 1); shorter rows are filled up with
        dropped entries. A token's experts keep the order in which they are given. Differentiable in weight.
        Raises ValueError for shapes that differ, a token outside [0, num_tokens) or an expert outside
        [-1, num_experts].
        """
        for name, value in (("token", token), ("expert", expert), ("weight", weight)):
            if value.ndim != 1 or len(value) != len(token):
                raise ValueError(f"{name} must have shape ({token.numel()},), got {tuple(value.shape)}")
        token, expert = token.long(), expert.long()
        for name, value, low, high in (("token", token, 0, num_tokens - 1), ("expert", expert, -1, num_experts)):
            if len(value) and not (low <= int(value.min()) and int(value.max()) <= high):
                raise ValueError(f"{name} must be in [{low}, {high}], got {int(value.min())} to {int(value.max())}")
        order = torch.argsort(token, stable=True)
        token, expert, weight = token[order], expert[order], weight[order]
        count = torch.bincount(token, minlength=num_tokens)
        top_k = max(1, int(count.max())) if num_tokens else 1
        slot = torch.arange(len(token), device=token.device) - (count.cumsum(0) - count)[token]
        ids = expert.new_full((num_tokens, top_k), num_experts).index_put((token, slot), expert)
        weights = weight.new_zeros((num_tokens, top_k)).index_put((token, slot), weight)
        return cls(ids, weights.float(), num_experts, logits, exact_load)

    def coo(self) -> tuple[Tensor, Tensor, Tensor]:
        """(token [n], expert [n], weight [n]) of every entry that is not dropped, tokens ascending."""
        kept = (self.topk_ids >= 0) & (self.topk_ids < self.num_experts)
        return kept.nonzero()[:, 0], self.topk_ids[kept], self.topk_weights[kept]

    def tokens_per_expert(self) -> Tensor:
        """[num_experts] int64: how many entries go to each expert, dropped ones left out."""
        return torch.bincount(self.coo()[1], minlength=self.num_experts)

    def to(self, device: torch.device | str) -> Routing:
        """The same record with its tensors on ``device``."""
        logits = None if self.logits is None else self.logits.to(device)
        return Routing(
            self.topk_ids.to(device), self.topk_weights.to(device), self.num_experts, logits, self.exact_load
        )
