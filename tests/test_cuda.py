"""fused_moe and MoE on a GPU against the reference. Without one all of it is skipped; a sanitizer runs what is `small`."""

import copy

import pytest
import torch
from cuda_case import H, TF32, CudaCase, has_cuda, small_enough, tf32_allowed, worst_error

import flashmoe
from flashmoe import MoE, cuda_teams
from flashmoe.models import SHAPES

pytestmark = pytest.mark.skipif(not has_cuda(), reason="needs a GPU and a build with nvcc")

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(autouse=True)
def nothing_is_left_over():
    yield
    torch.cuda.synchronize()
    flashmoe.check()


# --- right, in every shape ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("model", SHAPES)
def test_models(model, kind):
    dtype = DTYPES[kind]
    shape = small_enough(SHAPES[model], dtype)
    with tf32_allowed(kind == "tf32"):
        case = CudaCase(shape.hidden_size, shape.intermediate_size, shape.num_experts, shape.top_k, 8192, dtype,
                        activation=shape.activation, gated=shape.gated)  # fmt: skip
        for tokens in (1, 7, 64, 512, 8192):
            part = case.first(tokens)
            y = part.call()
            error = worst_error(y, part, rows=64)
            assert error <= (TF32 if kind == "tf32" else case.tolerance), f"T = {tokens}: {error:.1e}"
            assert torch.equal(part.call(), y), f"T = {tokens}: bits differ on repeat"


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize(("hidden", "inner"), [(37, 19), (129, 65), (8, 1000), (1003, 8), (72, 136)])
def test_odd_widths_small(hidden, inner, kind):
    with tf32_allowed(kind == "tf32"):
        for tokens in (1, 50):
            case = CudaCase(hidden, inner, 5, 2, tokens, DTYPES[kind], bias=True)
            assert worst_error(case.call(), case) <= (TF32 if kind == "tf32" else case.tolerance)


@pytest.mark.parametrize("name", ["x", "gate_up", "down", "gate_up_bias", "down_bias"])
def test_tensors_that_begin_anywhere(name):
    case = CudaCase(bias=True)
    tensor = getattr(case, name)
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device="cuda")
    setattr(case, name, room[1:].view_as(tensor).copy_(tensor))
    assert worst_error(case.call(), case) <= case.tolerance


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_activations_and_biases(kind, activation, gated):
    case = CudaCase(512, 384, 8, 2, 100, DTYPES[kind], activation=activation, gated=gated, bias=True)
    assert worst_error(case.call(), case) <= case.tolerance


def test_no_tokens_small():
    assert CudaCase(tokens=0).call().shape == (0, H)


def test_dropped_and_skewed_small():
    case = CudaCase(tokens=300)
    case.ids[::3] = -1
    case.ids[1::3, 0] = 16
    case.ids[2::3] = 3
    y = case.call()
    assert worst_error(y, case) <= case.tolerance and not y[::3].any()


def test_placements_and_types_that_are_taken_as_they_come():
    case = CudaCase()
    y = case.call()
    assert torch.equal(case.call(expert_map=torch.zeros(16, dtype=torch.int32)), y)
    case.ids = case.ids.int()
    assert torch.equal(case.call(), y)
    case.ids, case.x = case.ids.T.contiguous().T, case.x.T.contiguous().T
    assert torch.equal(case.call(), y)
    with pytest.raises(ValueError, match=r"expert_map must hold ranks in \[0, 1\), got 1 for expert 0"):
        case.call(expert_map=torch.ones(16, dtype=torch.int32))


@torch.no_grad()
def test_layer_moves_compiles_and_counts():
    host = MoE(256, 128, 8, 2, expert_map=[0] * 8)
    layer, other = copy.deepcopy(host).to("cuda"), MoE(256, 128, 8, 2, device="cuda")
    x = torch.randn(3, 40, 256)
    y = layer(x.cuda())
    torch.testing.assert_close(y.cpu(), host(x), rtol=1e-3, atol=1e-5)
    counts = host.stats["tokens_per_expert"]  # the copies share their layer's number, and so its statistics
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x.cuda()), y)
    other(x[:, :5].cuda())
    assert layer.stats["tokens_per_expert"] == counts
    assert sum(other.stats["tokens_per_expert"]) == 3 * 5 * 2
    assert layer.stats["bytes_per_peer"]["rows"] == [0]


def test_opcheck():
    case = CudaCase(64, 48, 4, 2, 9, torch.float32)
    args = (case.x, case.ids, case.weights, case.gate_up, case.down, None, None, None, "silu", True, 1)
    results = torch.library.opcheck(torch.ops.flashmoe.moe_local.default, args)
    assert set(results.values()) == {"SUCCESS"}


# --- wrong, and what becomes of it ----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [17, -2, 2**40])
def test_a_bad_id_is_reported_by_the_next_call_and_forgotten(bad):
    case = CudaCase()
    good = case.call()
    case.ids[3, 1] = bad
    assert case.call().isnan().all()
    torch.cuda.synchronize()
    message = rf"topk_ids must lie in \[0, 16\).*got {bad} for token 3, choice 1, in an earlier call on cuda:0"
    with pytest.raises(ValueError, match=message):
        case.call()
    case.ids[3, 1] = 0
    assert case.call().isfinite().all()
    case.ids[3, 1] = bad
    case.call()
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match=message):
        flashmoe.check()
    assert torch.equal(CudaCase().call(), good)


def test_tensors_of_two_places():
    case = CudaCase()
    case.weights = case.weights.cpu()
    with pytest.raises(ValueError, match="topk_weights must be on the device of x, cuda:0, got cpu"):
        case.call()


# --- streams and neighbours -----------------------------------------------------------------------------------


def test_two_streams_take_turns():
    cases = [CudaCase(seed=seed, tokens=tokens) for seed, tokens in ((1, 700), (2, 33))]
    expected = [case.call() for case in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    results = []
    for _ in range(20):
        for case, stream in zip(cases, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(case.call())
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected[number % 2]) for number, y in enumerate(results))


def test_a_margin_leaves_room_for_a_neighbour(monkeypatch):
    """Beside a kernel that spins on a multiprocessor of its own, a call begins and ends."""
    monkeypatch.setattr(cuda_teams, "_local", {})
    monkeypatch.setenv("FLASHMOE_SM_MARGIN", "4")
    case = CudaCase()
    torch.cuda.synchronize()
    neighbour, mine = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(mine):
        expected = case.call()  # to allocate there may wait for the neighbour, too: now it is done
    mine.synchronize()
    with torch.cuda.stream(neighbour):
        torch.cuda._sleep(4_000_000_000)  # cycles: about two seconds
        spun = torch.cuda.Event()
        spun.record()
    with torch.cuda.stream(mine):
        y = case.call()
    mine.synchronize()
    assert not spun.query(), "the call waited for the neighbour"
    assert torch.equal(y, expected)


def test_memory_grows_while_calls_are_under_way():
    small, large = CudaCase(tokens=9), CudaCase(tokens=3000, seed=1)
    expected = small.call()
    for _ in range(5):
        y = small.call()
        assert worst_error(large.call(), large, rows=64) <= large.tolerance
        assert torch.equal(y, expected) and torch.equal(small.call(), expected)
        large = CudaCase(tokens=len(large.x) * 3 // 2, seed=1)
