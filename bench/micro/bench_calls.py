"""What a call costs from Python on the CPU: the operator, the layer with its router, and both compiled."""

import time

import pytest
import torch

import flashmoe
from flashmoe.models import SHAPES


def stretch_of(call):
    def stretch(n: int) -> float:
        begin = time.perf_counter()
        for _ in range(n):
            call()
        return (time.perf_counter() - begin) / n

    return stretch


class Tiny:
    """A layer whose arithmetic is a few microseconds."""

    def __init__(self, tokens: int) -> None:
        self.layer = flashmoe.MoE(64, 64, 4, 2)
        self.x = torch.randn(tokens, 64)
        routing = self.layer.router(self.x)
        self.arguments = (
            self.x, routing.topk_ids, routing.topk_weights.detach(),
            self.layer.gate_up_proj.detach(), self.layer.down_proj.detach(),
        )  # fmt: skip
        self.wanted = flashmoe.moe_reference(*self.arguments)

    def check(self, y: torch.Tensor) -> None:
        torch.testing.assert_close(y.double(), self.wanted.double(), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("tokens", [0, 1])
@torch.no_grad()
def test_fused_moe_fixed_cost(measure, tokens):
    """Checks, dispatch through torch.library, pybind11 and an epoch of one rank."""
    tiny = Tiny(tokens)
    tiny.check(flashmoe.fused_moe(*tiny.arguments))
    measure(stretch_of(lambda: flashmoe.fused_moe(*tiny.arguments)))


@pytest.mark.parametrize("how", ["eager", "compiled"])
@torch.no_grad()
def test_moe_fixed_cost(measure, how):
    """The layer of one token with its router, whose torch operators are most of it."""
    tiny = Tiny(1)
    layer = torch.compile(tiny.layer, fullgraph=True) if how == "compiled" else tiny.layer
    tiny.check(layer(tiny.x))
    measure(stretch_of(lambda: layer(tiny.x)))


@torch.no_grad()
def test_compiled_fused_moe_fixed_cost(measure):
    """The operator alone in a compiled graph."""
    tiny = Tiny(1)
    compiled = torch.compile(flashmoe.fused_moe, fullgraph=True)
    tiny.check(compiled(*tiny.arguments))
    measure(stretch_of(lambda: compiled(*tiny.arguments)))


@pytest.mark.sizes("model, scale", [("qwen3-30b-a3b", 4)], [("qwen3-30b-a3b", 1), ("mixtral-8x7b", 4)])
@pytest.mark.sizes("tokens", [1, 16, 128, 512], [2048])
@torch.no_grad()
def test_layer(measure, model, scale, tokens):
    """fused_moe over the number of tokens, with inputs that take turns."""
    shape = SHAPES[model].scaled(scale)
    experts, hidden, inner, top_k = shape.num_experts, shape.hidden_size, shape.intermediate_size, shape.top_k
    gate_up = torch.empty(experts, shape.up_rows, hidden).normal_(std=hidden**-0.5)
    down = torch.empty(experts, hidden, inner).normal_(std=inner**-0.5)
    options = {"activation": shape.activation, "gated": shape.gated}
    calls = [
        (torch.randn(tokens, hidden), torch.rand(tokens, experts).topk(top_k).indices, torch.rand(tokens, top_k))
        for _ in range(4)
    ]
    few = [part[:16] for part in calls[0]]
    y = flashmoe.fused_moe(*calls[0], gate_up, down, **options)[:16]
    torch.testing.assert_close(y, flashmoe.moe_reference(*few, gate_up, down, **options).float(), rtol=1e-4, atol=1e-4)
    turn = iter(range(1 << 62))
    measure(
        stretch_of(lambda: flashmoe.fused_moe(*calls[next(turn) % 4], gate_up, down, **options)),
        flops=shape.flops(tokens * top_k),
    )
