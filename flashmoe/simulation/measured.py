"""Runs of ``flashmoe run`` as the simulation sees them: their own routing, on a host as fast as it was then."""

import torch

from ..activations import random_activations, text_activations
from ..models import SHAPES, LayerShape
from ..records import Record
from ..routing import make_router
from ..run_options import DTYPES
from .machine import HostFit, Machine, host
from .workload import Workload
from .world import World


def shape_of(record: Record) -> LayerShape:
    shape = record.data["shape"]
    return SHAPES[shape["name"]].scaled(shape["scale"])


@torch.no_grad()
def workload_of(record: Record) -> Workload:
    """The run's own routing, made again from its seed.

    Raises:
        ValueError: it came out otherwise than in the record, as with another Python, whose library is the text.
    """
    shape, run, load = shape_of(record), record.data["run"], record.data["routing"]
    torch.manual_seed(run["seed"])
    router = make_router(shape.router, shape.hidden_size, shape.num_experts, shape.top_k, **shape.router_options)
    torch.nn.init.normal_(router.weight, std=shape.hidden_size**-0.5)
    activations = text_activations if run["input"] == "text" else random_activations
    ids = tuple(
        router(activations(run["tokens"], shape.hidden_size, rank=rank, seed=run["seed"]).to(DTYPES[run["dtype"]]))
        .topk_ids.int().numpy()
        for rank in range(run["ranks"])
    )  # fmt: skip
    counts = torch.bincount(torch.cat([torch.from_numpy(part).ravel() for part in ids]), minlength=shape.num_experts)
    busiest = float(counts.max() / counts.double().mean())
    if int((counts > 0).sum()) != load["experts_used"] or abs(busiest - load["busiest_expert"]) > 1e-9:
        raise ValueError(f"{record.name}: its routing comes out otherwise here: busiest expert {busiest}, not "
                         f"{load['busiest_expert']}")  # fmt: skip
    return Workload(ids, run["ranks"], shape.num_experts)


def host_of(record: Record, fit: HostFit) -> Machine:
    """The host of a run, as fast as pure products and reading were in its rounds."""
    run, rates = record.data["run"], record.data["rates"]
    gemm, read = 1e9 * rates["gemm_gflops"], 1e9 * rates["read_gb_s"]
    return host(run["ranks"], run["threads"], rates["threads"], gemm, read, fit)


def simulated_seconds(record: Record, workload: Workload, fit: HostFit) -> float:
    return World(workload, shape_of(record), host_of(record, fit), record.data["run"]["dtype"]).run().seconds
