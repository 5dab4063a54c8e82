"""How far gradients are from the reference's under autograd in float64, and how far rounding may take them."""

import math

import torch
from torch import Tensor

from .models import LayerShape
from .module import MoE
from .reference import moe_reference
from .routing import Routing

_REFERENCE_FLOPS = 1e11  # in float64, for the tokens' gradients and once more for the experts'; a few seconds
_TRUTH_BYTES = 256 << 20  # of the weights' gradients that are kept to compare with
_UNIT = 2.0**-24


class GradientCheck:
    """The reference's gradients for a given gradient of y: of evenly spaced tokens and experts, or of all.

    Errors are Euclidean norms of differences over norms of the reference's, and the largest counts: for x of each
    token's row, for the weights of each expert's matrix. A top-k weight's gradient is one number, the product of y's
    gradient g with an expert's result o, and may be small by chance: a token's k of them are held against at least
    |g| |o| / sqrt(H), the size of such a product of independent vectors. An expert without rows must have zeros.

    The bounds count as Check's does, u sqrt(n) for a sum of n products in float32 and the dtype's rounding r for each
    value that is rounded on the way. Behind each gradient stand the up product again (H) and o's gradient w g (r):

        x              sqrt(k) (u (2 sqrt(H) + sqrt(up rows)) + 6 r): through down (H), the activation, up (its rows),
                       and the sum of k rows, which may partly cancel
        topk_weights   u (2 sqrt(H) + sqrt(I)) + 5 r: o, and its product with g
        gate_up_proj   u (2 sqrt(H) + sqrt(rows)) + 5 r: through down (H), then a sum over the expert's rows
        down_proj      u (sqrt(H) + sqrt(rows)) + 4 r

    relu's slope jumps at 0. Which side a value falls on that is nearer to 0 than its rounding error is chance; what
    such values can change is found by moving all of them by that much both ways, and is not held against anybody.
    """

    def __init__(
        self, shape: LayerShape, whole: MoE, x: Tensor, routing: Routing, grad_y: Tensor, tf32: bool = False
    ) -> None:
        """x, ``routing`` and ``grad_y`` of all ranks, one after the other; ``whole`` owns all experts."""
        self._shape, self._weights = shape, (whole.gate_up_proj.detach(), whole.down_proj.detach())
        self._rounding = 2.0**-10 if tf32 else torch.finfo(x.dtype).eps / 2
        self._kink = 4 * (_UNIT * math.sqrt(shape.hidden_size) + (2.0**-10 if tf32 else 0.0))  # 4: the farthest of many
        x, grad_y, num_tokens = x.detach(), grad_y.detach(), len(x)
        ids, topk_weights = routing.topk_ids, routing.topk_weights.detach()
        few = max(1, min(num_tokens, int(_REFERENCE_FLOPS / (3 * shape.flops(shape.top_k)))))
        self.tokens = torch.arange(few) * num_tokens // few
        counts = routing.tokens_per_expert()
        self.experts = self._chosen(counts)
        self.bounds = self._bounds(int(counts[self.experts].max()))

        wanted = torch.zeros(num_tokens, dtype=torch.bool, device=x.device)
        wanted[self.tokens] = True
        truth_x = torch.zeros_like(x, dtype=torch.float64)
        truth_topk = torch.zeros(ids.shape, dtype=torch.float64, device=x.device)
        size_of_products, slack_x = torch.zeros_like(truth_topk), torch.zeros_like(truth_x)
        self._truth: list[tuple[Tensor, Tensor]] = []
        self._slack: list[tuple[float, float]] = []
        for expert in range(shape.num_experts):
            chosen = expert in self.experts
            token, slot = torch.where((ids == expert) & (wanted[:, None] | chosen))
            if not chosen and not len(token):
                continue
            rows = x[token], topk_weights[token, slot], grad_y[token]
            out, grad_rows, grad_topk, *grad_weights = self._reference(expert, *rows)
            truth_x.index_add_(0, token, grad_rows)
            truth_topk[token, slot] = grad_topk
            length = out.norm(dim=1) / rows[1].double().clamp_min(torch.finfo(torch.float64).tiny)
            size_of_products[token, slot] = rows[2].double().norm(dim=1) * length / math.sqrt(shape.hidden_size)
            slack = self._at_the_kink(expert, *rows) if shape.activation == "relu" and len(token) else None
            if slack is not None:
                slack_x.index_add_(0, token, slack[0])
            if chosen:
                self._truth.append(tuple(one.float() for one in grad_weights))
                self._slack.append(tuple(float(one.norm()) for one in slack[1:]) if slack is not None else (0.0, 0.0))
        self._truth_x, self._slack_x = truth_x[self.tokens], slack_x[self.tokens].norm(dim=1)
        self._truth_topk, self._size_of_products = truth_topk[self.tokens], size_of_products[self.tokens].norm(dim=1)

    def errors_of(self, x: Tensor, topk_weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> dict[str, float]:
        """Of the gradients of all tokens' x and top-k weights, and of the weights of ``experts``; NaN is infinite."""
        difference = (x[self.tokens].double() - self._truth_x).norm(dim=1) - self._slack_x
        size = self._truth_topk.norm(dim=1).maximum(self._size_of_products)
        errors = {
            "x": _largest(difference, self._truth_x.norm(dim=1)),
            "topk_weights": _largest((topk_weights[self.tokens].double() - self._truth_topk).norm(dim=1), size),
        }
        for index, (name, given) in enumerate((("gate_up_proj", gate_up_proj), ("down_proj", down_proj))):
            truths = [truth[index] for truth in self._truth]
            differences = [
                (one.double() - truth).norm() - slack[index]
                for one, truth, slack in zip(given, truths, self._slack, strict=True)
            ]
            errors[name] = _largest(torch.stack(differences), torch.stack([truth.double().norm() for truth in truths]))
        return errors

    def _chosen(self, counts: Tensor) -> list[int]:
        """Experts with rows, evenly spaced, as many as there is time and memory for, and one without."""
        used, unused = counts.nonzero().flatten().tolist(), (counts == 0).nonzero().flatten().tolist()
        in_time = _REFERENCE_FLOPS * len(used) / (3 * self._shape.flops(max(1, int(counts.sum()))))
        few = max(2, min(len(used), int(in_time), _TRUTH_BYTES // (4 * self._shape.expert_elements)))
        few = min(few, len(used))
        return sorted({used[place * len(used) // few] for place in range(few)} | set(unused[:1]))

    def _bounds(self, rows: int) -> dict[str, float]:
        shape, r = self._shape, self._rounding
        h, i, up, n = (math.sqrt(one) for one in (shape.hidden_size, shape.intermediate_size, shape.up_rows, rows))
        return {
            "x": math.sqrt(shape.top_k) * (_UNIT * (2 * h + up) + 6 * r),
            "topk_weights": _UNIT * (2 * h + i) + 5 * r,
            "gate_up_proj": _UNIT * (2 * h + n) + 5 * r,
            "down_proj": _UNIT * (h + n) + 4 * r,
        }

    @torch.enable_grad()
    def _reference(self, expert: int, x: Tensor, weights: Tensor, grad_y: Tensor, moved: float = 0.0) -> list[Tensor]:
        """This expert's part of y for these rows, and the gradients of x, weights, gate_up_proj, down_proj."""
        leaves = [one.double().requires_grad_() for one in (x, weights, *(each[expert] for each in self._weights))]
        first = torch.zeros(len(x), 1, dtype=torch.int64, device=x.device)
        bias = leaves[2].new_full((1, self._shape.up_rows), moved) if moved else None
        y = moe_reference(
            leaves[0], first, leaves[1][:, None], leaves[2][None], leaves[3][None], activation=self._shape.activation,
            gated=self._shape.gated, gate_up_bias=bias, compute_dtype=torch.float64,
        )  # fmt: skip
        return [y.detach(), *torch.autograd.grad(y, leaves, grad_y.double())]

    def _at_the_kink(self, expert: int, x: Tensor, weights: Tensor, grad_y: Tensor) -> list[Tensor]:
        """What may change in the gradients of x, gate_up_proj and down_proj."""
        up = self._weights[0][expert].double()
        size = float(x.double().norm(dim=1).max() * up.norm()) / math.sqrt(up.numel())  # of what the activation gets
        below, above = (self._reference(expert, x, weights, grad_y, sign * self._kink * size) for sign in (-1, 1))
        return [(below[place] - above[place]).abs() for place in (1, 3, 4)]


def _largest(differences: Tensor, sizes: Tensor) -> float:
    relative = differences.clamp_min(0) / sizes.clamp_min(torch.finfo(torch.float64).tiny)
    return float(relative.nan_to_num(nan=math.inf).max())
