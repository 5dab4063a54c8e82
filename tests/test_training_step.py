"""Baselines that are differentiated: gradients are the reference's, wrong ones are refused by name."""

from types import SimpleNamespace

import pytest
import torch
from baseline_case import drawn_problem
from torch.utils.flop_counter import FlopCounterMode

from flashmoe import baselines, contenders, measure
from flashmoe.accuracy import Check
from flashmoe.gradient_accuracy import GradientCheck
from flashmoe.training_step import TrainingStep

CASES = {
    "gated": ((9, 2, 4, 48, 40), {}),
    "ungated": ((7, 1, 3, 32, 16), {"gated": False, "activation": "relu"}),
    "empty experts": ((7, 2, 6, 32, 32), {"used": 2, "activation": "gelu_tanh"}),
    "dropped entries": ((30, 2, 5, 32, 16), {"dropped": 0.3}),
    "bf16": ((40, 2, 4, 64, 48), {"dtype": torch.bfloat16}),
    "one token": ((1, 3, 5, 16, 24), {"activation": "gelu"}),
}


def judged(problem):
    whole = SimpleNamespace(gate_up_proj=problem.gate_up_proj, down_proj=problem.down_proj)
    with torch.no_grad():
        y = Check(problem.shape, whole, *problem.inputs[0], problem.num_tokens)
    gradients = GradientCheck(problem.shape, whole, *problem.inputs[0], problem.grad_y[0])
    return contenders.Judge(measure.Ranks(), problem.experts_per_rank, y, gradients, tuple(gradients.experts))


def entered(problem, make, name="chain"):
    with torch.no_grad():
        return contenders.enter(name, make, problem, judged(problem), 1, graph=False)


def chain(problem):
    return baselines.baseline("chain").make(problem)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("baseline", ["chain", "hf-eager", "hf-grouped_mm", "hf-batched_mm"])
def test_gradients_are_the_references(baseline, name):
    if baseline != "chain":
        pytest.importorskip("transformers")
    sizes, how = CASES[name]
    problem = drawn_problem(*sizes, **how, backward=True)
    contender, said = entered(problem, baselines.baseline(baseline).make, baseline)
    if "dropped" in how and baseline != "chain":
        assert said["skipped"] == "drops nothing"
        return
    assert contender is not None and set(said["gradient_errors"]) == set(problem.leaves(0)), said
    assert max(said["gradient_errors"].values()) < (0.02 if problem.dtype == torch.bfloat16 else 2e-6)
    again = [contender.call() for _ in range(2)][1]  # of the second input, after another's backward pass
    assert all(one.dtype == problem.dtype or one.dtype == torch.float32 for one in again)
    assert all(leaf.grad is None for leaf in problem.leaves(0).values())


class Tampered(torch.autograd.Function):
    """As it is, but its gradient is off by a factor."""

    @staticmethod
    def forward(ctx, tensor, factor):
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


@pytest.mark.parametrize("place", range(4))
def test_wrong_gradient_is_refused_by_name(place):
    problem = drawn_problem(9, 2, 4, 32, 16, backward=True)

    def slightly_wrong(problem):
        name, leaf = list(problem.leaves(0).items())[place]
        tampered = Tampered.apply(leaf, 1.001)
        if name == "x":
            inputs = [(tampered, problem.inputs[0][1])]
        elif name == "topk_weights":
            routing = problem.inputs[0][1]
            inputs = [(problem.inputs[0][0], type(routing)(routing.topk_ids, tampered, routing.num_experts))]
        else:
            return chain(baselines.Problem(**vars(problem) | {name: tampered, "inputs": problem.inputs[:1]}))
        return chain(baselines.Problem(**vars(problem) | {"inputs": inputs}))

    contender, said = entered(problem, slightly_wrong)
    name = list(problem.leaves(0))[place]
    assert contender is None
    assert said["skipped"].startswith(f"its gradient of {name} is wrong: relative error 1.0e-03, where rounding gives")


