"""The layer against the reference, over what may vary: shapes, placement, skew, token counts, ranks, transports."""

import dataclasses
import random

import pytest
import torch
from layer_case import SKEWS, LayerCase, assert_same_bits
from thread_ranks import make_team, on_ranks

import flashmoe

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def random_case(seed: int, ep_size: int) -> LayerCase:
    """Any shape that the team of ``make_team`` holds: 96 tokens, 512 bytes a row, k = 8, 32 experts."""
    draw = random.Random(1000 * ep_size + seed)
    dtype = draw.choice(DTYPES)
    num_experts = draw.choice([1, 2, 5, 8, 13, 32])
    owners = None
    if num_experts % ep_size or draw.random() < 0.6:
        # Any placement: uneven counts, and sometimes ranks without an expert.
        holders = draw.sample(range(ep_size), draw.randint(1, ep_size))
        owners = tuple(draw.choice(holders) for _ in range(num_experts))
    return LayerCase(
        hidden_size=draw.choice([1, 7, 16, 33, 64, 128]),
        intermediate_size=draw.choice([1, 5, 16, 40, 96]),
        num_experts=num_experts,
        top_k=draw.randint(1, min(8, num_experts)),
        tokens=tuple(draw.choice([0, 1, 2, 9, 30, 65, 96]) for _ in range(ep_size)),
        dtype=dtype,
        activation=draw.choice(ACTIVATIONS),
        gated=draw.random() < 0.7,
        bias=draw.random() < 0.4,
        owners=owners,
        skew=draw.choice(SKEWS),
        ids_dtype=draw.choice([torch.int32, torch.int64]),
        layer=draw.randint(0, 5),
        seed=draw.randrange(2**31),
    )


def check_call(case: LayerCase, team) -> list[torch.Tensor]:
    results = on_ranks(team, case.call)
    for rank, y in enumerate(results):
        case.check(rank, y)
    return results


@pytest.mark.parametrize("remote_only_seed", [None, 1], ids=["mapped", "remote_only"])
@pytest.mark.parametrize("ep_size", [1, 2, 3, 4])
def test_one_group_serves_calls_of_any_shape_in_a_row(ep_size, remote_only_seed):
    team = make_team(ep_size, remote_only_seed=remote_only_seed)
    for seed in range(50):
        check_call(random_case(seed, ep_size), team)


@pytest.mark.parametrize("seed", range(20))
def test_one_process_without_a_group(seed):
    case = random_case(seed, 1)
    case.check(0, case.call(0, None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_kind_of_expert(activation, gated, bias, dtype):
    case = LayerCase(tokens=(13, 6), activation=activation, gated=gated, bias=bias, dtype=dtype, top_k=3)
    check_call(case, make_team(2))


@pytest.mark.parametrize("skew", SKEWS)
@pytest.mark.parametrize("ep_size", [1, 2, 3, 4])
def test_every_skew_at_every_size(skew, ep_size):
    tokens = (70, 3, 0, 41)[:ep_size]
    owners = None if 8 % ep_size == 0 else (0, 1, 2, 0, 1, 2, 0, 0)
    check_call(LayerCase(tokens=tokens, skew=skew, top_k=4, owners=owners), make_team(ep_size))


@pytest.mark.parametrize("tokens", [(0, 0, 0), (0, 20, 0), (96, 0, 1)], ids=str)
def test_ranks_without_tokens(tokens):
    check_call(LayerCase(tokens=tokens, num_experts=9), make_team(3))


def test_a_rank_without_experts_sends_and_gets_its_rows():
    check_call(LayerCase(tokens=(20, 20, 20), owners=(0, 2, 0, 2, 2, 2, 2, 0)), make_team(3))


def test_several_row_blocks_and_chunks_of_one_expert():
    case = LayerCase(tokens=(300, 170), num_experts=4, top_k=2, skew="one_hot_expert")
    check_call(case, make_team(2, max_tokens=300, num_workers=2))


def test_layers_of_different_widths_and_dtypes_share_a_group():
    team = make_team(3)
    cases = [
        LayerCase(tokens=(5, 9, 2), num_experts=6, hidden_size=h, intermediate_size=i, dtype=dtype, layer=layer)
        for layer, (h, i, dtype) in enumerate([(16, 40, DTYPES[0]), (128, 8, DTYPES[1]), (64, 64, DTYPES[2])], start=1)
    ]

    def steps(rank, group):
        return [case.call(rank, group) for _ in range(10) for case in cases]

    for rank, results in enumerate(on_ranks(team, steps)):
        for case, y in zip(cases * 10, results, strict=True):
            case.check(rank, y)


# --- bit for bit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_same_bits_on_repeat_at_every_size_and_on_every_transport(seed, dtype):
    draw = random.Random(seed)
    tokens = tuple(draw.choice([0, 5, 33, 64, 90]) for _ in range(4))
    owners = tuple(draw.randrange(4) for _ in range(13))
    case = LayerCase(
        hidden_size=48, intermediate_size=40, num_experts=13, top_k=4, tokens=tokens, owners=owners, dtype=dtype,
        bias=True, skew=draw.choice(SKEWS), seed=seed,
    )  # fmt: skip
    expected = case.alone()
    assert_same_bits(case.alone(), expected, "on repeat")

    # The same tokens split over 4, over 2 and over 3 ranks (one of them without any), experts placed anew each time.
    for ep_size, shares in ((4, tokens), (2, (sum(tokens[:2]), sum(tokens[2:]))), (3, (sum(tokens[:3]), 0, tokens[3]))):
        split = dataclasses.replace(case, tokens=shares, owners=tuple(owner % ep_size for owner in owners))
        for name in ("x", "topk_ids", "topk_weights"):
            setattr(split, name, list(torch.cat(getattr(case, name)).split(list(shares))))
        for transport in (None, 7 + seed, 77 + seed):
            for num_workers in (1, 2):
                team = make_team(ep_size, max_tokens=400, remote_only_seed=transport, num_workers=num_workers)
                for _ in range(2):
                    y = torch.cat(on_ranks(team, split.call))
                    assert_same_bits(y, expected, f"W={ep_size}, remote_only={transport}, workers={num_workers}")


def test_a_row_has_the_same_bits_whatever_travels_with_it():
    case = LayerCase(tokens=(96,), top_k=4, hidden_size=64)
    together = case.call(0, None)
    for token in range(0, 96, 7):
        alone = flashmoe.fused_moe(
            case.x[0][token : token + 1], case.topk_ids[0][token : token + 1], case.topk_weights[0][token : token + 1],
            case.gate_up_proj, case.down_proj,
        )  # fmt: skip
        assert_same_bits(alone, together[token : token + 1], f"for token {token}")


def test_the_epoch_may_pass_its_end():
    case = LayerCase(tokens=(10, 20))
    team = make_team(2, last_epoch=2**48 - 4)
    expected = case.alone()
    for _ in range(8):
        assert_same_bits(torch.cat(on_ranks(team, case.call)), expected)
