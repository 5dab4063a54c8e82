"""The hook on a router's probabilities before top-k: per token, differentiable, and gone when its block ends."""

import pytest
import torch

from flashmoe.routing import ROUTERS, Router, SoftmaxTopK, make_router

T, H, E = 50, 24, 16


def some_router(name: str) -> Router:
    router = make_router(name, H, E, 4, **({"num_groups": 4} if name == "group_limited" else {}))
    with torch.no_grad():
        router.weight.normal_()
        for buffer in router.buffers():
            buffer.uniform_(0.2, 1.2)
    return router


@pytest.mark.parametrize("name", ROUTERS)
def test_a_hook_that_changes_nothing_changes_no_bit(name):
    router = some_router(name)
    x = torch.randn(T, H) * 20  # some probabilities underflow
    expected = router(x)
    with router.hook(lambda probabilities: probabilities.clone()):
        got = router(x)
    assert torch.equal(got.topk_ids, expected.topk_ids) and torch.equal(got.topk_weights, expected.topk_weights)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_hook_acts_per_token_and_is_gone_afterwards(name):
    router = some_router(name)
    x = torch.randn(T, H)
    plain = router(x)
    forbidden = plain.topk_ids[0, 0]

    def forbid(probabilities):
        allowed = torch.ones_like(probabilities)
        allowed[0, forbidden] = 0
        return probabilities * allowed

    with router.hook(forbid):
        hooked = router(x)
    assert forbidden not in hooked.topk_ids[0] or hooked.topk_weights[0][hooked.topk_ids[0] == forbidden] == 0
    assert torch.equal(hooked.topk_ids[1:], plain.topk_ids[1:])
    assert torch.equal(hooked.topk_weights[1:], plain.topk_weights[1:])
    assert torch.equal(router(x).topk_ids, plain.topk_ids)


def test_hooks_nest_and_leave_by_exceptions_too():
    router, seen = SoftmaxTopK(H, E, 2), []

    def note(name):
        return lambda probabilities: seen.append(name) or probabilities

    x = torch.randn(3, H)
    with pytest.raises(KeyError), router.hook(note("outer")):
        with router.hook(note("inner")):
            router(x)
        router(x)
        raise KeyError
    router(x)
    assert seen == ["outer", "inner", "outer"]


@pytest.mark.parametrize("name", ROUTERS)
def test_gradients_pass_through_the_hook_into_the_weights(name):
    router = some_router(name)
    shift = torch.zeros(T, E, requires_grad=True)
    coefficient = torch.rand(T, 4)
    with router.hook(lambda probabilities: probabilities + shift):
        routing = router(torch.randn(T, H))
    (routing.topk_weights * coefficient).sum().backward()
    touched = torch.zeros(T, E).scatter(1, routing.topk_ids, 1.0).bool()
    assert shift.grad.isfinite().all() and (shift.grad[touched] != 0).all() and (shift.grad[~touched] == 0).all()


def test_a_hook_must_keep_the_shape():
    router = SoftmaxTopK(H, E, 2)
    with (
        router.hook(lambda probabilities: probabilities[:, :3]),
        pytest.raises(ValueError, match=r"\(5, 16\).*\(5, 3\)"),
    ):
        router(torch.randn(5, H))
