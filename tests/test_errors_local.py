"""What one process can get wrong: every mistake is an exception that says what was expected and what came."""

import dataclasses
import re

import pytest
import torch
from layer_case import LayerCase, assert_same_bits
from thread_ranks import make_team, on_ranks, outcomes

import flashmoe
from flashmoe import MoE, PeerError, Routing

T, H, I, E, K = 12, 32, 24, 8, 2


def good() -> dict:
    case = LayerCase(H, I, E, K, (T,), bias=True)
    tensors = {"x": case.x[0], "topk_ids": case.topk_ids[0], "topk_weights": case.topk_weights[0]}
    return tensors | case.weights_of(0) | {"expert_map": torch.zeros(E, dtype=torch.int32)}


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


BAD_ARGUMENTS = [
    # dtype
    ("x", lambda t: t.double(), TypeError, "x must have dtype torch.float32, torch.bfloat16 or torch.float16, got torch.float64"),
    ("x", lambda t: t.bfloat16(), TypeError, "gate_up_proj must have the dtype of x, torch.bfloat16, got torch.float32"),
    ("gate_up_proj", lambda t: t.half(), TypeError, "gate_up_proj must have the dtype of x, torch.float32, got torch.float16"),
    ("down_proj", lambda t: t.bfloat16(), TypeError, "down_proj must have the dtype of x, torch.float32, got torch.bfloat16"),
    ("gate_up_bias", lambda t: t.double(), TypeError, "gate_up_bias must have the dtype of x, torch.float32, got torch.float64"),
    ("down_bias", lambda t: t.int(), TypeError, "down_bias must have the dtype of x, torch.float32, got torch.int32"),
    ("topk_ids", lambda t: t.float(), TypeError, "topk_ids must have dtype torch.int32 or torch.int64, got torch.float32"),
    ("topk_weights", lambda t: t.int(), TypeError, "topk_weights must have a floating point dtype, got torch.int32"),
    ("expert_map", lambda t: t.long(), TypeError, "expert_map must have dtype torch.int32, got torch.int64"),
    # no tensor at all
    ("x", lambda t: t.tolist(), TypeError, "x must be a torch.Tensor, got list"),
    ("topk_ids", lambda t: t.numpy(), TypeError, "topk_ids must be a torch.Tensor, got ndarray"),
    ("down_proj", lambda t: None, TypeError, "down_proj must be a torch.Tensor, got NoneType"),
    # shape
    ("x", lambda t: t[:, :-1], ValueError, "x must have shape (..., H = 32) to go with down_proj, got (12, 31)"),
    ("x", lambda t: t[0, 0], ValueError, "x must have shape (..., H = 32) to go with down_proj, got ()"),
    ("x", lambda t: t[:-1], ValueError, "topk_ids must have shape (T, k) = (11, 2), got (12, 2)"),
    ("topk_ids", lambda t: t[:, 0], ValueError, "topk_ids must have shape (T, k) = (12, 2), got (12,)"),
    ("topk_ids", lambda t: t[:, :1], ValueError, "topk_weights must have shape (T, k) = (12, 1), got (12, 2)"),
    ("topk_ids", lambda t: t[:, :0], ValueError, "topk_ids must have shape (T, k) = (12, 2), got (12, 0)"),
    ("topk_weights", lambda t: t[1:], ValueError, "topk_weights must have shape (T, k) = (12, 2), got (11, 2)"),
    ("down_proj", lambda t: t[0], ValueError, "down_proj must have shape (E_local, H, I), got (32, 24)"),
    ("gate_up_proj", lambda t: zeros(E, I, H), ValueError, "gate_up_proj must have shape (E_local, 2I, H) = (8, 48, 32) to go with down_proj (8, 32, 24), got (8, 24, 32)"),
    ("gate_up_proj", lambda t: t[:-1], ValueError, "gate_up_proj must have shape (E_local, 2I, H) = (8, 48, 32) to go with down_proj (8, 32, 24), got (7, 48, 32)"),
    ("gate_up_bias", lambda t: zeros(E, I), ValueError, "gate_up_bias must have shape (E_local, 2I) = (8, 48), got (8, 24)"),
    ("down_bias", lambda t: zeros(H), ValueError, "down_bias must have shape (E_local, H) = (8, 32), got (32,)"),
    ("expert_map", lambda t: t[:, None], ValueError, "expert_map must be contiguous with shape (num_experts,), got shape (8, 1)"),
    ("expert_map", lambda t: zeros(E + 1, dtype=torch.int32), ValueError, "must hold the 9 experts that expert_map gives to rank 0, got 8"),
    # stride
    ("gate_up_proj", lambda t: t.mT.contiguous().mT, ValueError, "gate_up_proj must be contiguous, got strides (1536, 1, 48) for shape (8, 48, 32)"),
    ("down_proj", lambda t: t.mT.contiguous().mT, ValueError, "down_proj must be contiguous, got strides (768, 1, 32) for shape (8, 32, 24)"),
    ("down_bias", lambda t: zeros(H, E).T, ValueError, "down_bias must be contiguous"),
    # device
    ("down_proj", lambda t: t.to("meta"), ValueError, "down_proj must be on the device of x, cpu, got meta"),
    ("topk_ids", lambda t: t.to("meta"), ValueError, "topk_ids must be on the device of x, cpu, got meta"),
    ("x", lambda t: t.to("meta"), ValueError, "topk_ids must be on the device of x, meta, got cpu"),
    # values
    ("topk_ids", lambda t: t.masked_fill(t == t[3, 1], E + 1), ValueError, "topk_ids must lie in [0, 8) (8 or -1: dropped), got 9 for token"),
    ("topk_ids", lambda t: t.int() - 9, ValueError, "topk_ids must lie in [0, 8) (8 or -1: dropped), got -"),
    ("expert_map", lambda t: t.index_fill(0, torch.tensor([5]), 1), ValueError, "expert_map must hold ranks in [0, 1), got 1 for expert 5"),
    ("expert_map", lambda t: t - 1, ValueError, "expert_map must hold ranks in [0, 1), got -1 for expert 0"),
    ("activation", lambda t: "swish", ValueError, "activation must be one of silu, gelu, gelu_tanh, relu, got 'swish'"),
    ("gated", lambda t: False, ValueError, "gate_up_proj must have shape (E_local, I, H) = (8, 24, 32)"),
    ("group", lambda t: 3, TypeError, "group must be a torch.distributed.ProcessGroup, got int"),
    ("group", lambda t: "nobody", Exception, "nobody"),
]  # fmt: skip


