"""Routers against others' routers where these exist, and against their equations where they do not."""

import importlib
import math

import pytest
import torch
from torch import nn

from flashmoe import Routing
from flashmoe.routing import (
    ROUTERS,
    Grouped,
    GroupLimited,
    SigmoidBias,
    SoftmaxTopK,
    TopKSoftmax,
    make_router,
)

T, H, E = 50, 24, 16


@pytest.fixture(params=[True, False], ids=["training", "inference"])
def grad_mode(request):
    """Weights come another way where gradients are asked for."""
    with torch.set_grad_enabled(request.param):
        yield


both_ways = pytest.mark.usefixtures("grad_mode")


def randomize(router: nn.Module) -> nn.Module:
    """Logits of order 1, and every other parameter and buffer away from its neutral start."""
    with torch.no_grad():
        router.weight.normal_()
        for tensor in [*router.parameters(), *router.buffers()]:
            if tensor is not router.weight:
                tensor.copy_(torch.rand_like(tensor) + 0.2)
    return router


def by_expert(ids, weights):
    """Both [T, k], each row sorted by expert id: others leave the order of the k open."""
    ids, order = ids.sort(dim=-1)
    return ids, weights.gather(-1, order)


def assert_routes_like(routing: Routing, ids, weights) -> None:
    ids, weights = by_expert(ids, weights)
    got_ids, got_weights = by_expert(routing.topk_ids, routing.topk_weights)
    assert torch.equal(got_ids, ids)
    torch.testing.assert_close(got_weights, weights.float(), rtol=1e-6, atol=1e-7)


# --- against Hugging Face transformers ------------------------------------------------------------------------


def hf_router(model: str, cls: str, **config):
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    config_module = importlib.import_module(f"transformers.models.{model}.configuration_{model}")
    router = getattr(module, cls)(getattr(config_module, cls.partition("Top")[0] + "Config")(**config))
    with torch.no_grad():
        router.weight.normal_()
    return router


@both_ways
def test_softmax_topk_renormalised_is_mixtral():
    theirs = hf_router("mixtral", "MixtralTopKRouter", hidden_size=H, num_local_experts=E, num_experts_per_tok=4)
    ours = SoftmaxTopK(H, E, 4)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(T, H)
    logits, weights, ids = theirs(x)
    routing = ours(x)
    assert_routes_like(routing, ids, weights)
    torch.testing.assert_close(routing.logits, logits)


@both_ways
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("model, cls", [("qwen3_moe", "Qwen3MoeTopKRouter"), ("olmoe", "OlmoeTopKRouter")])
def test_softmax_topk_is_qwen3_and_olmoe(model, cls, renormalize):
    theirs = hf_router(model, cls, hidden_size=H, num_experts=E, num_experts_per_tok=5, norm_topk_prob=renormalize)
    ours = SoftmaxTopK(H, E, 5, renormalize=renormalize)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(T, H)
    _, weights, ids = theirs(x)
    assert_routes_like(ours(x), ids, weights)


@both_ways
def test_topk_softmax_is_gpt_oss_without_its_bias():
    theirs = hf_router("gpt_oss", "GptOssTopKRouter", hidden_size=H, num_local_experts=E, num_experts_per_tok=4)
    with torch.no_grad():
        theirs.bias.zero_()
    ours = TopKSoftmax(H, E, 4)
    ours.weight.data.copy_(theirs.weight)
    x = torch.randn(T, H)
    _, weights, ids = theirs(x)
    assert_routes_like(ours(x), ids, weights)


@both_ways
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("num_groups, topk_groups", [(4, 2), (8, 3), (1, 1)])
def test_group_limited_is_deepseek_v3(num_groups, topk_groups, renormalize):
    theirs = hf_router(
        "deepseek_v3", "DeepseekV3TopkRouter", hidden_size=H, n_routed_experts=E, num_experts_per_tok=4,
        n_group=num_groups, topk_group=topk_groups, norm_topk_prob=renormalize, routed_scaling_factor=2.5,
    )  # fmt: skip
    theirs.e_score_correction_bias.copy_(torch.randn(E) * 0.3)  # also scores below zero
    options = {"num_groups": num_groups, "topk_groups": topk_groups}
    ours = GroupLimited(H, E, 4, **options, renormalize=renormalize, routed_scaling_factor=2.5)
    ours.weight.data.copy_(theirs.weight)
    ours.selection_bias.copy_(theirs.e_score_correction_bias)
    x = torch.randn(T, H)
    _, weights, ids = theirs(x)
    assert_routes_like(ours(x), ids, weights)

    if num_groups == 1:  # no limit left: the plain router with a selection bias
        plain = SigmoidBias(H, E, 4, renormalize=renormalize, routed_scaling_factor=2.5)
        plain.load_state_dict(ours.state_dict())
        assert_routes_like(plain(x), ids, weights)


