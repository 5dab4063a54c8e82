"""Routers on a GPU: the scores against float64, the selection against the CPU's. Without a GPU all of it is skipped."""

import pytest
import torch
from cuda_case import has_cuda

from flashmoe.routing import ROUTERS, make_router
from flashmoe.selection import Selection, select_experts

pytestmark = pytest.mark.skipif(not has_cuda(), reason="needs a GPU and a build with nvcc")

SELECTIONS = {
    "plain": (8, Selection(2, renormalize=True)),
    "softmax": (128, Selection(8, softmax=True)),
    "groups": (256, Selection(8, num_groups=8, open_groups=4, best_of_group=2, renormalize=True, epsilon=1e-20, scale=2.5)),
    "in each group": (64, Selection(8, num_groups=8, open_groups=8, in_each_group=True)),
    "one warp a block": (6000, Selection(4)),
}  # fmt: skip


@pytest.mark.parametrize(("experts", "selection"), SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize("kind", ["spread", "ties"])
def test_a_small_selection_is_that_of_the_cpu(experts, selection, kind):
    for tokens in (0, 1, 7, 1000):
        scores = torch.rand(tokens, experts) if kind == "spread" else torch.randint(5, (tokens, experts)).float()
        bias = torch.randint(3, (experts,)).float()
        ids, weights = select_experts(scores.cuda(), selection, bias.cuda())
        wanted_ids, wanted_weights = select_experts(scores, selection, bias)
        assert torch.equal(ids.cpu(), wanted_ids)
        torch.testing.assert_close(weights.cpu(), wanted_weights, rtol=1e-6, atol=0)


def test_too_many_experts_for_a_block():
    with pytest.raises(ValueError, match="num_experts must be at most 6144 less the number of groups on a GPU, got 6144"):
        select_experts(torch.zeros(1, 6144, device="cuda"), Selection(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ROUTERS)
def test_routers(name, dtype):
    torch.manual_seed(1)
    router = make_router(name, 512, 64, 8, device="cuda", dtype=dtype)
    x = torch.randn(200, 512, device="cuda").to(dtype)
    training = router(x)
    with torch.no_grad():
        routing = router(x)
    exact = x.double() @ router.weight.double().T
    for logits in (training.logits, routing.logits):
        torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)
    # From the same logits, so that no order of summation decides between neighbours.
    probabilities = router.probabilities(routing.logits)
    ids, weights = router.cpu().select(probabilities.cpu(), routing.logits.cpu())
    assert torch.equal(routing.topk_ids.cpu(), ids)
    torch.testing.assert_close(routing.topk_weights.cpu(), weights, rtol=1e-6, atol=0)


def test_a_router_in_a_graph():
    router = make_router("softmax_topk", 256, 32, 4, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(16, 256, device="cuda").bfloat16()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        router(x)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            captured = router(x)
        x.copy_(torch.randn(16, 256, device="cuda"))
        graph.replay()
        again = router(x)
    assert torch.equal(captured.topk_ids, again.topk_ids)
    assert torch.equal(captured.topk_weights, again.topk_weights)