@pytest.mark.parametrize(
    "name, spoil, error, message", BAD_ARGUMENTS, ids=[f"{n}:{case[0]}" for n, case in enumerate(BAD_ARGUMENTS)]
)
def test_bad_argument(name, spoil, error, message):
    arguments = good()
    arguments[name] = spoil(arguments.get(name))
    with pytest.raises(error, match=re.escape(message)):
        flashmoe.fused_moe(**arguments)
    flashmoe.fused_moe(**good())  # and nothing is left of it


def test_every_argument_of_the_good_call_is_spoilt_somewhere():
    assert set(good()) <= {case[0] for case in BAD_ARGUMENTS}


# --- several ranks --------------------------------------------------------------------------------------------


def named(errors, kind, *parts):
    for rank, error in enumerate(errors):
        assert type(error) is kind, f"rank {rank}: {error!r}"
        for part in parts:
            assert part in str(error), f"rank {rank}: {part!r} is not in {error}"


CHANGES = {
    "layer": {"layer": 4},
    "hidden_size": {"hidden_size": 16},
    "intermediate_size": {"intermediate_size": 8},
    "dtype": {"dtype": torch.bfloat16},
    "activation": {"activation": "relu"},
    "bias": {"bias": True},
    "gated": {"gated": False},
    "placement": {"owners": (0, 1, 2, 0, 1, 2, 0, 1, 2)},
    "num_experts": {"num_experts": 12},
}


