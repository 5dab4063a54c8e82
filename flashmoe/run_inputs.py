"""The tokens of a run and where they go, on each rank and gathered; and several inputs that take turns."""

from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch

from .activations import random_activations, text_activations
from .measure import Ranks
from .module import MoE
from .routing import Routing
from .run_options import RunOptions
from .skew import skewed, with_capacity
from .virtual_layer import VirtualLayer


def draw(options: RunOptions, ranks: Ranks, layer: MoE | VirtualLayer, number: int) -> tuple[torch.Tensor, Routing]:
    """This process's tokens of one of the inputs, and where they go: a rank's, or those of all virtual ranks."""
    mine = range(options.ranks) if options.virtual else [ranks.rank]
    parts = [_of_rank(options, rank, layer, number) for rank in mine]
    if len(parts) == 1:
        return parts[0]
    tokens, routings = zip(*parts, strict=True)
    ids, weights = ([getattr(one, name) for one in routings] for name in ("topk_ids", "topk_weights"))
    return torch.cat(tokens), Routing(torch.cat(ids), torch.cat(weights), options.shape.num_experts)


def _of_rank(options: RunOptions, rank: int, layer: MoE | VirtualLayer, number: int) -> tuple[torch.Tensor, Routing]:
    activations = text_activations if options.input == "text" else random_activations
    stretch = rank + number * options.ranks
    x = activations(options.tokens, options.shape.hidden_size, rank=stretch, seed=options.seed)
    x = x.to(layer.down_proj.device, options.torch_dtype)
    routing = skewed(layer.router(x), options.skew, options.seed + stretch)
    if options.capacity_factor is not None:
        routing = with_capacity(routing, options.capacity_factor)
    return x, routing


def draw_gradient(options: RunOptions, ranks: Ranks, x: torch.Tensor, number: int) -> torch.Tensor:
    """What comes back to y of one of the inputs: normal numbers."""
    drawn = random_activations(*x.shape, rank=ranks.rank + number * ranks.size, seed=options.seed + 1)
    return drawn.to(x.device, x.dtype)


def collect(ranks: Ranks, x: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, Routing] | None:
    """The tokens of all ranks on rank 0. They travel in float32, which holds every dtype."""
    parts = [ranks.collect(part) for part in (x.float(), routing.topk_ids, routing.topk_weights)]
    return (parts[0].to(x.dtype), Routing(*parts[1:], routing.num_experts)) if parts[0] is not None else None


def in_turns(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    """Each call makes the next of them."""
    if len(calls) == 1:
        return calls[0]
    turns = cycle(calls)
    return lambda: next(turns)()
