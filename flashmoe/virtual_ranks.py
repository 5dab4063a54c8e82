"""W ranks of one layer on one GPU, as one grid: the whole distributed protocol on a single card."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _C
from .ops import ACTIVATION_CODES, DTYPE_CODES

__all__ = ["VirtualRanks", "has_cuda"]


def has_cuda() -> bool:
    """This build has the CUDA half, and a GPU is here."""
    return hasattr(_C, "CudaTeam") and _C.num_cuda_devices() > 0


class VirtualRanks:
    """``ep_size`` ranks that share a GPU: each has its part of the experts, its own tokens, heap and signals.

    With ep_size=1 it is the layer of one process. Calls are queued on the current stream; nothing waits for them.

    Args:
        max_tokens, max_wire_bytes, max_top_k, max_experts: the most that any rank's call may ask for; bytes of a row.
        sm_margin: multiprocessors that are left to others.

    Raises:
        RuntimeError: this build has no CUDA half, or there is no GPU.
    """

    def __init__(
        self,
        ep_size: int,
        *,
        max_tokens: int,
        max_wire_bytes: int,
        max_top_k: int,
        max_experts: int,
        device: int | None = None,
        timeout_s: float = 60.0,
        sm_margin: int = 0,
    ) -> None:
        if not has_cuda():
            raise RuntimeError("flashmoe: this build has no CUDA half, or no GPU is here; `flashmoe info` tells which")
        self.ep_size = ep_size
        self.device = torch.cuda.current_device() if device is None else device
        limits = _C.Limits(ep_size, max_tokens, max_wire_bytes, max_top_k, max_experts)
        self.team = _C.CudaTeam(self.device, limits, timeout_s=timeout_s, entry_timeout_s=timeout_s, sm_margin=sm_margin)

    def __call__(
        self,
        x: Sequence[Tensor],
        topk_ids: Sequence[Tensor],
        topk_weights: Sequence[Tensor],
        gate_up_proj: Sequence[Tensor],
        down_proj: Sequence[Tensor],
        *,
        activation: str = "silu",
        gated: bool = True,
        out: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """One call of all ranks, with one tensor a rank: shapes and dtypes as of :func:`flashmoe.fused_moe`.

        Experts lie on the ranks in equal contiguous blocks; topk_weights are float32. Returns y of each rank.

        Raises:
            ValueError: a call above the limits, or widths that are no multiple of 16 bytes.
            flashmoe.PeerError: an earlier call failed.
        """
        out = [torch.empty_like(rows) for rows in x] if out is None else list(out)
        num_experts = sum(weights.shape[0] for weights in down_proj)
        ranks = [
            _C.ForwardArgs(
                x[r].data_ptr(), x[r].shape[0], topk_ids[r].data_ptr(), topk_ids[r].element_size(),
                topk_weights[r].data_ptr(), topk_ids[r].shape[1], gate_up_proj[r].data_ptr(), 0,
                down_proj[r].data_ptr(), 0, out[r].data_ptr(), down_proj[r].shape[1], down_proj[r].shape[2],
                num_experts, down_proj[r].shape[0], DTYPE_CODES[x[r].dtype], ACTIVATION_CODES[activation], gated, 0, 0,
            )
            for r in range(self.ep_size)
        ]  # fmt: skip
        self.team.forward(ranks, torch.cuda.current_stream(self.device).cuda_stream)
        return out