@pytest.mark.parametrize("tokens", [(9, 9, 9), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_ranks_that_call_different_layers_all_hear_of_it(change, tokens):
    team = make_team(3, timeout_s=10, entry_timeout_s=10)
    case = LayerCase(H, I, 9, K, tokens, layer=3)
    other = dataclasses.replace(case, **CHANGES[change])
    on_ranks(team, case.call)
    errors = outcomes(team, lambda rank, group: (other if rank == 1 else case).call(rank, group))
    named(errors, PeerError, "flashmoe group 'team'")
    assert any("another layer" in str(error) for error in errors)

    # The failure stays: no rank can go on with this group, and check() tells whoever asks.
    first = [str(error) for error in errors]
    errors = outcomes(team, case.call)
    named(errors, PeerError)
    assert [str(error) for error in errors] == first
    assert [group.failed for group in team] == first
    with pytest.raises(PeerError, match="flashmoe group 'team'"):
        flashmoe.check()


def test_layers_called_in_different_order():
    team = make_team(2, timeout_s=10, entry_timeout_s=10)
    layers = [[MoE(H, I, E, K, group=group) for _ in range(2)] for group in team]

    @torch.no_grad()
    def step(rank, group):
        for layer in layers[rank] if rank == 0 else reversed(layers[rank]):
            layer(torch.randn(5, H))

    named(outcomes(team, step), PeerError, "layer")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokens": (9, 33)}, "number of tokens of x must be at most 32 in this group"),
        ({"top_k": 5}, "top_k must be at most 4 in this group"),
        ({"num_experts": 18}, "num_experts must be at most 16 in this group"),
        ({"hidden_size": 33}, "bytes of one row of x must be at most 128 in this group"),
    ],
)
def test_a_call_above_the_arena_is_refused_before_anything_is_sent(change, message):
    team = make_team(2, max_tokens=32, max_wire_bytes=H * 4, max_top_k=4, max_experts=16)
    case = LayerCase(H, I, E, K, (9, 20))
    too_large = dataclasses.replace(case, **change)

    def step(rank, group):
        if rank == 1:
            with pytest.raises(ValueError, match=re.escape(message)):
                too_large.call(rank, group)
        return case.call(rank, group)

    for _ in range(2):
        for rank, y in enumerate(on_ranks(team, step)):
            case.check(rank, y)


def test_a_rank_that_does_not_come_is_named():
    team = make_team(3, timeout_s=15, entry_timeout_s=1)
    case = LayerCase(H, I, 9, K, (5, 5, 5))
    errors = outcomes(team[:2], case.call)
    named(errors, PeerError)
    assert any("rank 2" in str(error) for error in errors)  # by the first; the other may hear of it from that one


def test_a_group_that_is_gone():
    (group,) = make_team(1)
    layer = MoE(H, I, E, K, group=group)
    del group
    with pytest.raises(Exception, match="team#"):
        layer(torch.randn(3, H))


