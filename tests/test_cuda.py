"""The kernel on a GPU against the reference: shapes, dtypes, virtual ranks, graphs. Without a GPU all of it is skipped."""

import pytest
import torch

import flashmoe
from flashmoe.virtual_ranks import VirtualRanks, has_cuda

pytestmark = pytest.mark.skipif(not has_cuda(), reason="needs a GPU and a build with nvcc")

# Rounding of hidden and of each result to the dtype, on sums that fp32 holds; relative to the largest of the row.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


class Problem:
    """One layer and the tokens of every rank, drawn on the GPU from a seed."""

    def __init__(self, hidden, inner, experts, top_k, tokens, dtype, gated=True, activation="silu", seed=0):
        generator = torch.Generator("cuda").manual_seed(seed)

        def normal(*shape, scale=1.0):
            return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)

        self.options = {"gated": gated, "activation": activation}
        self.gate_up = normal(experts, inner * (2 if gated else 1), hidden, scale=hidden**-0.5)
        self.down = normal(experts, hidden, inner, scale=inner**-0.5)
        self.x = [normal(t, hidden) for t in tokens]
        self.ids = [torch.rand(t, experts, generator=generator, device="cuda").topk(top_k).indices for t in tokens]
        self.weights = [torch.rand(t, top_k, generator=generator, device="cuda") for t in tokens]
        ep_size, limit = len(tokens), max(*tokens, 1)
        self.gate_up_of, self.down_of = self.gate_up.chunk(ep_size), self.down.chunk(ep_size)
        self.ranks = VirtualRanks(
            ep_size, max_tokens=limit, max_wire_bytes=hidden * dtype.itemsize, max_top_k=top_k, max_experts=experts,
            timeout_s=10.0,
        )  # fmt: skip

    def run(self, **options):
        return self.ranks(self.x, self.ids, self.weights, self.gate_up_of, self.down_of, **self.options, **options)

    def check(self, results):
        torch.cuda.synchronize()
        for x, ids, weights, y in zip(self.x, self.ids, self.weights, results, strict=True):
            want = flashmoe.moe_reference(x, ids, weights, self.gate_up, self.down, **self.options)
            error = (y.float() - want).abs().amax(-1) / want.abs().amax(-1).clamp_min(1e-6)
            assert not len(x) or error.max().item() <= TOLERANCE[x.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 64, 512])
@pytest.mark.parametrize(("hidden", "inner", "experts", "top_k"), [(1024, 3584, 8, 2), (2048, 768, 128, 8), (256, 264, 6, 3)])
def test_one_rank(hidden, inner, experts, top_k, tokens, dtype):
    problem = Problem(hidden, inner, experts, top_k, [tokens], dtype)
    first = problem.run()
    problem.check(first)
    assert all(torch.equal(a, b) for a, b in zip(first, problem.run(), strict=True)), "bits differ on repeat"


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_activations(activation, gated):
    problem = Problem(512, 384, 8, 2, [100], torch.bfloat16, gated, activation)
    problem.check(problem.run())


@pytest.mark.parametrize("tokens", [[64, 64], [0, 33], [128, 1, 0, 77], [40] * 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_virtual_ranks(tokens, dtype):
    problem = Problem(512, 384, 16, 4, tokens, dtype)
    for _ in range(5):
        problem.check(problem.run())


def test_the_bits_do_not_depend_on_the_number_of_ranks():
    alone = Problem(512, 384, 16, 4, [96], torch.bfloat16)
    [y] = alone.run()
    split = Problem(512, 384, 16, 4, [48, 48], torch.bfloat16)
    split.x, split.ids, split.weights = ([*part[0].chunk(2)] for part in (alone.x, alone.ids, alone.weights))
    split.gate_up_of, split.down_of = alone.gate_up.chunk(2), alone.down.chunk(2)
    assert torch.equal(torch.cat(split.run()), y)


def test_a_graph_replays_calls_that_the_host_never_sees():
    problem = Problem(512, 384, 16, 4, [32, 32], torch.bfloat16)
    out = problem.run()
    problem.check(out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        problem.run(out=out)
    for _ in range(3):
        for x in problem.x:
            x.copy_(torch.randn_like(x))
        graph.replay()
        problem.check(out)
