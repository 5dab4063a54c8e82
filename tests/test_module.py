"""The layer around the operator: router and replay, statistics, start values, numbers, copies."""

import copy
import pickle

import pytest
import torch
from layer_case import LayerCase, assert_same_bits
from thread_ranks import make_team, on_ranks

import flashmoe
from flashmoe import MoE, Routing, moe_reference

H, I, E, K = 32, 24, 8, 2


@torch.no_grad()
def test_layer_is_router_and_operator():
    layer = MoE(H, I, E, K, bias=True, activation="gelu", dtype=torch.float32)
    layer.down_bias.normal_(), layer.gate_up_bias.normal_()
    x = torch.randn(2, 9, H)
    routing = layer.router(x)
    expected = moe_reference(
        x, routing.topk_ids, routing.topk_weights, layer.gate_up_proj, layer.down_proj, activation="gelu",
        gate_up_bias=layer.gate_up_bias, down_bias=layer.down_bias,
    )  # fmt: skip
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_layer_replays_a_routing():
    layer, x = MoE(H, I, E, K), torch.randn(9, H)
    recorded = layer.router(x)
    layer.router.weight.neg_()
    replayed = layer(x, recorded)
    assert not torch.equal(replayed, layer(x))
    layer.router.weight.neg_()
    assert_same_bits(replayed, layer(x))
    half = Routing.from_coo(*recorded.coo(), num_tokens=9, num_experts=E)
    assert_same_bits(layer(x, routing=half), replayed)


@torch.no_grad()
def test_router_may_be_a_function():
    def route(x):
        return torch.zeros(len(x), 1, dtype=torch.int64), torch.ones(len(x), 1)

    layer, x = MoE(H, I, E, 1, router=route), torch.randn(2, 3, H)
    expected = flashmoe.fused_moe(
        x, torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1), layer.gate_up_proj, layer.down_proj
    )
    assert_same_bits(layer(x), expected)


@torch.no_grad()
def test_statistics_belong_to_the_layer():
    first, second = MoE(H, I, E, K), MoE(H, I, E, K)
    assert first.stats is None
    counts = []
    for layer, num_tokens in ((first, 9), (second, 4), (first, 7), (second, 3), (second, 5)):
        routing = Routing(torch.randint(0, E + 1, (num_tokens, K)), torch.rand(num_tokens, K), E)
        layer(torch.randn(num_tokens, H), routing)
        counts.append(routing.tokens_per_expert().tolist())
    assert first.stats["tokens_per_expert"] == counts[2]
    assert second.stats["tokens_per_expert"] == counts[4]


def test_statistics_count_what_was_sent():
    case = LayerCase(H, I, E, K, (20, 30))
    team = make_team(2)
    on_ranks(team, case.call)
    for rank, group in enumerate(team):
        stats, mine = group.stats(), case.local_experts(rank)
        rows = [sum(int((ids == e).sum()) for ids in case.topk_ids) for e in mine]
        assert stats["tokens_per_expert"] == rows
        foreign = ~torch.isin(case.topk_ids[rank], torch.tensor(mine))
        assert stats["bytes_per_peer"]["rows"][1 - rank] == int(foreign.any(-1).sum()) * H * 4  # once per token
        assert stats["bytes_per_peer"]["rows"][rank] == stats["bytes_per_peer"]["results"][rank] == 0
        returned = int(torch.isin(case.topk_ids[1 - rank], torch.tensor(mine)).sum())
        assert stats["bytes_per_peer"]["results"][1 - rank] == returned * H * 4


def test_start_values_depend_on_the_seed_and_not_on_the_placement():
    torch.manual_seed(5)
    whole = MoE(H, I, E, K)
    assert whole.gate_up_proj.std().item() == pytest.approx(0.02, rel=0.05)
    owners = [2, 0, 1, 1, 0, 2, 1, 1]
    for placement in (owners, None):
        for rank, group in enumerate(team := make_team(len(set(owners)) if placement else 2)):
            torch.manual_seed(5)
            part = MoE(H, I, E, K, group=group, expert_map=placement)
            expected = [e for e in range(E) if (placement[e] if placement else e * len(team) // E) == rank]
            assert part.local_experts == expected
            assert torch.equal(part.gate_up_proj, whole.gate_up_proj[expected])
            assert torch.equal(part.down_proj, whole.down_proj[expected])
            assert torch.equal(part.router.weight, whole.router.weight)


def test_layers_are_numbered_per_group_and_copy():
    (group,) = make_team(1)
    assert [MoE(H, I, E, K, group=group).layer for _ in range(3)] == [1, 2, 3]
    layer = MoE(H, I, E, K, group=group, expert_map=[0] * E, bias=True)
    x = torch.randn(3, H)
    with torch.no_grad():
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert_same_bits(twin(x), layer(x))
    assert set(layer.state_dict()) == {
        "router.weight", "gate_up_proj", "down_proj", "gate_up_bias", "down_bias",
    }  # fmt: skip
    assert "8 of them on rank 0 of 1" in repr(layer)
