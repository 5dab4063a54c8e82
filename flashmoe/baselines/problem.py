"""One layer and its inputs, as every baseline gets them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models import LayerShape
from ..reference import ACTIVATIONS
from ..routing import Routing

Call = Callable[[], Tensor]


class Skipped(Exception):
    """A baseline that cannot take part; the message says why."""


@dataclass(frozen=True)
class Problem:
    """What is to be computed.

    Attributes:
        inputs: this rank's tokens [T, hidden_size] and where they go; a baseline makes one call for each of them.
        gate_up_proj, down_proj: this rank's experts.
        experts_per_rank: neighbouring experts, rank by rank.
    """

    shape: LayerShape
    inputs: list[tuple[Tensor, Routing]]
    gate_up_proj: Tensor
    down_proj: Tensor
    experts_per_rank: list[int]

    @property
    def dtype(self) -> torch.dtype:
        return self.down_proj.dtype

    @property
    def device(self) -> torch.device:
        return self.down_proj.device

    @property
    def num_tokens(self) -> int:
        return self.inputs[0][0].shape[0]

    def activate(self, hidden: Tensor) -> Tensor:
        """Rows of the first product, gate first, to rows for the second."""
        act = ACTIVATIONS[self.shape.activation]
        if not self.shape.gated:
            return act(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        return act(gate) * up

    def kept(self, routing: Routing) -> int:
        """Entries that are not dropped."""
        return int(routing.tokens_per_expert().sum())

    def needs_gpu(self) -> None:
        if self.device.type != "cuda":
            raise Skipped("needs a GPU")

    def needs_dtype(self, *dtypes: torch.dtype) -> None:
        if self.dtype not in dtypes:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise Skipped(f"is for {names}")

    def needs_every_entry(self) -> None:
        if any(self.kept(routing) < routing.topk_ids.numel() for _, routing in self.inputs):
            raise Skipped("drops nothing")

    def needs_gated_silu(self) -> None:
        if not (self.shape.gated and self.shape.activation == "silu"):
            raise Skipped("is for gated silu")

    def needs_multiple(self, divisor: int) -> None:
        """Of both widths."""
        if self.shape.hidden_size % divisor or self.shape.intermediate_size % divisor:
            raise Skipped(f"needs widths that are multiples of {divisor}")
