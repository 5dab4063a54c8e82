"""Routers, and the record they return.

A router is an ``nn.Module`` with a gate ``weight`` [num_experts, hidden_size] (the layout of Hugging Face
transformers 5, so ``gate.weight`` copies straight) that turns tokens into a :class:`Routing`. Every router
computes in float32, whatever the dtype of its weight and of the tokens, and breaks ties towards the lowest
expert index, so that the same logits always give the same experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .router import Router
from .routing_record import Routing
from .selection import Selection, select_experts


class SoftmaxTopK(Router):
    """Softmax over all experts, then the k largest, which are normalised to sum to 1 if ``renormalize``.

    Source: the Switch Transformer's gate (arXiv 2101.03961) with k experts; renormalised as in GShard
    (arXiv 2006.16668), Mixtral (arXiv 2401.04088) and Qwen3-MoE, not renormalised as in OLMoE (arXiv 2409.02060).
    """

    def __init__(self, hidden_size, num_experts, top_k, *, renormalize: bool = True, device=None, dtype=None) -> None:
        super().__init__(hidden_size, num_experts, top_k, device=device, dtype=dtype)
        self.renormalize = renormalize

    def select(self, probabilities, logits):
        return select_experts(probabilities, Selection(self.top_k, renormalize=self.renormalize))

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
        return select_experts(logits, Selection(self.top_k, softmax=True))


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
        return select_experts(probabilities, self.selection(), self.selection_bias)

    def selection(self) -> Selection:
        return Selection(
            self.top_k, renormalize=self.renormalize, epsilon=1e-20, scale=self.routed_scaling_factor
        )

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

    def selection(self):
        return super().selection()._replace(
            num_groups=self.num_groups, open_groups=self.topk_groups, best_of_group=2 if self.score == "sigmoid" else 1
        )

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
        selection = Selection(
            self.top_k, num_groups=self.num_groups, open_groups=self.num_groups, in_each_group=True
        )
        ids, weights = select_experts(probabilities, selection)
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
