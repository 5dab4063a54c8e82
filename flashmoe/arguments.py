"""What the operators take: every check of a tensor, and the codes by which the core knows dtypes and activations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _C

__all__ = ["ACTIVATION_CODES", "DTYPE_CODES", "check", "raise_not_a_tensor"]

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATION_CODES = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
BUILT_WITH_CUDA = hasattr(_C, "CudaTeam")


def raise_not_a_tensor(**arguments) -> None:
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check(
    x, topk_ids, topk_weights, gate_up_proj, down_proj, gate_up_bias, down_bias, expert_map, activation, gated,
) -> None:  # fmt: skip
    """Everything about the arguments that shapes and types can say. Id values are checked where they are read."""
    dtype = x.dtype
    if dtype not in DTYPE_CODES:
        raise TypeError(f"x must have dtype torch.float32, torch.bfloat16 or torch.float16, got {dtype}")
    for name, tensor in (
        ("gate_up_proj", gate_up_proj), ("down_proj", down_proj), ("gate_up_bias", gate_up_bias),
        ("down_bias", down_bias),
    ):  # fmt: skip
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must have the dtype of x, {dtype}, got {tensor.dtype}")
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, got strides {tuple(tensor.stride())} for shape {tuple(tensor.shape)}"
            )
    if topk_ids.dtype != torch.int64 and topk_ids.dtype != torch.int32:
        raise TypeError(f"topk_ids must have dtype torch.int32 or torch.int64, got {topk_ids.dtype}")
    if not topk_weights.dtype.is_floating_point:
        raise TypeError(f"topk_weights must have a floating point dtype, got {topk_weights.dtype}")
    if expert_map is not None:
        if expert_map.dtype != torch.int32:
            raise TypeError(f"expert_map must have dtype torch.int32, got {expert_map.dtype}")
        if expert_map.ndim != 1 or not expert_map.is_contiguous():
            raise ValueError(
                f"expert_map must be contiguous with shape (num_experts,), got shape {tuple(expert_map.shape)} "
                f"and strides {tuple(expert_map.stride())}"
            )
    on_cpu = x.is_cpu
    if not on_cpu:
        _check_device(x, expert_map)
    for name, tensor in (
        ("topk_ids", topk_ids), ("topk_weights", topk_weights), ("gate_up_proj", gate_up_proj),
        ("down_proj", down_proj), ("gate_up_bias", gate_up_bias), ("down_bias", down_bias),
        ("expert_map", expert_map if on_cpu else None),
    ):  # fmt: skip
        if tensor is not None and (not tensor.is_cpu if on_cpu else tensor.device != x.device):
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")

    if down_proj.ndim != 3:
        raise ValueError(f"down_proj must have shape (E_local, H, I), got {tuple(down_proj.shape)}")
    num_local, hidden, intermediate = down_proj.shape
    up = 2 * intermediate if gated else intermediate
    if gate_up_proj.shape != (num_local, up, hidden):
        raise ValueError(
            f"gate_up_proj must have shape (E_local, {'2I' if gated else 'I'}, H) = {(num_local, up, hidden)} "
            f"to go with down_proj {tuple(down_proj.shape)}, got {tuple(gate_up_proj.shape)}"
        )
    if gate_up_bias is not None and gate_up_bias.shape != (num_local, up):
        raise ValueError(
            f"gate_up_bias must have shape (E_local, {'2I' if gated else 'I'}) = {(num_local, up)}, "
            f"got {tuple(gate_up_bias.shape)}"
        )
    if down_bias is not None and down_bias.shape != (num_local, hidden):
        raise ValueError(
            f"down_bias must have shape (E_local, H) = {(num_local, hidden)}, got {tuple(down_bias.shape)}"
        )
    shape = x.shape
    if len(shape) == 0 or shape[-1] != hidden:
        raise ValueError(f"x must have shape (..., H = {hidden}) to go with down_proj, got {tuple(shape)}")
    num_tokens = shape[0] if len(shape) == 2 else math.prod(shape[:-1])
    ids_shape = topk_ids.shape
    if len(ids_shape) != 2 or ids_shape[0] != num_tokens or ids_shape[1] == 0:
        given_k = ids_shape[1] if len(ids_shape) == 2 and ids_shape[1] != 0 else None
        weights_k = topk_weights.shape[1] if topk_weights.ndim == 2 else "k"
        raise ValueError(
            f"topk_ids must have shape (T, k) = ({num_tokens}, {given_k or weights_k}), got {tuple(ids_shape)}"
        )
    if topk_weights.shape != ids_shape:
        raise ValueError(f"topk_weights must have shape (T, k) = {tuple(ids_shape)}, got {tuple(topk_weights.shape)}")
    if activation not in ACTIVATION_CODES:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATION_CODES)}, got {activation!r}")


def _check_device(x: Tensor, expert_map: Tensor | None) -> None:
    """Where tensors may lie that are not on the CPU."""
    kind = x.device.type
    if kind not in ("cuda", "meta"):  # meta: shapes alone, as a compiler asks for them
        raise ValueError(f"x must be on the CPU or on a CUDA device, got {x.device}")
    if kind == "cuda" and not BUILT_WITH_CUDA:
        raise ValueError(
            f"x must be on the CPU: this build of flashmoe has no CUDA half (`flashmoe info` tells why), got {x.device}"
        )
    # The placement decides what a call sends where, so the host reads it: from a GPU it could not without waiting.
    if expert_map is not None and not (expert_map.is_cpu or expert_map.device == x.device and kind == "meta"):
        raise ValueError(f"expert_map must be on the CPU, also where x is on {x.device}, got {expert_map.device}")
