"""Where the ranks of a run are: in this process, in processes that it starts, or in those of a launcher."""

import os
from typing import Any

import torch.distributed as dist

from . import distributed
from .launch import launch
from .models import LayerShape
from .run_options import RunOptions
from .run_rank import run_rank


def in_a_world() -> bool:
    """Whether a launcher has started this process as one of several ranks."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def speaks() -> bool:
    """Whether this is the process that tells what came of a run."""
    return not in_a_world() or int(os.environ["RANK"]) == 0


def processes_of_host(ranks: int) -> int:
    """Among how many processes this host's cores are shared out."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or ranks) if in_a_world() else ranks


def arena_sizes(options: RunOptions, shape: LayerShape) -> dict[str, int]:
    """Arguments of ``flashmoe.distributed.init`` that fit this layer exactly."""
    return {
        "max_tokens": options.tokens,
        "max_wire_bytes": shape.hidden_size * options.torch_dtype.itemsize,
        "max_top_k": shape.top_k,
        "max_experts": shape.num_experts,
        "max_groups": 1,
    }


def measure(options: RunOptions) -> dict[str, Any] | None:
    """What ``run_rank`` has found, on the process that speaks; None on a launcher's others."""
    if options.processes == 1:
        return run_rank(options)
    sizes = arena_sizes(options, options.shape)
    how = {"num_workers": options.threads, "device": options.device, "remote_only": options.remote_only}
    if not in_a_world():
        return launch(run_rank, options.ranks, options, init_kwargs=sizes | how | {"backward": options.backward})[0]
    # What an earlier configuration made may be too small, and its groups are in use.
    if distributed.is_initialized():
        distributed.reserve(**sizes)
    else:
        if options.device == "cuda" and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl")  # what is compared with exchanges by NCCL
        distributed.init(**sizes, **how)
    measured = run_rank(options)
    dist.barrier()
    return measured
