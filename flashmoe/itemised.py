"""What a call of all ranks needs at least, item by item, and how much of the time that explains."""

from typing import Any

import torch

from .measure import Contender, quantile, spread
from .models import LayerShape
from .routing import Routing
from .run_options import RunOptions


def speed(contender: Contender, flops: int) -> dict[str, Any]:
    latency = spread(contender.samples)
    return latency | {"gflops": flops / latency["p50"] / 1e9}


def load_of(options: RunOptions, routing: Routing) -> dict[str, Any]:
    """How uneven the routing is: maxima over means."""
    experts = routing.tokens_per_expert()
    ranks = torch.stack([part.sum() for part in experts.split(options.experts_per_rank)])
    return {
        "rows": int(experts.sum()),
        "experts_used": int((experts > 0).sum()),
        "busiest_expert": float(experts.max() / experts.double().mean()),
        "busiest_rank": float(ranks.max() / ranks.double().mean()),
    }


def flops_of(shape: LayerShape, rows: int, backward: bool) -> dict[str, int]:
    """Of matrix products; a contender that computes some of them twice gets no credit for it."""
    forward = shape.flops(rows)
    return {"forward": forward} | ({"row_gradients": forward, "weight_gradients": forward} if backward else {})


def bytes_of(options: RunOptions, load: dict[str, Any], bytes_per_peer: list[Any]) -> dict[str, int]:
    """Each touched expert's weights, x and y once; the rows between the two products, which need not leave a cache;
    and what was sent to other ranks.

    With the backward pass weights and x are read once more, for the gradients of rows and of weights; the touched
    experts' gradients are written, and y's and x's read and written; and rows' and results' gradients travel back the
    ways on which results and rows came.
    """
    shape, itemsize, passes = options.shape, options.torch_dtype.itemsize, 2 if options.backward else 1
    rows = options.ranks * options.tokens * shape.hidden_size * itemsize
    touched = load["experts_used"] * shape.expert_elements * itemsize
    sent = sum(sum(map(sum, rank.values())) for rank in bytes_per_peer)
    gradients = {"weight_gradients": touched, "grad_x": rows, "grad_y": rows} if options.backward else {}
    return {
        "weights": passes * touched,
        "x": passes * rows,
        "y": rows,
        "between": load["rows"] * shape.intermediate_size * itemsize,
        "sent": passes * sent,
    } | gradients


def link_of(options: RunOptions, bytes_per_peer: list[dict[str, list[int]]], rate: float) -> dict[str, Any]:
    """What the busiest rank sends, at the rate (bytes/s) at which all ranks copy memory at one time."""
    sent = (2 if options.backward else 1) * max(sum(map(sum, rank.values())) for rank in bytes_per_peer)
    return {"bytes": sent, "gb_s": rate / 1e9, "seconds": sent / rate}


def floor_of(
    ours: Contender | None, product: Contender, read: Contender, products: float, moved: dict[str, int], reads: float
) -> dict[str, Any]:
    """The least time that this machine allows, were the work spread evenly, and how near ours comes to it, if timed.

    The work is worth ``products`` pure products, and the weights' bytes ``reads`` pure readings. Shares of speed are
    medians and quartiles of ratios round by round: the machine is not equally fast in all rounds.
    """
    rounds = [number for number in product.turns if number in read.turns and (ours is None or number in ours.turns)]
    compute = [products * product.turns[number] for number in rounds]
    read_all = [reads * read.turns[number] for number in rounds]
    floor = {
        "seconds": max(quantile(compute, 0.5), quantile(read_all, 0.5)),
        "compute_seconds": quantile(compute, 0.5),
        "read_seconds": quantile(read_all, 0.5),
        "weight_bytes_touched": moved["weights"] + moved.get("weight_gradients", 0),
    }
    if ours is None:
        return {"floor": floor}
    shares = [max(pair) / ours.turns[number] for number, *pair in zip(rounds, compute, read_all, strict=True)]
    gemm_shares = [seconds / ours.turns[number] for number, seconds in zip(rounds, compute, strict=True)]
    floor["share_of_speed"] = quantile(shares, 0.5)
    floor["share_of_speed_quartiles"] = [quantile(shares, 0.25), quantile(shares, 0.75)]
    return {"floor": floor, "gemm_share": quantile(gemm_shares, 0.5)}