def test_expert_without_rows_must_have_zeros():
    problem = drawn_problem(7, 2, 6, 32, 32, used=2, backward=True)
    judge = judged(problem)
    assert judge.experts == (0, 1, 2)
    with torch.enable_grad():
        step = TrainingStep(chain(problem)[0], problem.leaves(0), problem.grad_y[0])
    y, *gradients = step()
    assert judge.of("chain", y.detach(), gradients)[1] is None
    gradients[3][2] = 1e-30
    assert judge.of("chain", y.detach(), gradients)[1].startswith("its gradient of down_proj is wrong: relative error ")


def test_relu_may_fall_on_either_side_of_its_kink():
    """A value that is 0 but for rounding: both slopes are right, and a wrong slope elsewhere is not."""
    problem = drawn_problem(5, 1, 2, 32, 16, gated=False, activation="relu", backward=True)
    (x, routing), expert = problem.inputs[0], int(problem.inputs[0][1].topk_ids[0, 0])
    with torch.no_grad():
        row = problem.gate_up_proj[expert, 3]
        row -= x[0] * (row @ x[0]) / (x[0] @ x[0])  # so that token 0's fourth value is 0
    judge = judged(problem)

    def sloped(slope):
        def act(z):
            return torch.where(z.abs() < 1e-5, z * slope, z.relu())

        def call():
            hidden = (x @ problem.gate_up_proj.transpose(1, 2)).gather(
                0, routing.topk_ids.long().view(1, -1, 1).expand(1, -1, 16)
            )[0]
            down = problem.down_proj[routing.topk_ids.flatten().long()]
            return (down @ act(hidden)[..., None])[..., 0] * routing.topk_weights

        y, *gradients = TrainingStep(call, problem.leaves(0), problem.grad_y[0])()
        return judge.of("chain", y.detach(), gradients)[1]

    assert sloped(0.0) is None and sloped(1.0) is None
    assert "its gradient of x is wrong" in sloped(3.0)


@pytest.mark.parametrize(("make", "reason"), [
    (lambda problem: [lambda: torch.zeros(9, 32)] * 2, "no backward: its result carries no gradient"),
    (lambda problem: [lambda: problem.inputs[0][1].topk_weights.sum() * torch.ones(9, 32)] * 2,
     "no backward: its result carries no gradient of x"),
    (lambda problem: [lambda: Raises.apply(call()) for call in chain(problem)],
     "no backward: it raised NotImplementedError: only forward"),
])  # fmt: skip
def test_what_has_no_backward_is_told_by_name(make, reason):
    contender, said = entered(drawn_problem(9, 2, 4, 32, 16, backward=True), make)
    assert contender is None and said == {"name": "chain", "skipped": reason}


class Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return tensor.clone()

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError("only forward")


@pytest.mark.parametrize("name", ["gated", "ungated", "dropped entries"])
def test_ceiling_has_as_many_flops_as_forward_and_backward(name):
    sizes, how = CASES[name]
    problem = drawn_problem(*sizes, **how, backward=True)
    contender, said = entered(problem, baselines.baseline("ceiling").make, "ceiling")
    assert said == {"name": "ceiling"}
    with FlopCounterMode(display=False) as counted:
        contender.call()
    rows = sum(problem.kept(routing) for _, routing in problem.inputs) // 2
    assert counted.get_total_flops() == 3 * problem.shape.flops(rows)


def test_few_tokens_and_experts_are_checked_where_all_would_take_too_long(monkeypatch):
    from flashmoe import gradient_accuracy

    problem = drawn_problem(64, 2, 8, 32, 16, backward=True)
    monkeypatch.setattr(gradient_accuracy, "_REFERENCE_FLOPS", 3 * problem.shape.flops(32))
    judge = judged(problem)
    assert judge.gradients.tokens.tolist() == [4 * place for place in range(16)] and judge.experts == (0, 4)
    contender, said = entered(problem, chain)
    assert contender is not None and max(said["gradient_errors"].values()) < 2e-6
