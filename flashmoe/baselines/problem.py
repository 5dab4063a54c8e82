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
        grad_y: of each input, where the backward pass is asked for, too; tokens, their weights and the experts then
            want gradients. A call is made in grad mode and differentiated each time, so what is derived from them
            before the calls must be views or casts, which keep nothing that the first backward pass would free.
    """

    shape: LayerShape
    inputs: list[tuple[Tensor, Routing]]
    gate_up_proj: Tensor
    down_proj: Tensor
    experts_per_rank: list[int]
    grad_y: tuple[Tensor, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        return self.down_proj.dtype

    @property
    def device(self) -> torch.device:
        return self.down_proj.device

    @property
    def backward(self) -> bool:
        return bool(self.grad_y)

    def leaves(self, number: int) -> dict[str, Tensor]:
        """What gets a gradient in the call of this input."""
        x, routing = self.inputs[number]
        weights = {"gate_up_proj": self.gate_up_proj, "down_proj": self.down_proj}
        return {"x": x, "topk_weights": routing.topk_weights, **weights}

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
