"""Gradients of the operator: right, the same bits again, and the same for every number of ranks."""

import functools

import cpu_team
import pytest
import torch
from gradient_case import (
    WEIGHTS,
    alone,
    assert_same_gradients,
    check_gradients,
    forward,
    grad_y,
    gradients,
    virtual_gradients,
)
from layer_case import SKEWS, LayerCase, assert_same_bits
from thread_ranks import make_team, on_ranks, outcomes
from torch.utils.checkpoint import checkpoint

import flashmoe
from flashmoe import MoE, backward, cuda_teams, groups

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# --- one process ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_right_for_every_activation_and_dtype(dtype, gated, activation):
    case = LayerCase(48, 40, 6, 3, (70,), dtype, activation, gated, bias=True)
    check_gradients(case, [gradients(case, 0, None)])


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (33, 17, 5, 2), (130, 300, 3, 3), (257, 129, 2, 1)], ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 300])
def test_right_for_odd_sizes(sizes, num_tokens):
    case = LayerCase(*sizes, (num_tokens,), seed=num_tokens)
    check_gradients(case, [gradients(case, 0, None)])


@pytest.mark.parametrize("skew", [one for one in SKEWS if one != "one_rank"])
def test_right_for_every_skew_and_zero_where_nothing_comes(skew):
    case = LayerCase(tokens=(150,), skew=skew, bias=True)
    found = gradients(case, 0, None)
    check_gradients(case, [found])
    unused = [e for e in range(case.num_experts) if not (case.topk_ids[0] == e).any()]
    dropped = (case.topk_ids[0] < 0) | (case.topk_ids[0] >= case.num_experts)
    assert not found["topk_weights"][dropped].any()
    assert all(not found[name][unused].any() for name in ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias"))


def test_only_what_is_asked_for_is_made_and_it_is_the_same():
    case = LayerCase(tokens=(60,), bias=True)
    full = gradients(case, 0, None)
    for frozen in (("x",), ("topk_weights",), ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias"),
                   ("gate_up_proj", "gate_up_bias"), ("gate_up_proj", "down_proj"), ("x", "topk_weights", "down_proj")):  # fmt: skip
        found = gradients(case, 0, None, frozen)
        assert set(found) == set(full) - set(frozen)
        assert_same_gradients(found, {name: full[name] for name in found}, f"with {frozen} frozen")


def test_gradients_and_weights_as_they_come():
    case = LayerCase(tokens=(12,))
    given = grad_y(case, 0)
    expected = gradients(case, 0, None)

    def found(grad, **changed):
        tensors = {"x": case.x[0], "topk_weights": case.topk_weights[0]} | changed
        leaves = {name: one.detach().requires_grad_() for name, one in tensors.items()}
        y = flashmoe.fused_moe(leaves["x"], case.topk_ids[0], leaves["topk_weights"], case.gate_up_proj, case.down_proj)
        return torch.autograd.grad(y, list(leaves.values()), grad.view(y.shape))

    assert_same_bits(found(given.T.contiguous().T)[0], expected["x"])
    assert_same_bits(found(given, x=case.x[0].view(3, 2, 2, -1))[0].view(12, -1), expected["x"])
    assert_same_bits(found(torch.ones(1, 1).expand(given.shape))[0], found(torch.ones(given.shape))[0])
    doubled = found(given, topk_weights=case.topk_weights[0].double())[1]
    assert doubled.dtype == torch.float64 and torch.equal(doubled.float(), expected["topk_weights"])


def test_no_gradient_of_a_gradient():
    y, leaves = forward(LayerCase(), 0, None)
    (grad,) = torch.autograd.grad(y.sum(), [leaves["x"]], create_graph=True)
    with pytest.raises(RuntimeError, match="flashmoe: second derivatives of fused_moe are not implemented"):
        grad.sum().backward()


def test_forward_run_again_gives_the_same_gradients():
    torch.manual_seed(1)
    layer, x = MoE(32, 24, 8, 2), torch.randn(30, 32, requires_grad=True)

    def found(call):
        return torch.autograd.grad(call(x).square().sum(), [x, *layer.parameters()])

    for kept, again in zip(found(layer), found(lambda x: checkpoint(layer, x, use_reentrant=False)), strict=True):
        assert_same_bits(kept, again)


def test_layer_learns():
    """Gradients have the right sign and reach everything: a layer fits another's outputs."""
    torch.manual_seed(2)
    teacher, student = (MoE(16, 32, 4, 2, bias=True) for _ in range(2))
    for parameter in [*teacher.parameters(), *student.parameters()]:
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(256, 16)
    with torch.no_grad():
        wanted = teacher(x)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (student(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 4, losses[::10]


def test_gradient_of_y_that_does_not_fit_is_named():
    case = LayerCase(tokens=(5,))
    tensors = (case.x[0], case.topk_ids[0], case.topk_weights[0], case.gate_up_proj, case.down_proj, None, None, None)
    op = torch.ops.flashmoe.moe_local_backward.default
    for wrong in (torch.zeros(4, 32), torch.zeros(5, 32, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"grad_y must be of shape \(5, 32\) and torch.float32 on cpu, as x is, got"):
            op(wrong, *tensors, "silu", True, 0, [False] * 4)


# --- as GPUs are asked, on ranks of the CPU that stand in for them --------------------------------------------------


@pytest.mark.parametrize("tokens", [(30,), (20, 0, 41)], ids=str)
def test_virtual_ranks_have_the_gradients_of_one_process(tokens, monkeypatch):
    cpu_team.install(monkeypatch)
    case = LayerCase(tokens=tokens, num_experts=6, owners=(0,) * 6 if len(tokens) == 1 else (2, 0, 0, 2, 2, 0))
    found = virtual_gradients(case)
    check_gradients(case, found)
    _, whole = alone(case)
    assert_same_bits(torch.cat([one["x"] for one in found]), whole["x"])


def test_a_call_that_is_queued_has_its_gradients(monkeypatch):
    cpu_team.install(monkeypatch)
    case = LayerCase(tokens=(12,), bias=True)
    weights = [case.weights_of(0)[name] for name in ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")]
    queued = functools.partial(cuda_teams.call, "backward", None, 0, case.dtype)
    found = backward._backward(
        queued, 1, grad_y(case, 0), case.x[0], case.topk_ids[0], case.topk_weights[0], *weights, None, "silu", True, 0,
        [True] * 4,
    )  # fmt: skip
    assert_same_gradients(dict(zip(("x", "topk_weights", *WEIGHTS), found, strict=True)), gradients(case, 0, None))


# --- ranks ----------------------------------------------------------------------------------------------------


TEAMS = {
    "two": ((17, 9), {}, {}),
    "one has tokens": ((0, 300, 0), {"num_experts": 9, "bias": True}, {}),
    "own placement": ((30, 0, 41), {"num_experts": 9, "owners": (0, 0, 2, 2, 2, 0, 0, 2, 2)}, {}),
    "bf16, skewed, reordered puts": ((200, 100, 33, 7), {"skew": "zipf", "dtype": torch.bfloat16}, {"remote_only_seed": 3}),
    "dropped, workers": ((64, 300), {"skew": "some_dropped"}, {"num_workers": 3, "remote_only_seed": 5}),
    "all to one rank": ((150, 150, 150), {"skew": "one_rank", "num_experts": 6, "top_k": 1}, {"num_workers": 2}),
    "no tokens": ((0, 0), {}, {}),
}


@pytest.mark.parametrize("name", TEAMS)
def test_ranks_have_the_gradients_of_one_process(name):
    tokens, how, options = TEAMS[name]
    case = LayerCase(hidden_size=64, tokens=tokens, **how)
    team = make_team(len(tokens), max_tokens=320, **options)
    found, again = (on_ranks(team, lambda rank, group: gradients(case, rank, group)) for _ in range(2))
    check_gradients(case, found)
    for one, other in zip(found, again, strict=True):
        assert_same_gradients(one, other, "on repeat")
    _, whole = alone(case)
    for of_tokens in ("x", "topk_weights"):
        assert_same_bits(torch.cat([one[of_tokens] for one in found]), whole[of_tokens], f"of {of_tokens} by one process")


def test_calls_of_both_kinds_follow_each_other():
    cases = [LayerCase(tokens=tokens, seed=seed, layer=1 + seed % 2)
             for seed, tokens in enumerate([(5, 60), (0, 0), (70, 0), (9, 9), (0, 80), (33, 2)] * 2)]  # fmt: skip
    team = make_team(2)

    def train(rank, group):
        steps = [forward(case, rank, group) for case in cases]
        return [
            dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad_y(case, rank)), strict=True))
            for case, (y, leaves) in zip(cases, steps, strict=True)
        ]

    by_rank = on_ranks(team, train)
    for number, case in enumerate(cases):
        check_gradients(case, [found[number] for found in by_rank])


def test_ranks_may_freeze_different_weights():
    case = LayerCase(tokens=(40, 30))
    frozen = ((), ("gate_up_proj", "down_proj"))
    team = make_team(2)
    full = on_ranks(team, lambda rank, group: gradients(case, rank, group))
    for rank, found in enumerate(on_ranks(team, lambda rank, group: gradients(case, rank, group, frozen[rank]))):
        assert_same_gradients(found, {name: full[rank][name] for name in found})


def test_rank_that_goes_forward_again_meets_ranks_that_go_back():
    case = LayerCase(tokens=(8, 8), layer=3)

    def step(rank, group):
        y, leaves = forward(case, rank, group)
        return case.call(rank, group) if rank else torch.autograd.grad(y.sum(), [leaves["x"]])

    errors = outcomes(make_team(2), step)
    assert all(isinstance(error, flashmoe.PeerError) for error in errors), errors
    assert any("the backward pass of layer 3" in str(error) for error in errors), errors


def test_group_without_memory_for_it_says_so():
    (group,) = make_team(1, backward=False)
    y, leaves = forward(LayerCase(), 0, group)
    with pytest.raises(ValueError, match="has no memory for backward calls"):
        torch.autograd.grad(y.sum(), [leaves["x"]])
    assert groups.find(groups.name_of(group)).failed is None