# --- odd numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ep_size", [1, 3])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["x", "topk_weights", "gate_up_proj", "down_proj", "gate_up_bias", "down_bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nan_and_infinity_reach_only_the_rows_they_touch(where, bad, ep_size, dtype):
    tokens = (40, 30, 0)[:ep_size]
    owners = None if ep_size == 1 else (0, 1, 2, 0, 1, 2, 0, 1)
    case = LayerCase(H, I, E, K, tokens, bias=True, owners=owners, dtype=dtype, activation="gelu")
    team = make_team(ep_size)
    clean = on_ranks(team, case.call)
    expert, token = 4, 7
    if where in ("x", "topk_weights"):
        getattr(case, where)[0][token, 1] = bad
        touched = [
            torch.arange(t) == token if rank == 0 else torch.zeros(t, dtype=bool) for rank, t in enumerate(tokens)
        ]
    else:
        getattr(case, where)[(expert,) + (3,) * (getattr(case, where).ndim - 1)] = bad
        touched = [(ids == expert).any(-1) for ids in case.topk_ids]
        assert touched[0].any() and not touched[0].all()
    for got, expected, rows in zip(on_ranks(team, case.call), clean, touched, strict=True):
        assert_same_bits(got[~rows], expected[~rows], f"by {bad} in {where}")
        if bad != bad:
            assert got[rows].isnan().any(-1).all()


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("gated", [True, False])
def test_a_gate_that_overflows_is_not_finite_where_torch_s_is_not(activation, gated):
    case = LayerCase(H, I, E, K, (20,), gated=gated, activation=activation)
    case.x[0][7, 1] = 3e38  # finite, but not its products with what lies beyond 1
    case.gate_up_proj[:, :I:3] *= 100
    expected = flashmoe.moe_reference(
        case.x[0], case.topk_ids[0], case.topk_weights[0], case.gate_up_proj, case.down_proj,
        activation=activation, gated=gated,
    )  # fmt: skip
    assert not expected[7].isfinite().any() and expected[:7].isfinite().all()
    assert torch.equal(case.call(0, None).isnan(), expected.isnan())


def test_the_weight_of_a_dropped_entry_is_never_read():
    case = LayerCase(H, I, E, K, (20,), skew="some_dropped")
    clean = case.call(0, None)
    dropped = (case.topk_ids[0] < 0) | (case.topk_ids[0] == E)
    assert dropped.any()
    case.topk_weights[0][dropped] = torch.nan
    assert_same_bits(case.call(0, None), clean)
    assert not clean[dropped.all(-1)].any()


# --- the layer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((0, I, E, K), {}, "hidden_size must be at least 1, got 0"),
        ((H, -1, E, K), {}, "intermediate_size must be at least 1, got -1"),
        ((H, I, E, E + 1), {}, "top_k must be at most num_experts = 8, got 9"),
        ((H, I, E, K), {"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ((H, I, E, K), {"activation": "swish"}, "activation must be one of silu, gelu, gelu_tanh, relu, got 'swish'"),
        ((H, I, E, K), {"router": "best"}, "router must be one of softmax_topk"),
        ((H, I, E, K), {"expert_map": [0] * 7}, "expert_map must hold num_experts = 8 ranks, got 7"),
        ((H, I, E, K), {"expert_map": [0] * 7 + [1]}, "expert_map[7] must be a rank in [0, 1), got 1"),
        ((H, I, E, K), {"expert_map": [0.5] * 8}, "expert_map[0] must be a rank in [0, 1), got 0.5"),
        ((H, I, 9, K), {"group": 2}, "num_experts must be a multiple of the group's size 2 without an expert_map, got 9"),
        ((H, I, 34, K), {"group": 2}, "num_experts must be at most the group's limit 32, got 34"),
        ((H, I, E, K), {"group": 2, "max_tokens": 97}, "max_tokens must be at most the group's limit 96, got 97"),
    ],
)  # fmt: skip
def test_a_layer_of_impossible_sizes(arguments, options, message):
    team = make_team(2)
    if "group" in options:
        options = options | {"group": team[0]}
    with pytest.raises(ValueError, match=re.escape(message)):
        MoE(*arguments, **options)


def test_a_layer_called_wrongly():
    layer = MoE(H, I, E, K, max_tokens=4)
    with pytest.raises(ValueError, match="x must hold at most max_tokens = 4 tokens, got 6"):
        layer(torch.randn(2, 3, H))
    with pytest.raises(ValueError, match=re.escape("x must have shape (..., hidden_size = 32), got (4, 16)")):
        layer(torch.randn(4, 16))
    with pytest.raises(ValueError, match="routing must be for 8 experts, got 4"):
        layer(torch.randn(1, H), Routing(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), 4))
    with pytest.raises(ValueError, match=re.escape("topk_ids must have shape (T, k) = (3, 1), got (1, 1)")):
        layer(torch.randn(3, H), Routing(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), E))
