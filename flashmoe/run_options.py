"""What a run of one layer was asked for."""

from dataclasses import dataclass

import torch

from .models import LayerShape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# On GPUs also float32 whose products are made in tf32.
GPU_DTYPES = DTYPES | {"tf32": torch.float32}
PASSES = ("forward", "backward")


@dataclass(frozen=True)
class RunOptions:
    """What a run was asked for, as each rank gets it; ``started`` is a time.time().

    ``skew`` and ``capacity_factor`` are of skew.py; with ``inputs`` above 1 as many inputs take turns, so that a call
    does not find its rows in a cache. ``trace`` is a file for the timeline of one more call. ``device`` is
    cpu or cuda: the GPU of each rank, or with ``virtual`` one that all ranks share, as one grid of this process; with
    ``graph`` calls are replayed from a CUDA graph. ``passes`` is forward, or backward: a call is then a training step's
    worth of the layer, forward and backward.
    """

    shape: LayerShape
    tokens: int
    ranks: int
    dtype: str
    input: str
    iterations: int
    warmup: int
    seconds: float
    seed: int
    remote_only: int | None
    threads: int
    usable_threads: int
    baselines: tuple[str, ...]
    started: float
    skew: str = "router"
    capacity_factor: float | None = None
    inputs: int = 1
    trace: str | None = None
    device: str = "cpu"
    graph: bool = False
    passes: str = "forward"
    virtual: bool = False

    @property
    def processes(self) -> int:
        return 1 if self.virtual else self.ranks

    @property
    def torch_dtype(self) -> torch.dtype:
        return GPU_DTYPES[self.dtype]

    @property
    def backward(self) -> bool:
        return self.passes == "backward"

    @property
    def routes(self) -> bool:
        """Whether the layer's own router decides, so that a call with it is the same work."""
        return self.skew == "router" and self.capacity_factor is None

    @property
    def all_threads(self) -> int:
        """What all ranks have together, as far as there are cores for them."""
        return min(self.threads * self.ranks, self.usable_threads)

    @property
    def experts_per_rank(self) -> list[int]:
        """Neighbouring experts, as evenly as they go."""
        bounds = [rank * self.shape.num_experts // self.ranks for rank in range(self.ranks + 1)]
        return [high - low for low, high in zip(bounds, bounds[1:], strict=False)]
