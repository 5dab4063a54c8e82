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
    softmax        weights are the softmax over the chosen scores; else the scores themselves,
    renormalize    divided by their sum and epsilon,
    scale          and multiplied by this
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
        ValueError: on a GPU, if E and num_groups together are above 6144.
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
        return chosen.softmax(dim=-1)
    if selection.renormalize:
        chosen = chosen / (chosen.sum(-1, keepdim=True) + selection.epsilon)
    return chosen * selection.scale


# --- the operator ---------------------------------------------------------------------------------------------


def _select(scores, bias, top_k, *options):
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
