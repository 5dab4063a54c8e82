"""Routers, and the record they return.

A router is an ``nn.Module`` with a gate ``weight`` [num_experts, hidden_size] (the layout of Hugging Face
transformers 5, so ``gate.weight`` copies straight) that turns tokens into a :class:`Routing`. Every router
computes in float32, whatever the dtype of its weight and of the tokens, and breaks ties towards the lowest
expert index, so that the same logits always give the same experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .routing_record import Routing


def top_k_lowest_index(scores: Tensor, k: int, *, nonnegative: bool = False) -> Tensor:
    """Indices [..., k] int64 of the k largest of scores [..., n] float32, descending; equal scores by index.

    ``torch.topk`` leaves open which of two equal scores it takes. A float32 widened to float64 has 29 zero bits
    at its end: the index goes there, so that no two keys are equal and no two scores change places.
    ``nonnegative`` promises that no score is below zero, which is cheaper. NaN and +inf count as largest.
    """
    n = scores.shape[-1]
    scores = scores.detach()
    if not nonnegative:
        scores = scores.clamp(min=torch.finfo(torch.float32).min)  # an index after -inf would make it NaN
    bits = scores.double().view(torch.int64)
    index = torch.arange(n - 1, -1, -1, device=scores.device)
    if not nonnegative:
        index = torch.where(bits < 0, n - 1 - index, index)  # larger bits make a negative number smaller
    return (bits + index).view(torch.float64).topk(k, dim=-1).indices


class Router(nn.Module):
    """What all routers share: the gate, the hook before top-k, and the record.

    A subclass says how logits become probabilities (:meth:`probabilities`) and how these become experts and
    weights (:meth:`select`).
    """

    exact_load = False

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, *, device=None, dtype=None) -> None:
        super().__init__()
        for name, value in (("hidden_size", hidden_size), ("num_experts", num_experts), ("top_k", top_k)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if top_k > num_experts:
            raise ValueError(f"top_k must be at most num_experts = {num_experts}, got {top_k}")
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=0.02)
        self._hooks: list[Callable[[Tensor], Tensor]] = []

    def probabilities(self, logits: Tensor) -> Tensor:
        """logits [T, E] → what the hook sees and the weights are taken from, [T, E] float32."""
        return logits.softmax(dim=-1)

    def select(self, probabilities: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(topk_ids [T, k] int64, topk_weights [T, k] float32)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Routing:
        """x [..., hidden_size] → the Routing of its T = numel / hidden_size tokens."""
        if x.shape[-1] != self.hidden_size:
            raise ValueError(f"x must have shape (..., hidden_size = {self.hidden_size}), got {tuple(x.shape)}")
        logits = F.linear(x.reshape(-1, self.hidden_size).float(), self.weight.float())
        probabilities = self.probabilities(logits)
        for hook in self._hooks:
            hooked = hook(probabilities)
            if hooked.shape != probabilities.shape:
                raise ValueError(
                    f"the hook of a router must return shape (T, num_experts) = {tuple(probabilities.shape)}, "
                    f"got {tuple(hooked.shape)}"
                )
            probabilities = hooked.float()
        topk_ids, topk_weights = self.select(probabilities, logits)
        return Routing(topk_ids, topk_weights, self.num_experts, logits, self.exact_load)

    @contextmanager
    def hook(self, function: Callable[[Tensor], Tensor]) -> Iterator[Router]:
        """Within the ``with`` block, ``function`` maps the probabilities [T, E] before top-k sees them.

        Gradients flow through it into the combine weights. Hooks nest (the innermost runs last) and are removed
        when the block ends, also by an exception. A function that returns its argument changes no bit. With a
        selection bias, the hook sees the probabilities without it.
        """
        self._hooks.append(function)
        try:
            yield self
        finally:
            self._hooks.remove(function)

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}"


class SoftmaxTopK(Router):
    """Softmax over all experts, then the k largest, which are normalised to sum to 1 if ``renormalize``.

    Source: the Switch Transformer's gate (arXiv 2101.03961) with k experts; renormalised as in GShard
    (arXiv 2006.16668), Mixtral (arXiv 2401.04088) and Qwen3-MoE, not renormalised as in OLMoE (arXiv 2409.02060).
    """

    def __init__(self, hidden_size, num_experts, top_k, *, renormalize: bool = True, device=None, dtype=None) -> None:
        super().__init__(hidden_size, num_experts, top_k, device=device, dtype=dtype)
        self.renormalize = renormalize

    def select(self, probabilities, logits):
        ids = top_k_lowest_index(probabilities, self.top_k, nonnegative=True)
        weights = probabilities.gather(-1, ids)
        return ids, weights / weights.sum(-1, keepdim=True) if self.renormalize else weights

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, renormalize={self.renormalize}"


class TopKSoftmax(Router):
    """The k largest logits, then softmax over these k alone.

    Source: Shazeer et al. 2017 (arXiv 1701.06538), without the noise; gpt-oss uses it.
    A hook that turns probability p into q moves the logit by log q - log p; q = 0 rules the expert out.
    """

    def select(self, probabilities, logits):
        if self._hooks:
            tiny = torch.finfo(torch.float32).tiny
            native = logits.softmax(dim=-1)
            moved = logits + (probabilities.clamp_min(tiny).log() - native.clamp_min(tiny).log())
            untouched = (probabilities == 0) & (native == 0)  # a probability that underflowed, left alone
            logits = torch.where((probabilities > 0) | untouched, moved, -torch.inf)
        ids = top_k_lowest_index(logits, self.top_k)
        return ids, logits.gather(-1, ids).softmax(dim=-1)


class SigmoidBias(Router):
    """Sigmoid scores; a bias per expert takes part in the selection and never in the weights.

    Source: auxiliary-loss-free load balancing (arXiv 2408.15664), as used by DeepSeek-V3 (arXiv 2412.19437).
    ``selection_bias`` [num_experts] is a buffer that starts at zero: no gradient trains it. The weights are
    normalised to sum to 1 if ``renormalize``, then multiplied by ``routed_scaling_factor``.
    """

    def __init__(
        self, hidden_size, num_experts, top_k, *, renormalize: bool = True, routed_scaling_factor: float = 1.0,
        device=None, dtype=None,
    ) -> None:  # fmt: skip
        super().__init__(hidden_size, num_experts, top_k, device=device, dtype=dtype)
        self.renormalize, self.routed_scaling_factor = renormalize, routed_scaling_factor
        self.register_buffer("selection_bias", torch.zeros(num_experts, device=device, dtype=torch.float32))

    def probabilities(self, logits):
        return logits.sigmoid()

    def select(self, probabilities, logits):
        ids = top_k_lowest_index(probabilities + self.selection_bias.float(), self.top_k)
        return ids, self.weigh(probabilities, ids)

    def weigh(self, probabilities: Tensor, ids: Tensor) -> Tensor:
        weights = probabilities.gather(-1, ids)
        if self.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.routed_scaling_factor

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, renormalize={self.renormalize}, "
            f"routed_scaling_factor={self.routed_scaling_factor}"
        )


class GroupLimited(SigmoidBias):
    """The best ``topk_groups`` of ``num_groups`` groups of neighbouring experts, then k experts inside these.

    Source: DeepSeek-V2 (arXiv 2405.04434) and DeepSeek-V3 (arXiv 2412.19437).
    score="sigmoid" is V3: sigmoid scores plus selection bias, a group is worth the sum of its two best, weights
    renormalised by default. score="softmax" is V2: softmax over all experts, no bias, a group is worth its best
    expert, weights not renormalised by default. The weights are multiplied by ``routed_scaling_factor``.
    """

    def __init__(
        self, hidden_size, num_experts, top_k, *, num_groups: int = 8, topk_groups: int = 4, score: str = "sigmoid",
        renormalize: bool | None = None, routed_scaling_factor: float = 1.0, device=None, dtype=None,
    ) -> None:  # fmt: skip
        if score not in ("sigmoid", "softmax"):
            raise ValueError(f'score must be "sigmoid" or "softmax", got {score!r}')
        super().__init__(
            hidden_size, num_experts, top_k, renormalize=score == "sigmoid" if renormalize is None else renormalize,
            routed_scaling_factor=routed_scaling_factor, device=device, dtype=dtype,
        )  # fmt: skip
        group_size = _group_size(num_experts, num_groups)
        if not 1 <= topk_groups <= num_groups:
            raise ValueError(f"topk_groups must be in [1, num_groups = {num_groups}], got {topk_groups}")
        if top_k > topk_groups * group_size:
            raise ValueError(
                f"top_k must be at most the experts of topk_groups = {topk_groups} groups of {group_size}, got {top_k}"
            )
        self.num_groups, self.topk_groups, self.score = num_groups, topk_groups, score
        if score == "softmax":
            self.selection_bias = None

    def probabilities(self, logits):
        return logits.sigmoid() if self.score == "sigmoid" else logits.softmax(dim=-1)

    def select(self, probabilities, logits):
        choice = probabilities if self.selection_bias is None else probabilities + self.selection_bias.float()
        groups = choice.unflatten(-1, (self.num_groups, -1))
        best = min(groups.shape[-1], 2 if self.score == "sigmoid" else 1)
        chosen = top_k_lowest_index(groups.topk(best, dim=-1).values.sum(-1), self.topk_groups)
        open_groups = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(-1, chosen, True)
        choice = groups.masked_fill(~open_groups.unsqueeze(-1), -torch.inf).flatten(-2)
        ids = top_k_lowest_index(choice, self.top_k)
        return ids, self.weigh(probabilities, ids)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, num_groups={self.num_groups}, topk_groups={self.topk_groups}, "
            f"score={self.score!r}"
        )


class Grouped(Router):
    """k / num_groups experts in *each* of num_groups groups of neighbouring experts: loads balance exactly.

    Source: Mixture of Grouped Experts, Pangu Pro MoE (arXiv 2505.21411). Softmax runs over all experts and the
    selected probabilities are the weights as they are; ``expert_scale`` adds a learned factor per expert, which
    starts at 1. Every group receives exactly T · k / num_groups entries, so ranks that own the same number of
    whole groups do the same work. ``num_groups`` defaults to top_k: one expert in each group.
    """

    exact_load = True

    def __init__(
        self, hidden_size, num_experts, top_k, *, num_groups: int | None = None, expert_scale: bool = False,
        device=None, dtype=None,
    ) -> None:  # fmt: skip
        super().__init__(hidden_size, num_experts, top_k, device=device, dtype=dtype)
        self.num_groups = top_k if num_groups is None else num_groups
        _group_size(num_experts, self.num_groups)
        if top_k % self.num_groups:
            raise ValueError(f"top_k must be a multiple of num_groups = {self.num_groups}, got {top_k}")
        scale = nn.Parameter(torch.ones(num_experts, device=device, dtype=dtype)) if expert_scale else None
        self.register_parameter("expert_scale", scale)

    def select(self, probabilities, logits):
        groups = probabilities.unflatten(-1, (self.num_groups, -1))
        inside = top_k_lowest_index(groups, self.top_k // self.num_groups, nonnegative=True)
        first = torch.arange(self.num_groups, device=inside.device) * groups.shape[-1]
        ids = (inside + first[:, None]).flatten(-2)
        weights = probabilities.gather(-1, ids)
        return ids, weights if self.expert_scale is None else weights * self.expert_scale.float()[ids]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_groups={self.num_groups}, expert_scale={self.expert_scale is not None}"


def _group_size(num_experts: int, num_groups: int) -> int:
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"num_groups must divide num_experts = {num_experts}, got {num_groups}")
    return num_experts // num_groups


ROUTERS: dict[str, type[Router]] = {
    "softmax_topk": SoftmaxTopK,
    "topk_softmax": TopKSoftmax,
    "sigmoid_bias": SigmoidBias,
    "group_limited": GroupLimited,
    "grouped": Grouped,
}


def make_router(
    router: str | Callable[[Tensor], Routing], hidden_size: int, num_experts: int, top_k: int, **options
) -> Callable[[Tensor], Routing]:
    """The router of that name with its options, or the module or function itself after a look at its sizes.

    A module or function takes x [T, hidden_size] and returns a :class:`Routing`, or a pair (topk_ids,
    topk_weights). Raises ValueError for an unknown name, options beside a ready router, or a router made for
    other sizes; TypeError for anything that is neither a name nor callable.
    """
    if isinstance(router, str):
        if router not in ROUTERS:
            raise ValueError(f"router must be one of {', '.join(ROUTERS)}, got {router!r}")
        return ROUTERS[router](hidden_size, num_experts, top_k, **options)
    if not callable(router):
        raise TypeError(f"router must be a name, a module or a function, got {type(router).__name__}")
    if options:
        raise ValueError(f"options of a router go with its name, got {sorted(options)} beside a ready router")
    for name, expected in (("hidden_size", hidden_size), ("num_experts", num_experts), ("top_k", top_k)):
        if getattr(router, name, expected) != expected:
            raise ValueError(f"router must have {name} = {expected}, got {getattr(router, name)}")
    return router
