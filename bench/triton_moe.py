"""The usual fused MoE in Triton, as a baseline: rows sorted by expert into padded blocks, one tiled product used twice.

    plan      the (token, expert) pairs, expert by expert, each expert's filled up to whole blocks
    product   out[pair] = in[pair // in_rows_per] · weights[expert]ᵀ, a block of pairs and a tile of columns a program
    between   act(gate) · up, by torch; at the end the k rows of a token are added up, weighted

Nothing here waits for the GPU or depends on its counts, so calls can be captured in CUDA graphs.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _product(
    rows, weights, out, pair_of_place, expert_of_block, num_pairs, n_size, k_size, pairs_of_row,
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
        total = tl.dot(a_tile, b_tile, total)
    to = out + pair.to(tl.int64)[:, None] * n_size + n[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=here[:, None] & (n < n_size)[None, :])


def plan(ids: Tensor, num_experts: int, block_m: int, group_m: int) -> tuple[Tensor, Tensor]:
    """(pair of each place, expert of each block): places without a pair hold the number of pairs, blocks -1."""
    pairs = ids.numel()
    most = pairs + min(pairs, num_experts) * (block_m - 1)
    blocks = -(-most // block_m)
    blocks = -(-blocks // group_m) * group_m
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    expert = flat[order]
    counts = torch.zeros(num_experts, dtype=torch.int64, device=ids.device).scatter_add_(0, flat, torch.ones_like(flat))
    padded = (counts + block_m - 1) // block_m * block_m
    ends = padded.cumsum(0)
    begins, firsts = ends - padded, counts.cumsum(0) - counts
    place = begins[expert] + torch.arange(pairs, device=ids.device) - firsts[expert]
    pair_of_place = torch.full((blocks * block_m,), pairs, dtype=torch.int32, device=ids.device)
    pair_of_place.scatter_(0, place, order.to(torch.int32))
    first_place = torch.arange(blocks, device=ids.device) * block_m
    owner = torch.searchsorted(ends, first_place, right=True)
    return pair_of_place, torch.where(first_place < ends[-1], owner, -1).to(torch.int32)


def product(rows: Tensor, weights: Tensor, planned, pairs: int, pairs_of_row: int, tiles: dict) -> Tensor:
    pair_of_place, expert_of_block = planned
    n_size, k_size = weights.shape[1:]
    out = torch.empty(pairs, n_size, dtype=rows.dtype, device=rows.device)
    grid = (expert_of_block.numel() * triton.cdiv(n_size, tiles["BLOCK_N"]),)
    _product[grid](rows, weights, out, pair_of_place, expert_of_block, pairs, n_size, k_size, pairs_of_row, **tiles)
    return out


def tiles_for(pairs: int, num_experts: int) -> dict:
    """Low blocks where an expert has few rows."""
    few = pairs <= 32 * num_experts
    return (
        {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "GROUP_M": 1, "num_warps": 4, "num_stages": 4}
        if few
        else {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 8, "num_stages": 3}
    )


def triton_moe(x, ids, weights, gate_up, down, *, activation="silu", gated=True) -> Tensor:
    """As flashmoe.fused_moe, without dropped ids; x [T, H]."""
    num_tokens, top_k = ids.shape
    tiles = tiles_for(ids.numel(), len(down))
    planned = plan(ids.long(), len(down), tiles["BLOCK_M"], tiles["GROUP_M"])
    hidden = product(x, gate_up, planned, ids.numel(), top_k, tiles)
    act = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu}[activation]
    if gated:
        gate, up = hidden.chunk(2, -1)
        hidden = act(gate) * up
    else:
        hidden = act(hidden)
    out = product(hidden, down, planned, ids.numel(), 1, tiles)
    return torch.einsum("tkh,tk->th", out.view(num_tokens, top_k, -1).float(), weights.float()).to(x.dtype)
