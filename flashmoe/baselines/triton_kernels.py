"""The kernels of the Triton baseline: one tiled product over blocks of pairs, used twice, and the activation."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _product(
    rows, weights, scales, out, pair_of_place, expert_of_block, num_pairs, n_size, k_size, pairs_of_row,
    SCALED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # Blocks of one expert go together over the columns: they share its weights in L2.
    blocks_n = tl.cdiv(n_size, BLOCK_N)
    group = tl.program_id(0) // (GROUP_M * blocks_n)
    inside = tl.program_id(0) % (GROUP_M * blocks_n)
    block_m = group * GROUP_M + inside % GROUP_M
    block_n = inside // GROUP_M
    expert = tl.load(expert_of_block + block_m)
    if expert < 0:
        return
    pair = tl.load(pair_of_place + block_m * BLOCK_M + tl.arange(0, BLOCK_M))
    here = pair < num_pairs
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a = rows + (pair // pairs_of_row).to(tl.int64)[:, None] * k_size + k[None, :]
    b = weights + expert.to(tl.int64) * n_size * k_size + n.to(tl.int64)[None, :] * k_size + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for begin in range(0, k_size, BLOCK_K):
        inside_k = begin + k < k_size
        a_tile = tl.load(a + begin, mask=here[:, None] & inside_k[None, :], other=0.0)
        b_tile = tl.load(b + begin, mask=inside_k[:, None] & (n < n_size)[None, :], other=0.0)
        total = tl.dot(a_tile, b_tile, total, input_precision=PRECISION)
    if SCALED:
        total = total * tl.load(scales + pair, mask=here, other=0.0)[:, None]
    to = out + pair.to(tl.int64)[:, None] * n_size + n[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=here[:, None] & (n < n_size)[None, :])


@triton.jit
def _activation(hidden, out, width, up_width, KIND: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(hidden + row * up_width + column, mask=column < width, other=0.0).to(tl.float32)
    if KIND == "silu":
        act = z * tl.sigmoid(z)
    elif KIND == "gelu":
        act = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        act = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    else:
        act = tl.maximum(z, 0.0)
    if GATED:
        act = act * tl.load(hidden + row * up_width + width + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, act.to(out.dtype.element_ty), mask=column < width)


def product(
    rows: Tensor, weights: Tensor, planned: tuple[Tensor, Tensor], pairs: int, pairs_of_row: int,
    scales: Tensor | None, precision: str, tiles: dict[str, int],
) -> Tensor:  # fmt: skip
    """out[pair] = rows[pair // pairs_of_row] · weights[expert of pair]ᵀ · scales[pair], [pairs, N]."""
    pair_of_place, expert_of_block = planned
    n_size, k_size = weights.shape[1:]
    out = torch.empty(pairs, n_size, dtype=rows.dtype, device=rows.device)
    grid = (expert_of_block.numel() * triton.cdiv(n_size, tiles["BLOCK_N"]),)
    _product[grid](
        rows, weights, scales, out, pair_of_place, expert_of_block, pairs, n_size, k_size, pairs_of_row,
        SCALED=scales is not None, PRECISION=precision, **tiles,
    )  # fmt: skip
    return out


def activation(hidden: Tensor, width: int, kind: str, gated: bool) -> Tensor:
    """act(gate) · up, or act(hidden): [pairs, width] of [pairs, up_width]."""
    out = torch.empty(hidden.shape[0], width, dtype=hidden.dtype, device=hidden.device)
    block = min(1024, triton.next_power_of_2(width))
    grid = (hidden.shape[0], triton.cdiv(width, block))
    _activation[grid](hidden, out, width, hidden.shape[1], KIND=kind, GATED=gated, BLOCK=block)
    return out
