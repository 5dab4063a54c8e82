"""How far a result is from the reference in float64, and how far rounding may take it."""

import math
from typing import Any

import torch

from .models import LayerShape
from .module import MoE
from .reference import moe_reference
from .routing import Routing

_REFERENCE_FLOPS = 2e11  # in float64; a few seconds


def checked_tokens(shape: LayerShape, num_tokens: int) -> int:
    """How many of them the reference computes."""
    return max(1, min(num_tokens, int(_REFERENCE_FLOPS / shape.flops(shape.top_k))))


class Check:
    """The reference's result for all tokens, or for evenly spaced ones where all would take too long.

    The error of a row is the Euclidean norm of its difference over the norm of the reference's row; the relative
    error is the largest of them. Its bound: a sum of n products in float32 errs like a random walk of n steps of
    u = 2^-24 (Higham and Mary 2019), so the two products contribute u (sqrt(H) + sqrt(I)); up to three times a value
    is rounded to the dtype (inside the expert, on its way back, in y), by 2^-8 in bfloat16 and 2^-11 in float16, or in
    tf32 all factors lose what ten bits do not hold, up to 2^-10; and the k rows that are summed may partly cancel,
    which leaves a norm that is smaller by up to about sqrt(k).
    """

    def __init__(
        self, shape: LayerShape, whole: MoE, x: torch.Tensor, routing: Routing, tokens_per_rank: int, tf32: bool = False
    ) -> None:
        """x [T, H] and ``routing`` of all ranks, one after the other; ``whole`` owns all experts."""
        self.tokens_per_rank, self.num_tokens = tokens_per_rank, x.shape[0]
        self.rows = torch.arange(checked_tokens(shape, x.shape[0])) * self.num_tokens
        self.rows //= checked_tokens(shape, x.shape[0])
        self.truth = moe_reference(
            x[self.rows], routing.topk_ids[self.rows], routing.topk_weights[self.rows], whole.gate_up_proj,
            whole.down_proj, activation=shape.activation, gated=shape.gated, compute_dtype=torch.float64,
        )  # fmt: skip
        rounding = 2.0**-10 if tf32 else torch.finfo(x.dtype).eps / 2
        accumulation = 2.0**-24 * (math.sqrt(shape.hidden_size) + math.sqrt(shape.intermediate_size))
        self.bound = math.sqrt(shape.top_k) * (accumulation + 3 * rounding)

    def error_of(self, y: torch.Tensor) -> dict[str, Any]:
        difference = y[self.rows].double() - self.truth
        relative = difference.norm(dim=1) / self.truth.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
        worst = int(self.rows[int(relative.nan_to_num(nan=math.inf).argmax())])
        return {
            "max": float(difference.abs().max()),
            "relative": float(relative.max()),
            "bound": self.bound,
            "worst": {"rank": worst // self.tokens_per_rank, "token": worst % self.tokens_per_rank},
            "finite": bool(y.isfinite().all()),
            "checked_tokens": len(self.rows),
            "tokens": self.num_tokens,
        }
