"""Which experts the tokens of a measurement go to, where the router's own choice is not what shall be measured."""

import torch

from .routing_record import Routing

SKEWS = ("router", "uniform", "zipf", "hot")
_ZIPF_EXPONENT = 1.0
_HOT_SHARE = 0.5  # of the tokens, that have the hot expert among theirs


def skewed(routing: Routing, skew: str, seed: int) -> Routing:
    """The same weights with other experts, drawn by ``seed``; no token has one twice.

    Args:
        skew: router: as it is. uniform: every expert gets as many tokens as any other, give or take one. zipf: expert
            e is chosen in proportion to 1 / (e + 1). hot: half of the tokens have expert 0, the rest is uniform.

    Raises:
        ValueError: not one of SKEWS.
    """
    if skew not in SKEWS:
        raise ValueError(f"skew must be one of {', '.join(SKEWS)}, got {skew!r}")
    if skew == "router":
        return routing
    num_tokens, top_k = routing.topk_ids.shape
    experts, generator = routing.num_experts, torch.Generator().manual_seed(seed)
    if skew == "uniform":
        # Hand after hand from a shuffled pack: k neighbours of one round are different experts.
        pack = torch.randperm(experts, generator=generator)
        ids = pack[torch.arange(num_tokens * top_k) % experts].view(num_tokens, top_k)
    else:
        share = torch.ones(experts)
        if skew == "zipf":
            share = torch.arange(1, experts + 1) ** -_ZIPF_EXPONENT
        ids = torch.multinomial(share.expand(num_tokens, -1), top_k, generator=generator)
    if skew == "hot":
        hot = torch.rand(num_tokens, generator=generator) < _HOT_SHARE
        ids[hot & (ids != 0).all(1), 0] = 0
    return Routing(ids.to(routing.topk_ids), routing.topk_weights, experts)


def with_capacity(routing: Routing, factor: float) -> Routing:
    """Drops what exceeds the capacity of an expert, as systems with padded buffers do: the later tokens' entries.

    The capacity of each expert is ``factor`` times its equal share of these tokens' entries, rounded up.
    """
    experts, ids = routing.num_experts, routing.topk_ids.flatten().long()
    capacity = max(1, -int(-factor * len(ids) // experts))
    order = ids.argsort(stable=True)
    counts = torch.bincount(ids, minlength=experts)
    place = torch.empty_like(ids)
    place[order] = torch.arange(len(ids), device=ids.device) - (counts.cumsum(0) - counts)[ids[order]]
    kept = torch.where(place < capacity, ids, experts)
    return Routing(kept.view_as(routing.topk_ids).to(routing.topk_ids), routing.topk_weights, experts)
