"""The CPU engine's backward tiles by instruction set, shape and rows, and what a training step's call costs."""

import pytest
import torch
import torch.nn.functional as F
from bench_calls import Tiny, stretch_of
from bench_tiles import DTYPES, SHAPES, GoingOn, close, weights

import flashmoe
from flashmoe.arguments import ACTIVATION_CODES, DTYPE_CODES


class Block:
    """A row block of an expert on its way back, and the truth of it in float64."""

    def __init__(self, micro, isa: str, shape: str, dtype: str, rows: int) -> None:
        hidden, inner = SHAPES[shape]
        self.gate_up, self.down = weights(shape, DTYPES[dtype])
        self.x, self.dy = (torch.randn(rows, hidden).to(self.gate_up.dtype) for _ in range(2))
        code = DTYPE_CODES[self.x.dtype], ACTIVATION_CODES["silu"]
        self.rows, self.inner = rows, inner
        self.tiles = micro.BackwardTiles(isa, *code, True, hidden, inner)
        self.made = torch.full((rows, self.tiles.stride), torch.nan)
        leaf = (self.x.double() @ self.gate_up[0].double().T).requires_grad_()
        gate, up = leaf.chunk(2, -1)
        out = F.silu(gate) * up @ self.down[0].double().T
        (self.gate_up_grad,) = torch.autograd.grad(out, leaf, self.dy.double())
        self.up(False, 0, -(-inner // self.tiles.up_cols), every=True)

    def up(self, cold: bool, done: int, n: int, every: bool = False) -> float:
        experts = 1 if every else len(self.gate_up)
        addresses = (one.data_ptr() for one in (self.gate_up, self.down))
        return self.tiles.up(
            self.x.data_ptr(), self.dy.data_ptr(), self.rows, *addresses, experts, self.made.data_ptr(), cold or every,
            done, n,
        )  # fmt: skip


CASES = (
    pytest.mark.sizes("shape", ["qwen3"], ["mixtral-4"]),
    pytest.mark.sizes("dtype", ["fp32"], ["bf16", "fp16"]),
    pytest.mark.sizes("rows", [16, 128], [1, 4, 64]),
    pytest.mark.sizes("memory", ["cold"], ["warm"]),
)


def cases(test):
    for mark in CASES:
        test = mark(test)
    return test


@cases
def test_up_backward(micro, measure, isa, shape, dtype, rows, memory):
    """The up product once more, dy · down, and back through the activation, for one tile's columns."""
    block = Block(micro, isa, shape, dtype, rows)
    assert close(block.made[:, : 2 * block.inner], block.gate_up_grad, torch.float32)
    elements = 3 * block.tiles.up_cols * block.x.shape[1]
    measure(GoingOn(lambda done, n: block.up(memory == "cold", done, n)), flops=2 * rows * elements,
            bytes=elements * block.x.itemsize)  # fmt: skip


@cases
def test_down_backward(micro, measure, isa, shape, dtype, rows, memory):
    """d(gate, up) · gate_up for one tile's columns, rounded to the dtype."""
    block = Block(micro, isa, shape, dtype, rows)
    dx = torch.full_like(block.x, torch.nan)

    def stretch(done: int, n: int, experts: int = len(block.gate_up)) -> float:
        return block.tiles.down(
            block.made.data_ptr(), rows, block.gate_up.data_ptr(), experts, dx.data_ptr(), memory == "cold" or experts == 1,
            done, n,
        )  # fmt: skip

    stretch(0, -(-dx.shape[1] // block.tiles.down_cols), experts=1)
    assert close(dx, block.gate_up_grad @ block.gate_up[0].double(), dx.dtype)
    elements = 2 * block.inner * block.tiles.down_cols
    measure(GoingOn(stretch), flops=2 * rows * elements, bytes=elements * dx.itemsize)


@pytest.mark.sizes("shape", ["qwen3"], ["mixtral-4"])
@pytest.mark.sizes("dtype", ["fp32"], ["bf16", "fp16"])
@pytest.mark.sizes("rows", [16, 128], [1, 4, 64])
@pytest.mark.sizes("blocks", [1], [8])
def test_grad_tile(micro, measure, isa, shape, dtype, rows, blocks):
    """A tile of gate_up_proj's gradient, written where it was written before, over one row block or several."""
    block = Block(micro, isa, shape, dtype, rows)
    matrix = torch.full_like(block.gate_up[0], torch.nan)

    def stretch(done: int, n: int, blocks: int = blocks) -> float:
        return block.tiles.gradient(
            block.x.data_ptr(), block.dy.data_ptr(), rows, block.made.data_ptr(), blocks, matrix.data_ptr(), done, n
        )

    stretch(0, block.tiles.grad_tiles, blocks=1)
    assert close(matrix, block.gate_up_grad.T @ block.x.double(), matrix.dtype)
    elements = matrix.numel() / block.tiles.grad_tiles
    measure(GoingOn(stretch), flops=2 * rows * blocks * elements, bytes=elements * matrix.itemsize)


def test_training_step_fixed_cost(measure):
    """fused_moe of one token, tiny widths, and torch.autograd.grad for all of its leaves."""
    tiny = Tiny(1)
    leaves = [one.requires_grad_() for one in tiny.arguments if one.is_floating_point()]
    y = flashmoe.fused_moe(*tiny.arguments)
    tiny.check(y.detach())
    grad = torch.ones_like(y)
    measure(stretch_of(lambda: torch.autograd.grad(flashmoe.fused_moe(*tiny.arguments), leaves, grad)))
