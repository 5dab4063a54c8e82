"""What a forward call keeps for its backward call: it is used, changes no bit, and goes with what autograd saves."""

import gc

import pytest
import torch
from gradient_case import assert_same_gradients, check_gradients, forward, grad_y, gradients
from layer_case import LayerCase, assert_same_bits
from thread_ranks import make_team, on_ranks
from torch.utils.checkpoint import checkpoint

from flashmoe import MoE, backward, keeping


def num_kept() -> int:
    gc.collect()
    return len(keeping._kept)


@pytest.fixture
def nothing_kept(monkeypatch):
    return lambda: monkeypatch.setattr(backward, "new_kept", lambda x: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_the_same_gradients_as_without(gated, dtype, nothing_kept):
    case = LayerCase(48, 200, 6, 3, (150,), dtype, "gelu", gated, bias=True, skew="zipf")
    found = gradients(case, 0, None)
    nothing_kept()
    assert_same_gradients(found, gradients(case, 0, None))


def test_ranks_may_differ_in_what_they_keep(monkeypatch):
    case = LayerCase(64, 40, tokens=(70, 200, 9), num_experts=9, bias=True)
    team = make_team(3, max_tokens=256)
    found = on_ranks(team, lambda rank, group: gradients(case, rank, group))
    check_gradients(case, found)
    keep, first = keeping.new_kept, case.x[0].shape
    monkeypatch.setattr(backward, "new_kept", lambda x: keep(x) if x.shape == first else None)
    for one, other in zip(on_ranks(team, lambda rank, group: gradients(case, rank, group)), found, strict=True):
        assert_same_gradients(one, other)


def test_it_is_used(nothing_kept):
    """Tokens that change behind autograd's back do not change what was made of them."""

    def grad_x_of_other_tokens() -> torch.Tensor:
        case = LayerCase(tokens=(30,))
        y, leaves = forward(case, 0, None)
        leaves["x"].data.neg_()
        return torch.autograd.grad(y, [leaves["x"]], grad_y(case, 0))[0]

    expected = gradients(LayerCase(tokens=(30,)), 0, None)["x"]
    assert_same_bits(grad_x_of_other_tokens(), expected)
    nothing_kept()
    assert not torch.equal(grad_x_of_other_tokens(), expected)


def test_it_goes_with_what_autograd_saves():
    case = LayerCase(tokens=(30,))
    before = num_kept()
    y, leaves = forward(case, 0, None)
    assert num_kept() == before + 1
    first = torch.autograd.grad(y, [leaves["x"]], grad_y(case, 0), retain_graph=True)[0]
    assert num_kept() == before + 1
    assert_same_bits(torch.autograd.grad(y, [leaves["x"]], grad_y(case, 0))[0], first)
    assert num_kept() == before, "although y is still there"
    y, _ = forward(case, 0, None)
    assert num_kept() == before + 1
    del y
    assert num_kept() == before
    with torch.no_grad():
        y, _ = forward(case, 0, None)
    assert num_kept() == before, "nobody will ask for gradients"


def test_a_checkpoint_keeps_none_of_it():
    torch.manual_seed(1)
    layer, x = MoE(32, 24, 8, 2), torch.randn(30, 32, requires_grad=True)
    expected = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    before = num_kept()
    y = checkpoint(layer, x, use_reentrant=False)
    assert num_kept() == before
    for one, other in zip(torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]), expected, strict=True):
        assert_same_bits(one, other)
    assert num_kept() == before


def test_what_hooks_bring_back_stands_for_nothing():
    case = LayerCase(tokens=(30,), bias=True)
    expected, before = gradients(case, 0, None), num_kept()
    with torch.autograd.graph.saved_tensors_hooks(lambda one: one.clone(), lambda one: one):
        y, leaves = forward(case, 0, None)
    assert num_kept() == before
    found = torch.autograd.grad(y, list(leaves.values()), grad_y(case, 0))
    assert_same_gradients(dict(zip(leaves, found, strict=True)), expected)
