"""The CPU engine's tile products by instruction set, shape and rows, on weights that no cache holds or on warm ones."""

import functools

import pytest
import torch
import torch.nn.functional as F

from flashmoe.arguments import ACTIVATION_CODES, DTYPE_CODES

SHAPES = {"qwen3": (2048, 768), "mixtral-4": (1024, 3584)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COLD_BYTES = 128 << 20
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@functools.lru_cache(maxsize=1)
def weights(shape: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up [E, 2I, H] and down [E, H, I] of as many experts as make COLD_BYTES."""
    hidden, inner = SHAPES[shape]
    experts = max(1, COLD_BYTES // (3 * hidden * inner * dtype.itemsize))
    return (
        (torch.rand(experts, 2 * inner, hidden) - 0.5).mul_(hidden**-0.5).to(dtype),
        (torch.rand(experts, hidden, inner) - 0.5).mul_(inner**-0.5).to(dtype),
    )


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> bool:
    return (got.double() - want).abs().max() <= TOLERANCE[dtype] * want.abs().max()


class GoingOn:
    """Counts the tiles, so that each stretch goes on with the weights that were longest unused."""

    def __init__(self, stretch) -> None:
        self.stretch, self.done = stretch, 0

    def __call__(self, n: int) -> float:
        seconds = self.stretch(self.done, n)
        self.done += n
        return seconds


@pytest.mark.sizes("shape", ["qwen3"], ["mixtral-4"])
@pytest.mark.sizes("dtype", ["fp32", "bf16"], ["fp16"])
@pytest.mark.sizes("rows", [1, 4, 16, 64], [128])
@pytest.mark.sizes("memory", ["cold"], ["warm"])
def test_up_tile(micro, measure, isa, shape, dtype, rows, memory):
    """act(x · gate^T) · (x · up^T) for one tile's columns."""
    hidden, inner = SHAPES[shape]
    gate_up, _ = weights(shape, DTYPES[dtype])
    x = torch.randn(rows, hidden).to(gate_up.dtype)
    h = torch.full((rows, inner), torch.nan)
    tiles = micro.Tiles(isa, DTYPE_CODES[x.dtype], ACTIVATION_CODES["silu"], True, hidden, inner)

    def stretch(done: int, n: int) -> float:
        return tiles.up(x.data_ptr(), rows, gate_up.data_ptr(), len(gate_up), h.data_ptr(), memory == "cold", done, n)

    tiles.up(x.data_ptr(), rows, gate_up.data_ptr(), 1, h.data_ptr(), True, 0, -(-inner // tiles.up_cols))
    gate, up = (x.double() @ gate_up[0].double().T).chunk(2, -1)
    assert close(h, F.silu(gate) * up, torch.float32)  # h is float32 whatever the weights are
    elements = 2 * tiles.up_cols * hidden
    measure(GoingOn(stretch), flops=2 * rows * elements, bytes=elements * x.itemsize)


@pytest.mark.sizes("shape", ["qwen3"], ["mixtral-4"])
@pytest.mark.sizes("dtype", ["fp32", "bf16"], ["fp16"])
@pytest.mark.sizes("rows", [1, 4, 16, 64], [128])
@pytest.mark.sizes("memory", ["cold"], ["warm"])
def test_down_tile(micro, measure, isa, shape, dtype, rows, memory):
    """h · down^T for one tile's columns, rounded to the dtype."""
    hidden, inner = SHAPES[shape]
    _, down = weights(shape, DTYPES[dtype])
    h = torch.randn(rows, inner)
    y = torch.full((rows, hidden), torch.nan, dtype=down.dtype)
    tiles = micro.Tiles(isa, DTYPE_CODES[y.dtype], ACTIVATION_CODES["silu"], True, hidden, inner)

    def stretch(done: int, n: int) -> float:
        return tiles.down(h.data_ptr(), rows, down.data_ptr(), len(down), y.data_ptr(), memory == "cold", done, n)

    tiles.down(h.data_ptr(), rows, down.data_ptr(), 1, y.data_ptr(), True, 0, -(-hidden // tiles.down_cols))
    assert close(y, h.double() @ down[0].double().T, y.dtype)
    elements = tiles.down_cols * inner
    measure(GoingOn(stretch), flops=2 * rows * elements, bytes=elements * y.itemsize)
