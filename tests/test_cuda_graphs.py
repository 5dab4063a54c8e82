"""CUDA graphs that hold calls: replays that the host never sees, and memory that they can rely on."""

import pytest
import torch
from cuda_case import CudaCase, captured, has_cuda, worst_error

import flashmoe
from flashmoe import MoE, cuda_teams

pytestmark = pytest.mark.skipif(not has_cuda(), reason="needs a GPU and a build with nvcc")


def redraw(case: CudaCase) -> None:
    case.x.normal_()
    case.ids.copy_(torch.rand(case.tokens, case.experts, device="cuda").topk(case.top_k).indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 32, 700])
def test_replays_with_changing_inputs(tokens, dtype):
    case = CudaCase(tokens=tokens, dtype=dtype)
    graph, y = captured(case.call)
    for _ in range(30):
        redraw(case)
        graph.replay()
        assert torch.equal(y, case.call())
    assert worst_error(y, case) <= case.tolerance
    for _ in range(200):
        graph.replay()
    assert torch.equal(y, case.call())


@torch.no_grad()
def test_two_layers_in_one_graph_and_their_counts():
    layers = [MoE(512, 384, 16, 4, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    x = torch.randn(50, 512, device="cuda", dtype=torch.bfloat16)
    graph, y = captured(lambda: layers[1](layers[0](x) + x))
    for _ in range(10):
        x.normal_()
        graph.replay()
        assert torch.equal(y, layers[1](layers[0](x) + x))
    x.normal_()
    graph.replay()
    for layer in layers:
        assert sum(layer.stats["tokens_per_expert"]) == 50 * 4


def test_growth_after_a_capture_leaves_the_graph_its_memory():
    case, large = CudaCase(tokens=16), CudaCase(1024, 768, 32, 8, 2000, seed=1)
    graph, y = captured(case.call)
    expected = case.call()
    for _ in range(3):
        assert worst_error(large.call(), large, rows=64) <= large.tolerance
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)
        large = CudaCase(1024, 768, 32, 8, 2 * large.tokens, seed=1)


def test_a_capture_gets_no_new_memory(monkeypatch):
    monkeypatch.setattr(cuda_teams, "_local", {})
    CudaCase(tokens=4).call()
    large = CudaCase(tokens=2000)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="Make one call of the same layer, shapes and dtype before the capture"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            large.call()
    assert worst_error(large.call(), large, rows=64) <= large.tolerance


def test_replays_and_calls_on_two_streams():
    case, other = CudaCase(tokens=300), CudaCase(tokens=77, seed=1)
    graph, y = captured(case.call)
    expected, expected_other = case.call(), other.call()
    torch.cuda.synchronize()
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    results = []
    for _ in range(30):
        with torch.cuda.stream(streams[0]):
            graph.replay()
        with torch.cuda.stream(streams[1]):
            results.append(other.call())
    torch.cuda.synchronize()
    assert torch.equal(y, expected) and all(torch.equal(r, expected_other) for r in results)


def test_two_streams_in_one_capture():
    case, other = CudaCase(tokens=300), CudaCase(tokens=77, seed=1)
    expected, expected_other = case.call(), other.call()
    side = torch.cuda.Stream()

    def both():
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        y = case.call()
        with torch.cuda.stream(side):
            y_other = other.call()
        main.wait_stream(side)
        return y, y_other

    graph, (y, y_other) = captured(both)
    for _ in range(10):
        y.zero_(), y_other.zero_()
        graph.replay()
        assert torch.equal(y, expected) and torch.equal(y_other, expected_other)


def test_a_bad_id_in_a_replay_concerns_that_replay_alone():
    case = CudaCase(tokens=20)
    graph, y = captured(case.call)
    expected, good = case.call(), case.ids.clone()
    case.ids[7, 0] = 1000
    graph.replay()
    torch.cuda.synchronize()
    assert y.isnan().all()
    with pytest.raises(ValueError, match="got 1000 for token 7, choice 0"):
        flashmoe.check()
    case.ids.copy_(good)
    graph.replay()
    assert torch.equal(y, expected)
    torch.cuda.synchronize()
    flashmoe.check()
