"""The gradients of the operator: one more call of the core, in which y's gradients travel as tokens do.

Tokens travel once more beside the gradients. What the experts made of them in the up product is kept on the CPU, in
float32 (flashmoe/keeping.py): up rows · 4 bytes for each row of this rank's experts, from the forward call to the backward
call. Where it is not, on a GPU and in compiled graphs, it is made again, with the same bits: of a gated expert two products
more with a row, beside three for the row's gradients and three for the weights'.

Gradients repeat bit by bit. Those of x and topk_weights do not depend on the number of ranks or workers either; those
of weights are sums over the rows of an expert in an order that does depend on the ranks: each rank's own tokens first.

On a GPU a call keeps what it makes of the rows of its experts until its end, in memory beside torch's: up rows +
intermediate_size numbers a row. A rank of several cannot know how many rows will come: it sets aside memory for the worst
routing, or a quarter of the GPU's if that is less (FLASHMOE_BACKWARD_MIB), and ends the call in a PeerError where it does
not suffice.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import cuda_teams, groups
from .arguments import check
from .core_arguments import core_arguments
from .keeping import handed_on, new_kept
from .operators import define, register_effectful


class Differentiable(torch.autograd.Function):
    """A call of one of the forward operators, and its gradients.

    ``apply(op, *args)`` takes what ``op`` takes. Ranks of a group must agree on whether a call is differentiated: if
    one rank's y takes part in a loss, then all others' must, also where a rank has no tokens.
    """

    @staticmethod
    def forward(ctx, op, *args):
        kept = new_kept(args[0])
        ctx.save_for_backward(*args[:8], kept)
        ctx.how = args[8:]
        with handed_on(kept), torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    @staticmethod
    def backward(ctx, grad_y):
        *tensors, kept = ctx.saved_tensors
        activation, gated, layer, *group = ctx.how
        _, *needed = ctx.needs_input_grad  # of op, x, topk_ids, topk_weights, …
        op = _EP_BACKWARD if group else _LOCAL_BACKWARD
        with handed_on(kept):
            grads = op(grad_y, *tensors, activation, gated, layer, needed[3:7], *group)
        grad_x, grad_topk_weights, *grad_weights = grads
        grad_weights = [grad if need else None for grad, need in zip(grad_weights, needed[3:7], strict=True)]
        return None, grad_x, None, grad_topk_weights.to(tensors[2].dtype), *grad_weights, *[None] * (1 + len(ctx.how))


class _NotTwice(torch.autograd.Function):
    """Gradients that are used as they are, until somebody asks for theirs."""

    @staticmethod
    def forward(ctx, op, *args):
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("flashmoe: second derivatives of fused_moe are not implemented")


def _autograd(op, *args):
    tensors = (one for one in args[:9] if one is not None)
    if torch.is_grad_enabled() and any(one.requires_grad for one in tensors):  # of a backward pass with create_graph
        return _NotTwice.apply(op, *args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _backward(call, ep_size, grad_y, *args):
    *args, wanted = args
    x, topk_ids, topk_weights, gate_up_proj, down_proj, gate_up_bias, down_bias, *how = args
    grads = _results(*args[:7], wanted)
    # The core makes a bias' gradient with that of its matrix.
    matrices = [
        grad if matrix_wanted or not bias_wanted else torch.empty_like(matrix)
        for grad, matrix, matrix_wanted, bias_wanted in zip(
            grads[2:4], (gate_up_proj, down_proj), wanted[:2], wanted[2:], strict=True
        )
    ]
    grad_y, x = grad_y.contiguous(), x.contiguous()
    arguments, kept = core_arguments(
        ep_size, grads[0], x, topk_ids, topk_weights, gate_up_proj, down_proj, gate_up_bias, down_bias, *how
    )
    grad_gate_up_bias, grad_down_bias = grads[4:]
    call(
        how[-1], grad_y.data_ptr(), grads[1].data_ptr(), matrices[0].data_ptr(), grad_gate_up_bias.data_ptr(),
        matrices[1].data_ptr(), grad_down_bias.data_ptr(), *arguments,
    )  # fmt: skip
    del kept
    return grads


def _results(x, topk_ids, topk_weights, gate_up_proj, down_proj, gate_up_bias, down_bias, wanted) -> tuple[Tensor, ...]:
    """Of x, topk_weights, gate_up_proj, down_proj, gate_up_bias and down_bias; without elements where not wanted."""
    weights = zip((gate_up_proj, down_proj, gate_up_bias, down_bias), wanted, strict=True)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty(topk_ids.shape, dtype=torch.float32, device=x.device),
        *(torch.empty_like(one) if want else x.new_empty(0) for one, want in weights),
    )


def _check(grad_y, *args) -> None:
    *args, _ = args
    check(*args[:-1])
    x = args[0]
    if grad_y.shape != x.shape or grad_y.dtype != x.dtype or grad_y.device != x.device:
        raise ValueError(
            f"grad_y must be of shape {tuple(x.shape)} and {x.dtype} on {x.device}, as x is, got "
            f"{tuple(grad_y.shape)} and {grad_y.dtype} on {grad_y.device}"
        )


def _local_backward(*args):
    _check(*args)
    x = args[1]
    if x.is_cuda:
        return _backward(functools.partial(cuda_teams.call, "backward", None, x.device.index, x.dtype), 1, *args)
    with groups.local.lock:
        return _backward(functools.partial(groups.call, "backward", None, groups.local.acquire()), 1, *args)


def _ep_backward(*args):
    *args, name = args
    _check(*args)
    group = groups.find(name)
    return _backward(groups.call_on(name, group, args[1], "backward"), group.ep_size, *args)


def _fake(*args):
    _, x, topk_ids, *others = args[:8]
    return _results(x, topk_ids, *others, args[12])


_SCHEMA = (
    "(Tensor grad_y, Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor gate_up_proj, Tensor down_proj, "
    "Tensor? gate_up_bias, Tensor? down_bias, Tensor? expert_map, str activation, bool gated, int layer, bool[] wanted"
    "{}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LOCAL_BACKWARD = define("moe_local_backward", _SCHEMA.format(""), _local_backward, _fake, _autograd)
_EP_BACKWARD = define("moe_ep_backward", _SCHEMA.format(", str group"), _ep_backward, _fake, _autograd)
register_effectful(_EP_BACKWARD)
