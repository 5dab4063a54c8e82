"""The truth: what a Mixture-of-Experts layer computes, in the plainest torch there is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
}


def moe_reference(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    *,
    activation: str = "silu",
    gated: bool = True,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """y[t] = Σ_j topk_weights[t, j] · FFN of expert topk_ids[t, j] on x[t], one expert after the other.

    Shapes are those of :func:`flashmoe.fused_moe`, with *all* experts in the weights: x [..., H], topk_ids and
    topk_weights [T, k], gate_up_proj [E, 2I, H] (gate rows first; [E, I, H] if not gated), down_proj [E, H, I].
    Ids outside [0, E) are dropped. The result [..., H] stays in ``compute_dtype`` (torch.float32 or
    torch.float64): nothing is rounded to x's dtype. Plain torch, so autograd goes through it.
    """
    act = ACTIVATIONS[activation]
    tokens = x.reshape(-1, x.shape[-1]).to(compute_dtype)
    y = torch.zeros_like(tokens)
    for e in range(gate_up_proj.shape[0]):
        token, slot = torch.where(topk_ids == e)
        hidden = tokens[token] @ gate_up_proj[e].to(compute_dtype).T
        if gate_up_bias is not None:
            hidden = hidden + gate_up_bias[e].to(compute_dtype)
        if gated:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = act(gate) * up
        else:
            hidden = act(hidden)
        out = hidden @ down_proj[e].to(compute_dtype).T
        if down_bias is not None:
            out = out + down_bias[e].to(compute_dtype)
        y = y.index_add(0, token, out * topk_weights[token, slot, None].to(compute_dtype))
    return y.reshape(x.shape)
