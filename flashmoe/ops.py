"""The operator: the call as torch sees it, and nothing of the protocol.

Two of torch's operators share one body. ``flashmoe::moe_local`` (group=None) is pure: one process owns every expert.
``flashmoe::moe_ep`` is a call that all ranks of a group make together, so it is registered *effectful*: a
compiler may not remove, merge, reorder or recompute it on one rank only. It takes its group by name.

:func:`fused_moe` steps below the autograd key itself when no gradient is asked for, which saves time at every call.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import cuda_teams, groups
from .arguments import check, raise_not_a_tensor
from .backward import Differentiable
from .core_arguments import core_arguments
from .operators import define, register_effectful

__all__ = ["fused_moe"]


def fused_moe(
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
    group=None,
    expert_map: Tensor | None = None,
    layer: int = 0,
) -> Tensor:
    """y[t] = Σ_j topk_weights[t, j] · FFN of expert topk_ids[t, j] on x[t], in float32, in the order of j.

    All tensors lie on the CPU or on one CUDA device, where the group's rank is; expert_map always on the CPU.

    x             [..., H] float32, bfloat16 or float16; T = the product of its leading sizes
    topk_ids      [T, k] int32 or int64; num_experts or -1 means dropped
    topk_weights  [T, k] floating point, used as float32
    gate_up_proj  [E_local, 2I, H] of x's dtype, contiguous, gate rows first; [E_local, I, H] if not gated
    down_proj     [E_local, H, I] of x's dtype, contiguous
    activation    silu, gelu, gelu_tanh or relu; gated: act(gate) · up, else act(up)
    gate_up_bias  [E_local, 2I] ([E_local, I] if not gated), down_bias [E_local, H], of x's dtype
    group         None: this process owns every expert. A ProcessGroup, or its flashmoe name (inside
                  torch.compile: the name): expert parallelism over its ranks, which must make the same calls
                  in the same order. Ranks may bring different token counts, also none.
    expert_map    [num_experts] int32, the rank that owns each expert; None: equal contiguous blocks. A rank's
                  weights hold its experts in ascending order.
    layer         a number that names the call, equal on all ranks: ranks that call different layers in one
                  step get an error

    Returns y [..., H] of x's dtype, contiguous. It can be differentiated (flashmoe/backward.py), with respect to x,
    topk_weights and the experts' weights and biases; with a group each rank that takes part in the backward pass of
    this call waits for all others there.
    Raises TypeError for a wrong type or dtype, ValueError for a wrong shape, device, stride, id, or a call above
    the group's limits (nothing is sent then), flashmoe.PeerError when a peer is late, gone, or calls another
    layer.

    On a GPU the call is queued on the current stream and nothing waits for it, except that a call larger than any
    before allocates memory. So what only the GPU can see is told late: y of that call is NaN, and the next call on
    the device, or flashmoe.check(), raises ValueError for an id, PeerError for a deadline. In a CUDA graph's capture
    a call must find its memory: RuntimeError unless the same call was made before. Products of float32 are made in
    tf32 if torch's own may be (torch.backends.cuda.matmul.fp32_precision).
    """
    required = isinstance(x, Tensor) and isinstance(topk_ids, Tensor) and isinstance(topk_weights, Tensor)
    if not (required and isinstance(gate_up_proj, Tensor) and isinstance(down_proj, Tensor)):
        raise_not_a_tensor(
            x=x, topk_ids=topk_ids, topk_weights=topk_weights, gate_up_proj=gate_up_proj, down_proj=down_proj
        )
    args = (
        x, topk_ids, topk_weights, gate_up_proj, down_proj, gate_up_bias, down_bias, expert_map,
        activation, gated, layer,
    )  # fmt: skip
    op = _MOE_LOCAL
    if group is not None:
        op, args = _MOE_EP, (*args, groups.name_of(group))
    if torch.compiler.is_compiling():
        return op(*args)
    if torch.is_grad_enabled() and _requires_grad(args):
        return Differentiable.apply(op, *args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


# --- the operators --------------------------------------------------------------------------------------------


def _forward(call, ep_size, x, *args):
    x = x.contiguous()
    y = torch.empty_like(x)
    arguments, kept = core_arguments(ep_size, y, x, *args)
    call(args[-1], *arguments)
    del kept
    return y


def _moe_local(*args):
    check(*args[:-1])
    x = args[0]
    if x.is_cuda:
        return _forward(functools.partial(cuda_teams.call, "forward", None, x.device.index, x.dtype), 1, *args)
    with groups.local.lock:
        return _forward(functools.partial(groups.call, "forward", None, groups.local.acquire()), 1, *args)


def _moe_ep(*args):
    *args, name = args
    check(*args[:-1])
    group = groups.find(name)
    return _forward(groups.call_on(name, group, args[0]), group.ep_size, *args)


def _moe_fake(*args):
    check(*args[:10])
    return torch.empty_like(args[0], memory_format=torch.contiguous_format)


def _autograd(op, *args):
    if torch.is_grad_enabled() and _requires_grad(args):
        return Differentiable.apply(op, *args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _requires_grad(args) -> bool:
    for tensor in args[:7]:
        if tensor is not None and tensor.requires_grad:
            return True
    return False


_MOE_SCHEMA = (
    "(Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor gate_up_proj, Tensor down_proj, Tensor? gate_up_bias, "
    "Tensor? down_bias, Tensor? expert_map, str activation, bool gated, int layer{}) -> Tensor"
)
_MOE_LOCAL = define("moe_local", _MOE_SCHEMA.format(""), _moe_local, _moe_fake, _autograd)
_MOE_EP = define("moe_ep", _MOE_SCHEMA.format(", str group"), _moe_ep, _moe_fake, _autograd)
register_effectful(_MOE_EP)
