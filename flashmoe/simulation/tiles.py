"""What a tile costs, as a function of its rows: which engine computes it, and what that asks of the machine."""

from dataclasses import dataclass
from math import ceil

from ..models import LayerShape
from .machine import Machine

BLOCK_ROWS = 128  # of a row block: kBlockM of csrc/protocol/config.h
ITEM_BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2}

_NARROW_ROWS = 32  # of an expert, up to which tiles are narrow: kNarrowRows of csrc/runtime/cuda_choice.h
_WIDEN_ROWS = 12  # kRegisterWidenRows of csrc/engine/cpu_product.h
_PICO = 1e12


@dataclass(frozen=True)
class TileCost:
    """Of one tile: picoseconds of products, bytes out of the cache, bytes of weights."""

    math_ps: int
    cache_bytes: int
    weight_bytes: int


@dataclass(frozen=True)
class Engine:
    """Tiles as one engine cuts and computes them.

    Attributes:
        tile_rows: rows of the weights in a tile, gate and up rows together.
        pass_rows: rows of a block that meet the weights at one time; more take another pass.
        math_rows: rows are computed in groups of so many; the last may be partly empty.
        math_share: what products reach of the machine's ``math_flops``.
    """

    name: str
    tile_rows: int
    pass_rows: int
    math_rows: int
    math_share: float = 1.0

    def up_cols(self, shape: LayerShape) -> int:
        """Columns of the hidden activations in one up tile."""
        return self._cols(self.tile_rows // 2 if shape.gated else self.tile_rows, shape.intermediate_size)

    def down_cols(self, shape: LayerShape) -> int:
        return self._cols(self.tile_rows, shape.hidden_size)

    def up_tiles(self, shape: LayerShape) -> int:
        return ceil(shape.intermediate_size / self.up_cols(shape))

    def down_tiles(self, shape: LayerShape) -> int:
        return ceil(shape.hidden_size / self.down_cols(shape))

    def cost(self, machine: Machine, weight_rows: float, depth: int, item_bytes: int, rows: int) -> TileCost:
        """Of a tile of ``weight_rows`` rows of the weights, ``depth`` long each, for ``rows`` rows of a block."""
        computed = ceil(rows / self.math_rows) * self.math_rows
        math = 2 * computed * weight_rows * depth / (self.math_share * machine.math_flops)
        if machine.widen_s and item_bytes < 4:
            # Few rows widen the weights in registers, once for three of them; more do it once for each pass.
            times = ceil(rows / 3) if rows <= _WIDEN_ROWS else ceil(rows / self.pass_rows)
            math += machine.widen_s * times * weight_rows * depth
        weights = weight_rows * depth * item_bytes
        passes = ceil(rows / self.pass_rows)
        cache = passes * weights + rows * depth * item_bytes
        return TileCost(round(_PICO * math), round(cache), round(weights))

    def _cols(self, most: int, width: int) -> int:
        # On the host a matrix narrower than a tile is one tile, rounded up to 16 columns; a GPU's tiles never shrink.
        return min(most, ceil(width / 16) * 16) if self is HOST else most


HOST = Engine("host", tile_rows=256, pass_rows=64, math_rows=1)
SM90_WIDE = Engine("sm90 wide", tile_rows=256, pass_rows=128, math_rows=64)
SM90_NARROW = Engine("sm90 narrow", tile_rows=64, pass_rows=64, math_rows=64)
# mma.sync gets about 60 % out of Hopper's tensor cores, and tf32 half of the 16-bit rate.
SM80_TF32 = Engine("sm80 tf32", tile_rows=128, pass_rows=128, math_rows=32, math_share=0.5 * 0.6)


def choose_engine(machine: Machine, dtype: str, pairs: int, num_experts: int) -> Engine:
    """As csrc/runtime/cuda_choice.cpp does for Hopper; ``pairs`` are (token, expert) pairs of all ranks."""
    if not machine.has_agents:
        return HOST
    if dtype == "tf32":
        return SM80_TF32
    return SM90_NARROW if pairs <= _NARROW_ROWS * num_experts else SM90_WIDE


def costs_by_rows(
    engine: Engine, machine: Machine, shape: LayerShape, item_bytes: int
) -> tuple[list[TileCost], list[TileCost]]:
    """Of an up tile and of a down tile, by the rows of their block."""
    up, down = shape.up_rows / engine.up_tiles(shape), shape.hidden_size / engine.down_tiles(shape)
    return tuple(
        [engine.cost(machine, weight_rows, depth, item_bytes, rows) for rows in range(BLOCK_ROWS + 1)]
        for weight_rows, depth in ((up, shape.hidden_size), (down, shape.intermediate_size))
    )
