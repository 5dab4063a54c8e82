"""Gradients of calls on a GPU, against the reference's in float64. Without one all of it is skipped; a sanitizer runs
what is `small`."""

import copy
import gc

import pytest
import torch
from cuda_case import captured, has_cuda
from gradient_case import alone, assert_same_gradients, check_gradients, gradients, virtual_gradients
from layer_case import LayerCase, assert_same_bits

import flashmoe
from flashmoe import MoE
from flashmoe.models import SHAPES

pytestmark = pytest.mark.skipif(not has_cuda(), reason="needs a GPU and a build with nvcc")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def nothing_is_left_over():
    yield
    torch.cuda.synchronize()
    flashmoe.check()


def check(case: LayerCase, by_rank) -> None:
    # Not on the CPU, where the references alone would outlast the step that gpu_check.sh has for these tests.
    check_gradients(case, by_rank, factors_rounded=case.dtype != torch.float32, device="cuda")


def on_gpu(case: LayerCase, **how):
    return gradients(case, 0, None, device="cuda", **how)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", SHAPES)
def test_models(model, dtype):
    shape = SHAPES[model]
    while shape.num_experts * shape.expert_elements > 2**23:
        shape = shape.scaled(2)
    for tokens in (1, 300):
        case = LayerCase(shape.hidden_size, shape.intermediate_size, shape.num_experts, shape.top_k, (tokens,), dtype,
                         shape.activation, shape.gated)  # fmt: skip
        found = on_gpu(case)
        check(case, [found])
        assert_same_gradients(on_gpu(case), found, "on repeat")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(37, 19), (129, 65), (8, 1000), (1000, 8), (72, 136)], ids=str)
def test_odd_widths_small(sizes, dtype):
    for tokens in (1, 50):
        case = LayerCase(*sizes, 5, 2, (tokens,), dtype, bias=True)
        check(case, [on_gpu(case)])


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_activations_and_biases(dtype, activation, gated):
    case = LayerCase(128, 96, 8, 2, (100,), dtype, activation, gated, bias=True)
    check(case, [on_gpu(case)])


def test_no_tokens_small():
    case = LayerCase(tokens=(0,))
    found = on_gpu(case)
    check(case, [found])
    assert not found["gate_up_proj"].any()


@pytest.mark.parametrize("skew", ["one_hot_expert", "some_dropped", "all_dropped", "repeated"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_dropped_and_skewed_small(skew, dtype):
    case = LayerCase(64, 48, tokens=(300,), skew=skew, bias=True, dtype=dtype)
    check(case, [on_gpu(case)])


def test_only_what_is_asked_for_is_made_and_it_is_the_same():
    case = LayerCase(tokens=(60,), bias=True)
    full = on_gpu(case)
    for frozen in (("x",), ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias"), ("down_proj", "topk_weights")):
        found = on_gpu(case, frozen=frozen)
        assert_same_gradients(found, {name: full[name] for name in found}, f"with {frozen} frozen")


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_layer_learns_as_on_the_cpu(dtype):
    torch.manual_seed(3)
    host = MoE(128, 64, 8, 2, bias=True, dtype=dtype)
    layer, x = copy.deepcopy(host).to("cuda"), torch.randn(3, 40, 128, dtype=dtype)
    of_host = torch.autograd.grad(host(x).float().square().sum(), list(host.parameters()))
    of_gpu = torch.autograd.grad(layer(x.cuda()).float().square().sum(), list(layer.parameters()))
    for name, mine, other in zip(dict(host.named_parameters()), of_gpu, of_host, strict=True):
        error = (mine.cpu().double() - other.double()).norm() / other.double().norm()
        assert error < (1e-4 if dtype == torch.float32 else 3e-2), f"{name}: {error:.1e}"


# --- virtual ranks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [(64, 64), (0, 33), (128, 1, 0, 77), (40,) * 8, (0, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_virtual_ranks_have_the_gradients_of_one_process(tokens, dtype):
    case = LayerCase(128, 64, 16, 4, tokens, dtype)
    found = virtual_gradients(case, "cuda")
    check(case, found)
    for one, other in zip(virtual_gradients(case, "cuda"), found, strict=True):
        assert_same_gradients(one, other, "on repeat")
    _, whole = alone(case, "cuda")
    for of_tokens in ("x", "topk_weights"):
        assert_same_bits(torch.cat([one[of_tokens] for one in found]), whole[of_tokens], f"of {of_tokens} by one process")


def test_two_ranks_small():
    case = LayerCase(64, 48, 4, 2, (13, 7))
    check(case, virtual_gradients(case, "cuda"))


def test_any_placement():
    case = LayerCase(128, 64, 9, 2, (30, 0, 41), owners=(0, 0, 2, 2, 2, 0, 0, 2, 2))
    check(case, virtual_gradients(case, "cuda"))


def test_a_rank_that_never_comes_leaves_no_gradients():
    case = LayerCase(64, 48, 6, 2, (20, 20, 20))
    for of_rank in virtual_gradients(case, "cuda", timeout_s=0.5, missing_ranks=1):
        assert all(one.isnan().all() for one in of_rank.values())
    torch.cuda.synchronize()
    with pytest.raises(flashmoe.PeerError, match=r"while waiting for the packet header of rank 2"):
        flashmoe.check()
    gc.collect()
    check(case, virtual_gradients(case, "cuda"))


def test_more_rows_than_memory_are_told(monkeypatch):
    monkeypatch.setenv("FLASHMOE_BACKWARD_MIB", "1")
    case = LayerCase(128, 64, 16, 4, (600, 600))
    for of_rank in virtual_gradients(case, "cuda"):
        assert all(one.isnan().all() for one in of_rank.values())
    torch.cuda.synchronize()
    with pytest.raises(flashmoe.PeerError, match=r"rows or more have come .* FLASHMOE_BACKWARD_MIB sets how much"):
        flashmoe.check()
    gc.collect()
    monkeypatch.delenv("FLASHMOE_BACKWARD_MIB")
    check(case, virtual_gradients(case, "cuda"))


# --- graphs ---------------------------------------------------------------------------------------------------


def test_a_graph_replays_a_training_step():
    layer = MoE(256, 128, 8, 2, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(70, 256, device="cuda", dtype=torch.bfloat16)

    def step():
        return torch.autograd.grad(layer(x).float().square().sum(), list(layer.parameters()))

    graph, found = captured(step)
    for _ in range(5):
        x.normal_()
        graph.replay()
        for one, other in zip(found, step(), strict=True):
            assert torch.equal(one, other)
