"""From scores to experts and weights: one operator, and what autograd needs beside it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _C
from .operators import define


class Selection(NamedTuple):
    """What a router asks of each token.

    top_k          experts per token
    num_groups     of neighbouring experts, of the same size
    open_groups    the best so many groups have a part
    best_of_group  1 or 2: a group is worth the sum of its so many best experts
    in_each_group  top_k / num_groups experts in each group, in place of top_k among all
    softmax        weights are the softmax over the chosen scores; else these scores themselves,
    renormalize    divided by their sum and epsilon
    scale          all weights are multiplied by this
    """

    top_k: int
    num_groups: int = 1
    open_groups: int = 1
    best_of_group: int = 1
    in_each_group: bool = False
    softmax: bool = False
    renormalize: bool = False
    epsilon: float = 0.0
    scale: float = 1.0


def select_experts(scores: Tensor, selection: Selection, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """scores [T, E] float32 → (ids [T, k] int64, weights [T, k] float32), best first, equal scores by lowest index.

    ``torch.topk`` leaves open which of two equal scores it takes. NaN comes before all. ``bias`` [E] is added to the
    scores for the selection alone. The weights are differentiable in the scores.

    Raises:
        RuntimeError: scores of a GPU, and this build has no CUDA half.
        TypeError: scores are not float32.
        ValueError: scores are not of shape (T, E), the selection asks for more than E experts or for other groups than
            E can have, bias does not fit the scores; on a GPU also if E and num_groups together are above 6144.
    """
    differentiable = torch.is_grad_enabled() and scores.requires_grad
    arguments = scores.detach() if differentiable else scores, bias, *selection
    if torch.compiler.is_compiling():
        ids, weights = _SELECT(*arguments)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            ids, weights = _SELECT(*arguments)
    return ids, _weigh(scores.gather(-1, ids), selection) if differentiable else weights


def _weigh(chosen: Tensor, selection: Selection) -> Tensor:
    if selection.softmax:
        chosen = chosen.softmax(dim=-1)
    elif selection.renormalize:
        chosen = chosen / (chosen.sum(-1, keepdim=True) + selection.epsilon)
    return chosen * selection.scale


# --- the operator ---------------------------------------------------------------------------------------------


def _check(scores, bias, top_k, num_groups, open_groups, best_of_group, in_each_group) -> None:
    if scores.dtype != torch.float32:
        raise TypeError(f"scores must be torch.float32, got {scores.dtype}")
    if scores.ndim != 2:
        raise ValueError(f"scores must have shape (T, E), got {tuple(scores.shape)}")
    num_experts = scores.shape[1]
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"num_groups must divide the number of experts {num_experts}, got {num_groups}")
    if not 1 <= open_groups <= num_groups:
        raise ValueError(f"open_groups must be in [1, num_groups = {num_groups}], got {open_groups}")
    if best_of_group not in (1, 2):
        raise ValueError(f"best_of_group must be 1 or 2, got {best_of_group}")
    if in_each_group and (open_groups != num_groups or top_k % num_groups):
        raise ValueError(
            f"with in_each_group all groups must be open and top_k must be a multiple of num_groups = {num_groups}, got "
            f"open_groups = {open_groups} and top_k = {top_k}"
        )
    if not 1 <= top_k <= num_experts // num_groups * open_groups:
        raise ValueError(
            f"top_k must be in [1, {num_experts // num_groups * open_groups}], the experts of {open_groups} groups, "
            f"got {top_k}"
        )
    if bias is not None and (bias.shape != (num_experts,) or bias.device != scores.device):
        raise ValueError(
            f"bias must have shape ({num_experts},) on {scores.device}, got {tuple(bias.shape)} on {bias.device}"
        )


def _select(scores, bias, top_k, *options):
    _check(scores, bias, top_k, *options[:4])
    scores, bias = scores.contiguous(), None if bias is None else bias.float().contiguous()
    ids, weights = _fake(scores, bias, top_k)
    device, stream = -1, 0
    if scores.is_cuda:
        device = scores.device.index
        stream = torch.cuda.current_stream(device).cuda_stream
    _C.select_experts(
        scores.data_ptr(), 0 if bias is None else bias.data_ptr(), *scores.shape, top_k, *options,
        ids.data_ptr(), weights.data_ptr(), device, stream,
    )  # fmt: skip
    return ids, weights


def _fake(scores, bias, top_k, *options):
    shape = scores.shape[0], top_k
    return scores.new_empty(shape, dtype=torch.int64), scores.new_empty(shape)


_SELECT = define(
    "select_experts",
    "(Tensor scores, Tensor? bias, int top_k, int num_groups, int open_groups, int best_of_group, bool in_each_group, "
    "bool softmax, bool renormalize, float epsilon, float scale) -> (Tensor, Tensor)",
    _select,
    _fake,
)
