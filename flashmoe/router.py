"""What all routers share: from tokens to logits, from logits to experts and weights, and the hook in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .routing_record import Routing


class Router(nn.Module):
    """What all routers share: the gate, the hook before top-k, and the record.

    A subclass says how logits become probabilities (:meth:`probabilities`) and how these become experts and
    weights (:meth:`select`).
    """

    exact_load = False

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, *, device=None, dtype=None) -> None:
        super().__init__()
        for name, value in (("hidden_size", hidden_size), ("num_experts", num_experts), ("top_k", top_k)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if top_k > num_experts:
            raise ValueError(f"top_k must be at most num_experts = {num_experts}, got {top_k}")
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=0.02)
        self._hooks: list[Callable[[Tensor], Tensor]] = []

    def probabilities(self, logits: Tensor) -> Tensor:
        """logits [T, E] → what the hook sees and the weights are taken from, [T, E] float32."""
        return logits.softmax(dim=-1)

    def select(self, probabilities: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(topk_ids [T, k] int64, topk_weights [T, k] float32)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Routing:
        """x [..., hidden_size] → the Routing of its T = numel / hidden_size tokens."""
        if x.shape[-1] != self.hidden_size:
            raise ValueError(f"x must have shape (..., hidden_size = {self.hidden_size}), got {tuple(x.shape)}")
        logits = self._logits(x.reshape(-1, self.hidden_size))
        probabilities = self.probabilities(logits)
        for hook in self._hooks:
            hooked = hook(probabilities)
            if hooked.shape != probabilities.shape:
                raise ValueError(
                    f"the hook of a router must return shape (T, num_experts) = {tuple(probabilities.shape)}, "
                    f"got {tuple(hooked.shape)}"
                )
            probabilities = hooked.float()
        topk_ids, topk_weights = self.select(probabilities, logits)
        return Routing(topk_ids, topk_weights, self.num_experts, logits, self.exact_load)

    def _logits(self, x: Tensor) -> Tensor:
        weight = self.weight
        differentiable = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        sixteen_bits = x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
        if x.is_cuda and sixteen_bits and not differentiable and not torch.compiler.is_compiling():
            # Products of 16-bit numbers are exact in float32: nothing is lost, and neither factor is copied.
            return torch.mm(x, weight.t(), out_dtype=torch.float32)
        return F.linear(x.float(), weight.float())

    @contextmanager
    def hook(self, function: Callable[[Tensor], Tensor]) -> Iterator[Router]:
        """Within the ``with`` block, ``function`` maps the probabilities [T, E] before top-k sees them.

        Gradients flow through it into the combine weights. Hooks nest (the innermost runs last) and are removed
        when the block ends, also by an exception. A function that returns its argument changes no bit. With a
        selection bias, the hook sees the probabilities without it.
        """
        self._hooks.append(function)
        try:
            yield self
        finally:
            self._hooks.remove(function)

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}"