@both_ways
def test_group_limited_with_softmax_is_deepseek_v2():
    theirs = hf_router(
        "deepseek_v2", "DeepseekV2TopkRouter", hidden_size=H, n_routed_experts=E, num_experts_per_tok=4, n_group=4,
        topk_group=2, topk_method="group_limited_greedy", routed_scaling_factor=1.7, num_attention_heads=4,
    )  # fmt: skip
    ours = GroupLimited(H, E, 4, num_groups=4, topk_groups=2, score="softmax", routed_scaling_factor=1.7)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(T, H)
    _, weights, ids = theirs(x)
    assert_routes_like(ours(x), ids, weights)


# --- against the equations ------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("expert_scale", [False, True])
@pytest.mark.parametrize("num_groups, top_k", [(8, 8), (4, 8), (2, 6), (1, 3)])
def test_grouped_takes_its_share_in_each_group(num_groups, top_k, expert_scale):
    router = randomize(Grouped(H, E, top_k, num_groups=num_groups, expert_scale=expert_scale))
    x = torch.randn(T, H)
    routing = router(x)
    size, share = E // num_groups, top_k // num_groups
    weight = router.weight.detach().double()
    for t in range(T):
        logits = [float(x[t].double() @ weight[e]) for e in range(E)]
        total = sum(math.exp(z) for z in logits)
        scores = [math.exp(z) / total for z in logits]
        expected = {}
        for group in range(num_groups):
            members = range(group * size, (group + 1) * size)
            for e in sorted(members, key=lambda e: -scores[e])[:share]:
                expected[e] = scores[e] * (router.expert_scale[e].item() if expert_scale else 1.0)
        got = dict(zip(routing.topk_ids[t].tolist(), routing.topk_weights[t].tolist(), strict=True))
        assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_grouped_balances_ranks_exactly_and_plain_topk_does_not(seed):
    torch.manual_seed(seed)
    experts, top_k, ranks = 64, 8, 8
    routers = [Grouped(H, experts, top_k, num_groups=8), SoftmaxTopK(H, experts, top_k)]
    x = torch.randn(16 + seed, H) * torch.rand(H) * 10  # far from even
    loads = [randomize(router)(x).tokens_per_expert().view(ranks, -1).sum(-1) for router in routers]
    assert loads[0].tolist() == [(16 + seed) * top_k // ranks] * ranks
    assert loads[1].max() > loads[1].min()
    assert routers[0](x).exact_load and not routers[1](x).exact_load


def test_one_group_of_grouped_is_plain_topk():
    grouped, plain = Grouped(H, E, 4, num_groups=1), SoftmaxTopK(H, E, 4, renormalize=False)
    plain.load_state_dict(randomize(grouped).state_dict())
    x = torch.randn(T, H)
    assert_routes_like(grouped(x), plain(x).topk_ids, plain(x).topk_weights)


@pytest.mark.parametrize("router", [SigmoidBias(H, E, 4), GroupLimited(H, E, 4, num_groups=4, topk_groups=2)])
def test_the_bias_selects_and_never_enters_the_weights(router):
    randomize(router)
    router.selection_bias.zero_()
    x = torch.randn(T, H)
    before = router(x)
    router.selection_bias[7] = 100.0
    after = router(x)
    assert (after.topk_ids == 7).any(-1).all() and not (before.topk_ids == 7).any(-1).all()
    scores = after.logits.sigmoid().gather(-1, after.topk_ids)
    torch.testing.assert_close(after.topk_weights, scores / scores.sum(-1, keepdim=True))
    router.selection_bias.fill_(100.0)  # the same for all: it selects nothing
    assert torch.equal(router(x).topk_weights.sort()[0], before.topk_weights.sort()[0])


def test_the_bias_is_a_buffer():
    router = SigmoidBias(H, E, 4)
    assert "selection_bias" in router.state_dict() and "selection_bias" not in dict(router.named_parameters())


# --- precision, ties, odd values ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROUTERS)
def test_bfloat16_tokens_and_gates_are_routed_in_float32(name):
    options = {"num_groups": 4, "topk_groups": 2} if name == "group_limited" else {}
    low = randomize(make_router(name, H, E, 4, **options)).bfloat16()
    high = make_router(name, H, E, 4, **options)
    high.load_state_dict(low.state_dict())
    x = torch.randn(T, H).bfloat16()
    assert low(x).topk_weights.dtype == torch.float32
    assert_routes_like(low(x), high(x.float()).topk_ids, high(x.float()).topk_weights)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_tie_of_all_experts_is_broken_by_index(name):
    router = make_router(name, H, E, 4, **({"num_groups": 4, "topk_groups": 2} if name == "group_limited" else {}))
    with torch.no_grad():
        router.weight.zero_()
    expected = [0, 4, 8, 12] if name == "grouped" else [0, 1, 2, 3]
    assert router(torch.randn(T, H)).topk_ids.tolist() == [expected] * T


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_token_spoils_its_own_row_alone(name, bad):
    router = randomize(make_router(name, H, E, 4, **({"num_groups": 4} if name == "group_limited" else {})))
    x = torch.randn(T, H)
    clean = router(x)
    x[3, 5] = bad
    dirty = router(x)
    assert ((dirty.topk_ids >= 0) & (dirty.topk_ids < E)).all()
    others = torch.arange(T) != 3
    assert torch.equal(dirty.topk_ids[others], clean.topk_ids[others])
    assert torch.equal(dirty.topk_weights[others], clean.topk_weights[others])


@pytest.mark.parametrize("name", ROUTERS)
def test_no_tokens(name):
    routing = make_router(name, H, E, 8)(torch.randn(0, H))
    assert routing.topk_ids.shape == routing.topk_weights.shape == (0, 8)


# --- making routers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_by_name(name):
    router = make_router(name, H, E, 8)
    assert type(router) is ROUTERS[name]
    assert router.weight.shape == (E, H) and router(torch.randn(2, 3, H)).topk_ids.shape == (6, 8)
    assert f"num_experts={E}" in repr(router)


def test_a_module_and_a_function_pass_through():
    module = TopKSoftmax(H, E, 2)
    assert make_router(module, H, E, 2) is module
    assert make_router(len, H, E, 2) is len


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: make_router("best", H, E, 2), ValueError, "router must be one of softmax_topk, .*got 'best'"),
        (lambda: make_router(3, H, E, 2), TypeError, "router must be a name, a module or a function, got int"),
        (lambda: make_router(SoftmaxTopK(H, E, 2), H, E, 2, renormalize=False), ValueError, "renormalize"),
        (lambda: make_router(SoftmaxTopK(H, E, 2), H, E, 3), ValueError, "top_k = 3, got 2"),
        (lambda: make_router(SoftmaxTopK(H, E, 2), H + 1, E, 2), ValueError, f"hidden_size = {H + 1}, got {H}"),
        (lambda: SoftmaxTopK(H, E, 0), ValueError, "top_k must be at least 1, got 0"),
        (lambda: SoftmaxTopK(H, E, E + 1), ValueError, f"top_k must be at most num_experts = {E}, got {E + 1}"),
        (lambda: SoftmaxTopK(0, E, 2), ValueError, "hidden_size must be at least 1, got 0"),
        (lambda: GroupLimited(H, E, 2, num_groups=3), ValueError, f"num_groups must divide num_experts = {E}, got 3"),
        (lambda: GroupLimited(H, E, 2, num_groups=4, topk_groups=5), ValueError, r"topk_groups .*\[1, num_groups = 4\], got 5"),
        (lambda: GroupLimited(H, E, 5, num_groups=4, topk_groups=1), ValueError, "top_k .*got 5"),
        (lambda: GroupLimited(H, E, 2, score="tanh"), ValueError, "score .*got 'tanh'"),
        (lambda: Grouped(H, E, 6, num_groups=4), ValueError, "top_k must be a multiple of num_groups = 4, got 6"),
        (lambda: Grouped(H, E, 3), ValueError, f"num_groups must divide num_experts = {E}, got 3"),
        (lambda: SoftmaxTopK(H, E, 2)(torch.randn(5, H + 1)), ValueError, rf"x must have shape .*{H}.*got \(5, {H + 1}\)"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
