"""On one GPU: what a launch and an epoch cost, and the rate of the tiles by a layer of one expert."""

import time

import gpu_stretch
import pytest
import torch

import flashmoe
from flashmoe.routing import make_router
from flashmoe.virtual_ranks import VirtualRanks

pytestmark = gpu_stretch.needs_gpu
CALLS_OF_A_GRAPH = 20


class Drawn:
    """A layer's call on the GPU, in bf16, with weights of as many experts as are asked for."""

    def __init__(self, tokens: int, hidden: int, inner: int, experts: int, top_k: int) -> None:
        def normal(*size: int) -> torch.Tensor:
            return torch.empty(size, device="cuda", dtype=torch.bfloat16).normal_(std=size[-1] ** -0.5)

        self.x = torch.randn(tokens, hidden, device="cuda").bfloat16()
        self.ids = torch.rand(tokens, experts, device="cuda").topk(top_k).indices
        self.weights = torch.rand(tokens, top_k, device="cuda")
        self.gate_up, self.down = normal(experts, 2 * inner, hidden), normal(experts, hidden, inner)

    def call(self) -> torch.Tensor:
        return flashmoe.fused_moe(self.x, self.ids, self.weights, self.gate_up, self.down)

    def check(self, y: torch.Tensor) -> None:
        few = slice(0, 32)
        if not len(y):
            return
        wanted = flashmoe.moe_reference(self.x[few], self.ids[few], self.weights[few], self.gate_up, self.down)
        assert (y[few].float() - wanted).abs().max() <= 2e-2 * wanted.abs().max()
        flashmoe.check()


@pytest.fixture
def tiny(request):
    drawn = Drawn(getattr(request, "param", 1), 256, 256, 4, 2)
    drawn.check(drawn.call())
    return drawn


def test_launch_of_nothing(measure):
    """A kernel of torch's on one number in a graph: what any launch costs."""
    number = torch.zeros(1, device="cuda")
    replay = gpu_stretch.graph_of(lambda: number.add_(1), CALLS_OF_A_GRAPH)
    each = gpu_stretch.stretch_of(replay)
    number.zero_()
    replay()
    assert number.item() == CALLS_OF_A_GRAPH
    measure(lambda n: each(n) / CALLS_OF_A_GRAPH)


@pytest.mark.parametrize("tiny", [0, 1], ids=lambda tokens: f"tokens{tokens}", indirect=True)
def test_epoch_in_a_graph(measure, tiny):
    """A whole call on the GPU alone: two launches, and an epoch of one rank around next to no arithmetic."""
    each = gpu_stretch.stretch_of(gpu_stretch.graph_of(tiny.call, CALLS_OF_A_GRAPH))
    measure(lambda n: each(n) / CALLS_OF_A_GRAPH)


def test_graph_replay(measure, tiny):
    """Graphs of one call each: with what the driver adds to a replay."""
    measure(gpu_stretch.stretch_of(gpu_stretch.graph_of(tiny.call, 1)))


def test_queueing(measure, tiny):
    """The host's own time for a call from Python, while the GPU is not waited for."""

    def stretch(n: int) -> float:
        seconds = 0.0
        for first in range(0, n, 64):  # few enough for the stream's queue
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(min(64, n - first)):
                tiny.call()
            seconds += time.perf_counter() - begin
        return seconds / n

    measure(stretch)


@pytest.mark.sizes("ranks", [2, 8], [4])
def test_epoch_of_virtual_ranks(measure, ranks):
    """An epoch of ranks that share the GPU: headers, rows, signals and results through its memory."""
    drawn = Drawn(ranks, 256, 256, 2 * ranks, 2)
    team = VirtualRanks(ranks, max_tokens=1, max_wire_bytes=512, max_top_k=2, max_experts=2 * ranks)
    parts = [list(part.tensor_split(ranks)) for part in (drawn.x, drawn.ids, drawn.weights, drawn.gate_up, drawn.down)]
    drawn.check(torch.cat(team(*parts)))
    measure(gpu_stretch.stretch_of(lambda: team(*parts)))


@pytest.mark.parametrize("router", ["softmax_topk", "group_limited"])
@pytest.mark.sizes("tokens", [1, 8192], [128])
@torch.no_grad()
def test_router_in_a_graph(measure, router, tokens):
    """What comes before a call: the gate's product, the probabilities, and one kernel that selects."""
    made = make_router(router, 2048, 128, 8, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(tokens, 2048, device="cuda").bfloat16()
    scores = x[:32].double() @ made.weight.double().T
    torch.testing.assert_close(made(x).logits[:32].double(), scores, rtol=1e-4, atol=1e-4)
    each = gpu_stretch.stretch_of(gpu_stretch.graph_of(lambda: made(x), CALLS_OF_A_GRAPH))
    measure(lambda n: each(n) / CALLS_OF_A_GRAPH, items=tokens)


@pytest.mark.sizes("hidden, inner", [(2048, 2048), (4096, 14336)], [(2048, 768), (7168, 2048)])
@pytest.mark.sizes("tokens", [128, 8192], [16, 1024, 32768])
def test_tile_rate(measure, hidden, inner, tokens):
    """All rows to one expert: full tiles, nothing to route, the engine that this GPU gets."""
    drawn = Drawn(tokens, hidden, inner, 1, 1)
    drawn.check(drawn.call())
    flops = 6 * tokens * hidden * inner
    measure(gpu_stretch.stretch_of(drawn.call), flops=flops, bytes=3 * hidden * inner * 2)
