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
from .arguments import ACTIVATION_CODES, DTYPE_CODES, check, raise_not_a_tensor
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

    Returns y [..., H] of x's dtype, contiguous. The forward pass only: a backward pass raises RuntimeError.
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
        return _Forward.apply(op, *args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


# --- the operators --------------------------------------------------------------------------------------------


# The bias of a rank without experts has no address, but is not absent: all ranks must name the same layer.
_NO_ROWS = torch.zeros(1, device="cpu")


def _forward(
    call, ep_size, x, topk_ids, topk_weights, gate_up_proj, down_proj, gate_up_bias, down_bias, expert_map,
    activation, gated, layer,
):  # fmt: skip
    # On a GPU what is made here may be freed when the call is queued: its memory goes to later work of this stream.
    x, topk_ids, topk_weights = x.contiguous(), topk_ids.contiguous(), topk_weights.contiguous()
    if topk_weights.dtype != torch.float32:
        topk_weights = topk_weights.to(torch.float32)
    y = torch.empty_like(x)
    num_tokens, top_k = topk_ids.shape
    num_local, hidden, intermediate = down_proj.shape
    call(
        layer,
        x.data_ptr(), num_tokens, topk_ids.data_ptr(), topk_ids.element_size(), topk_weights.data_ptr(), top_k,
        gate_up_proj.data_ptr(), 0 if gate_up_bias is None else gate_up_bias.data_ptr() or _NO_ROWS.data_ptr(),
        down_proj.data_ptr(), 0 if down_bias is None else down_bias.data_ptr() or _NO_ROWS.data_ptr(), y.data_ptr(),
        hidden, intermediate, num_local * ep_size if expert_map is None else expert_map.shape[0], num_local,
        DTYPE_CODES[x.dtype], ACTIVATION_CODES[activation], gated,
        0 if expert_map is None else expert_map.data_ptr(), layer,
    )  # fmt: skip
    return y


def _moe_local(*args):
    check(*args[:-1])
    x = args[0]
    if x.is_cuda:
        return _forward(functools.partial(cuda_teams.forward, None, x.device.index, x.dtype), 1, *args)
    with groups.local.lock:
        return _forward(functools.partial(groups.forward, None, groups.local.acquire()), 1, *args)


def _moe_ep(*args):
    *args, name = args
    check(*args[:-1])
    group = groups.find(name)
    return _forward(groups.call_on(name, group, args[0]), group.ep_size, *args)


def _moe_fake(*args):
    check(*args[:10])
    return torch.empty_like(args[0], memory_format=torch.contiguous_format)


def _moe_backward(grad_y, like):
    raise RuntimeError(
        "flashmoe: the backward pass of fused_moe is not implemented; call it under torch.no_grad(), or detach "
        "its inputs"
    )


class _Forward(torch.autograd.Function):
    """Lets the forward pass run on tensors that require a gradient, and says clearly that there is no backward."""

    @staticmethod
    def forward(ctx, op, *args):
        ctx.save_for_backward(*args[:7])
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    @staticmethod
    def backward(ctx, grad_y):
        # Through an operator, so that tracing a backward graph succeeds and running it raises.
        needed = ctx.needs_input_grad[1:]
        pairs = zip(ctx.saved_tensors, needed[:7], strict=True)
        grads = [_MOE_BACKWARD(grad_y, tensor) if need else None for tensor, need in pairs]
        return None, *grads, *[None] * (len(needed) - len(grads))


def _requires_grad(args) -> bool:
    for tensor in args[:7]:
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def _autograd(op, *args):
    if torch.is_grad_enabled() and _requires_grad(args):
        return _Forward.apply(op, *args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


_MOE_SCHEMA = (
    "(Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor gate_up_proj, Tensor down_proj, Tensor? gate_up_bias, "
    "Tensor? down_bias, Tensor? expert_map, str activation, bool gated, int layer{}) -> Tensor"
)
_MOE_LOCAL = define("moe_local", _MOE_SCHEMA.format(""), _moe_local, _moe_fake, _autograd)
_MOE_EP = define("moe_ep", _MOE_SCHEMA.format(", str group"), _moe_ep, _moe_fake, _autograd)
_MOE_BACKWARD = define(
    "moe_backward", "(Tensor grad_y, Tensor like) -> Tensor", _moe_backward, lambda _, like: torch.empty_like(like)
)
register_effectful(_MOE_EP)
