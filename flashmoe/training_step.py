"""A training step's worth of a layer as one call: forward, then the gradients of all that learns or passes them on."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .baselines import Skipped

# What a sample of each pass is, in a record's words.
TIMED = {
    "forward": "y of x, topk_ids, topk_weights",
    "backward": "y of x, topk_ids, topk_weights, then torch.autograd.grad of y for a given gradient of y: the "
    "gradients of x, topk_weights, gate_up_proj and down_proj, of all experts, in new memory each time, none added "
    "to another",
}


@dataclass(frozen=True)
class TrainingStep:
    """Forward and backward of one input.

    Gradients are returned, not added up in the leaves: that is a step after ``zero_grad(set_to_none=True)``, and no
    sample finds what another has left.

    Attributes:
        leaves: what gets a gradient, by name; x among them.
        grad_y: what comes back from the layers above.
    """

    call: Callable[[], Tensor]
    leaves: dict[str, Tensor]
    grad_y: Tensor

    def __call__(self) -> list[Tensor | None]:
        """y and the gradients in the order of the leaves; None for one that nothing depends on.

        Raises:
            Skipped: the call cannot be differentiated.
        """
        with torch.enable_grad():
            y = self.call()
        if not y.requires_grad:
            raise Skipped("no backward: its result carries no gradient")
        try:
            gradients = torch.autograd.grad(y, list(self.leaves.values()), self.grad_y, allow_unused=True)
        except Exception as error:
            raise Skipped(f"no backward: it raised {type(error).__name__}: {error}"[:300]) from error
        if gradients[list(self.leaves).index("x")] is None:
            raise Skipped("no backward: its result carries no gradient of x")
        return [y, *gradients]
