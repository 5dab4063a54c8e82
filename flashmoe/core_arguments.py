"""Tensors as the core takes them: addresses, sizes and codes, in the order of ``_C.Group.forward``."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import ACTIVATION_CODES, DTYPE_CODES

# The bias of a rank without experts has no address, but is not absent: all ranks must name the same layer.
_NO_ROWS = torch.zeros(1, device="cpu")


def core_arguments(
    ep_size, y, x, topk_ids, topk_weights, gate_up_proj, down_proj, gate_up_bias, down_bias, expert_map, activation,
    gated, layer,
) -> tuple[tuple, tuple[Tensor, Tensor]]:  # fmt: skip
    """Checked arguments of a call; x and y are contiguous. And what must live as long as the addresses are read.

    On a GPU that is until the call is queued: its memory then goes to later work of this stream.
    """
    topk_ids, topk_weights = topk_ids.contiguous(), topk_weights.contiguous()
    if topk_weights.dtype != torch.float32:
        topk_weights = topk_weights.to(torch.float32)
    num_tokens, top_k = topk_ids.shape
    num_local, hidden, intermediate = down_proj.shape
    return (
        x.data_ptr(), num_tokens, topk_ids.data_ptr(), topk_ids.element_size(), topk_weights.data_ptr(), top_k,
        gate_up_proj.data_ptr(), 0 if gate_up_bias is None else gate_up_bias.data_ptr() or _NO_ROWS.data_ptr(),
        down_proj.data_ptr(), 0 if down_bias is None else down_bias.data_ptr() or _NO_ROWS.data_ptr(), y.data_ptr(),
        hidden, intermediate, num_local * ep_size if expert_map is None else expert_map.shape[0], num_local,
        DTYPE_CODES[x.dtype], ACTIVATION_CODES[activation], gated,
        0 if expert_map is None else expert_map.data_ptr(), layer,
    ), (topk_ids, topk_weights)  # fmt: skip
