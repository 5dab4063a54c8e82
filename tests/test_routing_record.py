"""The routing record: what it holds, what it gives back, what it refuses."""

import pytest
import torch

from flashmoe import Routing
from flashmoe.routing import SoftmaxTopK


def test_coo_and_back():
    ids = torch.tensor([[3, 1], [4, 0], [-1, 2], [4, -1]])
    weights = torch.tensor([[0.5, 0.25], [9.0, 0.75], [9.0, 1.5], [9.0, 9.0]])
    routing = Routing(ids, weights, 4)
    token, expert, weight = routing.coo()
    assert token.tolist() == [0, 0, 1, 2] and expert.tolist() == [3, 1, 0, 2]
    assert weight.tolist() == [0.5, 0.25, 0.75, 1.5]
    assert routing.tokens_per_expert().tolist() == [1, 1, 1, 1]

    back = Routing.from_coo(token, expert, weight, num_tokens=4, num_experts=4)
    assert back.topk_ids.tolist() == [[3, 1], [0, 4], [2, 4], [4, 4]]
    assert [part.tolist() for part in back.coo()] == [token.tolist(), expert.tolist(), weight.tolist()]


def test_from_coo_of_any_order_and_uneven_counts():
    token, expert = torch.tensor([2, 0, 2, 2]), torch.tensor([5, 1, 0, 5])
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    routing = Routing.from_coo(token, expert, weight, num_tokens=3, num_experts=6)
    assert routing.topk_ids.tolist() == [[1, 6, 6], [6, 6, 6], [5, 0, 5]]
    assert routing.topk_weights.tolist() == [[2, 0, 0], [0, 0, 0], [1, 3, 4]]
    (routing.topk_weights**2).sum().backward()
    assert weight.grad.tolist() == [2.0, 4.0, 6.0, 8.0]


def test_from_coo_of_nothing():
    nothing = torch.empty(0, dtype=torch.int64)
    assert Routing.from_coo(nothing, nothing, torch.empty(0), 3, 4).topk_ids.tolist() == [[4], [4], [4]]
    assert Routing.from_coo(nothing, nothing, torch.empty(0), 0, 4).topk_ids.shape == (0, 1)


def test_to_takes_all_tensors_along():
    routing = SoftmaxTopK(24, 16, 2)(torch.randn(5, 24)).to("meta")
    assert {t.device.type for t in (routing.topk_ids, routing.topk_weights, routing.logits)} == {"meta"}
    assert routing.num_experts == 16


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Routing(torch.zeros(3), torch.zeros(3), 4), r"topk_ids must have shape \(T, k\), got \(3,\)"),
        (lambda: Routing(torch.zeros(3, 2), torch.zeros(3, 1), 4), r"topk_weights .*\(3, 2\), got \(3, 1\)"),
        (lambda: Routing.from_coo(torch.tensor([0]), torch.tensor([4, 1]), torch.ones(1), 1, 4), "expert must have shape"),
        (lambda: Routing.from_coo(torch.tensor([1]), torch.tensor([0]), torch.ones(1), 1, 4), r"token .*\[0, 0\], got 1"),
        (lambda: Routing.from_coo(torch.tensor([0]), torch.tensor([5]), torch.ones(1), 1, 4), r"expert .*\[-1, 4\], got 5"),
    ],
)  # fmt: skip
def test_a_bad_record_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
