"""One call on a GPU, drawn there from a seed, its reference, and how far off it may be."""

import contextlib
import dataclasses

import torch
from torch import Tensor

import flashmoe
from flashmoe.cuda_teams import has_cuda
from flashmoe.models import LayerShape
from flashmoe.virtual_ranks import VirtualRanks

__all__ = ["TF32", "CudaCase", "H", "Ranks", "captured", "has_cuda", "small_enough", "tf32_allowed", "worst_error"]

H, I, E, K = 512, 384, 16, 4
# Rounding of hidden and of each result to the dtype, on sums that fp32 holds; relative to the largest of the row.
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
TF32 = 5e-3  # ten bits of each factor
MOST_BYTES = 2**30  # of a case's weights


def small_enough(shape: LayerShape, dtype: torch.dtype) -> LayerShape:
    """The layer with widths divided until its weights are few bytes."""
    scale = 1
    while shape.num_experts * shape.expert_elements * dtype.itemsize > MOST_BYTES * scale**2:
        scale *= 2
    return shape.scaled(scale)


@contextlib.contextmanager
def tf32_allowed(allowed: bool = True):
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@dataclasses.dataclass
class CudaCase:
    hidden: int = H
    inner: int = I
    experts: int = E
    top_k: int = K
    tokens: int = 96
    dtype: torch.dtype = torch.bfloat16
    activation: str = "silu"
    gated: bool = True
    bias: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator("cuda").manual_seed(self.seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.empty(shape, device="cuda", dtype=self.dtype).normal_(std=scale, generator=generator)

        up = self.inner * (2 if self.gated else 1)
        self.gate_up = normal(self.experts, up, self.hidden, scale=self.hidden**-0.5)
        self.down = normal(self.experts, self.hidden, self.inner, scale=self.inner**-0.5)
        self.gate_up_bias = normal(self.experts, up, scale=0.3) if self.bias else None
        self.down_bias = normal(self.experts, self.hidden, scale=0.3) if self.bias else None
        self.x = normal(self.tokens, self.hidden)
        scores = torch.rand(self.tokens, self.experts, generator=generator, device="cuda")
        self.ids = scores.topk(self.top_k).indices
        self.weights = torch.rand(self.tokens, self.top_k, generator=generator, device="cuda")

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.dtype]

    @property
    def options(self) -> dict:
        return {
            "activation": self.activation, "gated": self.gated,
            "gate_up_bias": self.gate_up_bias, "down_bias": self.down_bias,
        }  # fmt: skip

    def first(self, tokens: int) -> "CudaCase":
        """The same layer on the first tokens."""
        part = object.__new__(CudaCase)
        part.__dict__.update(self.__dict__, tokens=tokens, x=self.x[:tokens], ids=self.ids[:tokens])
        part.weights = self.weights[:tokens]
        return part

    def call(self, **options) -> Tensor:
        return flashmoe.fused_moe(
            self.x, self.ids, self.weights, self.gate_up, self.down, **self.options, **options
        )  # fmt: skip


class Ranks:
    """A case's tokens dealt to virtual ranks, and its experts by owner."""

    def __init__(self, case: CudaCase, tokens, owners=None, **options):
        self.case, ep_size = case, len(tokens)
        self.parts = [part.split(list(tokens)) for part in (case.x, case.ids, case.weights)]
        self.expert_map = None if owners is None else torch.tensor(owners, dtype=torch.int32)
        owner = torch.arange(case.experts) * ep_size // case.experts if owners is None else self.expert_map
        mine = [torch.nonzero(owner == rank).flatten().cuda() for rank in range(ep_size)]
        self.experts = [[weights[experts] for experts in mine] for weights in (case.gate_up, case.down)]
        self.team = VirtualRanks(
            ep_size, max_tokens=max(*tokens, 1), max_wire_bytes=case.hidden * case.dtype.itemsize,
            max_top_k=case.top_k, max_experts=case.experts, **options,
        )  # fmt: skip

    def call(self, **options):
        return self.team(
            *self.parts, *self.experts, activation=self.case.activation, gated=self.case.gated,
            num_experts=self.case.experts, expert_map=self.expert_map, **options,
        )  # fmt: skip


def worst_error(y: Tensor, case: CudaCase, rows: int | None = None) -> float:
    """Of the first and last ``rows`` rows, relative to the largest of each; the products of the reference are exact."""
    chosen = torch.arange(len(y), device=y.device)
    if rows is not None and 2 * rows < len(y):
        chosen = torch.cat([chosen[:rows], chosen[-rows:]])
    with tf32_allowed(False):
        want = flashmoe.moe_reference(
            case.x[chosen], case.ids[chosen], case.weights[chosen], case.gate_up, case.down, **case.options
        )  # fmt: skip
    if not len(chosen):
        return 0.0
    assert y.isfinite().all()
    error = (y[chosen].float() - want).abs().amax(-1) / want.abs().amax(-1).clamp_min(1e-3)
    return error.max().item()


def captured(function):
    """A graph of it, and what it returned; it was called before on a stream of its own, as a capture wants."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result
