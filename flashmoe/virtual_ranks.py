"""W ranks of one layer on one GPU, as one grid: the whole distributed protocol on a single card."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _C, cuda_teams
from .arguments import ACTIVATION_CODES, DTYPE_CODES
from .settings import settings_of_environment

__all__ = ["VirtualRanks"]


class VirtualRanks:
    """``ep_size`` ranks that share a GPU: each has its part of the experts, its own tokens, heap and signals.

    With ep_size=1 it is the layer of one process. Calls are queued on the current stream; nothing waits for them.

    Args:
        max_tokens, max_wire_bytes, max_top_k, max_experts: the most that any rank's call may ask for; bytes of a row.
        timeout_s: seconds to wait for another rank, in the call or on its way there (default: environment variables
            FLASHMOE_TIMEOUT_S and FLASHMOE_ENTRY_TIMEOUT_S, else 60 and 600).
        sm_margin: multiprocessors that are left to others.
        exact: no tensor cores.
        missing_ranks: so many of the last ranks never come, to show what becomes of the others. A call then has the
            tensors of those that do.
        backward: whether there are backward calls, whose packets are twice as large.

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
        timeout_s: float | None = None,
        sm_margin: int = 0,
        exact: bool = False,
        missing_ranks: int = 0,
        backward: bool = True,
    ) -> None:
        if not cuda_teams.has_cuda():
            raise RuntimeError("flashmoe: this build has no CUDA half, or no GPU is here; `flashmoe info` tells which")
        self.ep_size, self.num_calling = ep_size, ep_size - missing_ranks
        self.device = torch.cuda.current_device() if device is None else device
        limits = _C.Limits(ep_size, max_tokens, max_wire_bytes, max_top_k, max_experts, backward)
        asked = settings_of_environment()
        patience_s = (asked.timeout_s, asked.entry_timeout_s) if timeout_s is None else (timeout_s, timeout_s)
        self.team = cuda_teams.watched(
            _C.CudaTeam(
                self.device, limits, timeout_s=patience_s[0], entry_timeout_s=patience_s[1], sm_margin=sm_margin,
                exact=exact, missing_ranks=missing_ranks, backward_bytes=cuda_teams.backward_bytes_asked(),
            )
        )  # fmt: skip

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
        num_experts: int | None = None,
        expert_map: Tensor | None = None,
        out: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """One call of all ranks, with one tensor a rank: shapes and dtypes as of :func:`flashmoe.fused_moe`.

        topk_weights are float32, expert_map is on the CPU. Without it experts lie on the ranks in equal contiguous
        blocks; num_experts is by default the sum of the ranks'. Returns y of each rank.

        Raises:
            ValueError: a call above the limits.
            flashmoe.PeerError: an earlier call failed.
        """
        out = [torch.empty_like(rows) for rows in x[: self.num_calling]] if out is None else list(out)
        ranks = self._arguments(
            x, topk_ids, topk_weights, gate_up_proj, down_proj, out, activation, gated, num_experts, expert_map
        )
        stream = torch.cuda.current_stream(self.device).cuda_stream
        self.team.forward(ranks, stream, cuda_teams.may_round_to_tf32(x[0].dtype))
        return out

    def backward(
        self,
        grad_y: Sequence[Tensor],
        x: Sequence[Tensor],
        topk_ids: Sequence[Tensor],
        topk_weights: Sequence[Tensor],
        gate_up_proj: Sequence[Tensor],
        down_proj: Sequence[Tensor],
        *,
        activation: str = "silu",
        gated: bool = True,
        num_experts: int | None = None,
        expert_map: Tensor | None = None,
    ) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The gradients of such a call, of each rank: those of x, topk_weights, gate_up_proj and down_proj.

        grad_y, contiguous, is that of each rank's y.

        Raises:
            ValueError: a call above the limits, or the ranks were made without ``backward``.
            flashmoe.PeerError: an earlier call failed.
        """
        calling = range(self.num_calling)
        found = [tuple(torch.empty_like(of[r]) for of in (x, topk_weights, gate_up_proj, down_proj)) for r in calling]
        ranks = self._arguments(
            x, topk_ids, topk_weights, gate_up_proj, down_proj, [of_x for of_x, *_ in found], activation, gated,
            num_experts, expert_map,
        )  # fmt: skip
        gradients = [
            _C.Gradients(grad_y[r].data_ptr(), weights.data_ptr(), gate_up.data_ptr(), 0, down.data_ptr(), 0)
            for r, (_, weights, gate_up, down) in zip(calling, found, strict=True)
        ]
        self.team.backward(ranks, gradients, torch.cuda.current_stream(self.device).cuda_stream)
        return found

    def _arguments(
        self, x, topk_ids, topk_weights, gate_up_proj, down_proj, out, activation, gated, num_experts, expert_map
    ) -> list[_C.ForwardArgs]:
        if num_experts is None:
            num_experts = sum(weights.shape[0] for weights in down_proj)
        owners = 0 if expert_map is None else expert_map.data_ptr()
        return [
            _C.ForwardArgs(
                x[r].data_ptr(), x[r].shape[0], topk_ids[r].data_ptr(), topk_ids[r].element_size(),
                topk_weights[r].data_ptr(), topk_ids[r].shape[1], gate_up_proj[r].data_ptr(), 0,
                down_proj[r].data_ptr(), 0, out[r].data_ptr(), down_proj[r].shape[1], down_proj[r].shape[2],
                num_experts, down_proj[r].shape[0], DTYPE_CODES[x[r].dtype], ACTIVATION_CODES[activation], gated, owners, 0,
            )
            for r in range(self.num_calling)
        ]  # fmt: skip
