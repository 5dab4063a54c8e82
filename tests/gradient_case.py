"""The gradients of one LayerCase: as its ranks get them, and as autograd makes them of the reference in float64."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from layer_case import ACCUMULATION, ROUNDING, LayerCase, assert_same_bits, one_torch_thread
from torch import Tensor

import flashmoe
from flashmoe import moe_reference
from flashmoe.virtual_ranks import VirtualRanks

WEIGHTS = ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")


def grad_y(case: LayerCase, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + rank)
    return torch.randn(case.x[rank].shape, generator=generator).to(case.dtype)


def forward(
    case: LayerCase, rank: int, group: Any, frozen: Iterable[str] = (), device: str = "cpu"
) -> tuple[Tensor, dict[str, Tensor]]:
    """y of that rank, and its leaves by name but for the ``frozen`` ones."""
    tensors = {"x": case.x[rank], "topk_weights": case.topk_weights[rank], **case.weights_of(rank)}
    copies = {name: one.detach().to(device, copy=True) for name, one in tensors.items()}
    tensors = {name: one.requires_grad_(name not in frozen) for name, one in copies.items()}
    owners = torch.tensor(case.owners, dtype=torch.int32) if case.owners else None
    y = flashmoe.fused_moe(
        tensors["x"], case.topk_ids[rank].to(device), tensors["topk_weights"],
        **{name: one for name, one in tensors.items() if name in WEIGHTS}, activation=case.activation,
        gated=case.gated, group=group, expert_map=owners, layer=case.layer,
    )  # fmt: skip
    return y, {name: one for name, one in tensors.items() if one.requires_grad}


def gradients(
    case: LayerCase, rank: int, group: Any, frozen: Iterable[str] = (), device: str = "cpu"
) -> dict[str, Tensor]:
    """On the CPU, of a call on the device."""
    y, leaves = forward(case, rank, group, frozen, device)
    found = torch.autograd.grad(y, list(leaves.values()), grad_y(case, rank).to(device))
    return {name: one.cpu() for name, one in zip(leaves, found, strict=True)}


def virtual_gradients(case: LayerCase, device: str = "cpu", **options: Any) -> list[dict[str, Tensor]]:
    """By rank, of a case without biases on virtual ranks of the device, and brought back from there."""
    ranks = range(case.ep_size)
    weights = [case.weights_of(rank) for rank in ranks]
    given = [
        [grad_y(case, rank) for rank in ranks], case.x, case.topk_ids, case.topk_weights,
        [of["gate_up_proj"] for of in weights], [of["down_proj"] for of in weights],
    ]  # fmt: skip
    team = VirtualRanks(
        case.ep_size, max_tokens=max(case.tokens), max_wire_bytes=case.hidden_size * case.dtype.itemsize,
        max_top_k=case.top_k, max_experts=case.num_experts, **options,
    )  # fmt: skip
    found = team.backward(
        *([one.to(device) for one in of_ranks] for of_ranks in given), activation=case.activation, gated=case.gated,
        num_experts=case.num_experts,
        expert_map=torch.tensor(case.owners, dtype=torch.int32) if case.owners else None,
    )  # fmt: skip
    names = ("x", "topk_weights", *WEIGHTS[:2])
    return [{name: one.cpu() for name, one in zip(names, of_rank, strict=True)} for of_rank in found]


def alone(case: LayerCase, device: str = "cpu") -> tuple[LayerCase, dict[str, Tensor]]:
    """The same case where one process owns every expert, all ranks' tokens in a row, and its gradients."""
    whole = dataclasses.replace(case, owners=None, tokens=(sum(case.tokens),))
    for name in ("x", "topk_ids", "topk_weights"):
        setattr(whole, name, [torch.cat(getattr(case, name))])
    for name in WEIGHTS:
        setattr(whole, name, getattr(case, name))
    y, leaves = forward(whole, 0, None, device=device)
    given = torch.cat([grad_y(case, rank) for rank in range(case.ep_size)]).to(device)
    found = torch.autograd.grad(y, list(leaves.values()), given)
    return whole, {name: one.cpu() for name, one in zip(leaves, found, strict=True)}


def check_gradients(
    case: LayerCase, by_rank: list[dict[str, Tensor]], factors_rounded: bool = False, device: str = "cpu"
) -> None:
    """Asserts that they are the reference's, made on the device: each expert's matrix, each token's row, each pair's weight.

    Ours rounds an expert's row of x's gradient to the dtype before they are summed, and every result once; the rest is
    accumulation in float32, relative to the size of what is added up. Tensor cores take the factors of these sums
    rounded to the dtype, too.
    """
    with one_torch_thread():
        truth = _reference(case, device)
    for rank, found in enumerate(by_rank):
        mine = case.local_experts(rank)
        for name, got in found.items():
            leaf = getattr(case, name)
            expected_dtype = torch.float32 if name == "topk_weights" else case.dtype
            assert got.dtype == expected_dtype and got.is_contiguous(), name
            expected = truth[name][mine] if isinstance(leaf, Tensor) else truth[name][rank]
            assert got.shape == expected.shape, name
            rounded = torch.float32 if name == "topk_weights" else case.dtype
            if not expected.numel():
                continue
            # Of a token's row, an expert's matrix, or all pairs: what its elements are sums like, also one small by chance.
            dims = tuple(range(name != "topk_weights", got.ndim))
            size = expected.abs().amax(dim=dims, keepdim=True)
            allowed = ROUNDING[rounded] * (expected.abs() + 3 * case.top_k * size * (name == "x")) + 3 * ACCUMULATION * size
            if factors_rounded:
                allowed = allowed + 2 * ROUNDING[case.dtype] * size
            if rounded == torch.float16:
                allowed = allowed + 2.0**-24
            excess = (got.to(device).double() - expected).abs() - allowed
            assert excess.max() <= 0, f"{name} of rank {rank}: {excess.max():.3g} too far; {case}"


def _reference(case: LayerCase, device: str) -> dict[str, Any]:
    """In float64: of x and topk_weights by rank, of the weights of all experts."""

    def leaf(given: Tensor) -> Tensor:
        return given.to(device).double().requires_grad_()

    x, topk_weights = [leaf(one) for one in case.x], [leaf(one) for one in case.topk_weights]
    weights = {name: getattr(case, name) for name in WEIGHTS}
    weights = {name: leaf(one) for name, one in weights.items() if one is not None}
    y = moe_reference(
        torch.cat(x), torch.cat(case.topk_ids).to(device), torch.cat(topk_weights), **weights,
        activation=case.activation, gated=case.gated, compute_dtype=torch.float64,
    )  # fmt: skip
    given = torch.cat([grad_y(case, rank) for rank in range(case.ep_size)]).to(device).double()
    found = torch.autograd.grad(y, [*x, *topk_weights, *weights.values()], given)
    ranks = case.ep_size
    return {
        "x": found[:ranks], "topk_weights": found[ranks : 2 * ranks],
        **dict(zip(weights, found[2 * ranks :], strict=True)),
    }  # fmt: skip


def assert_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor], about: str = "") -> None:
    assert list(got) == list(expected)
    for name, one in got.items():
        assert_same_bits(one, expected[name], f"of the gradient of {name} {about}")
