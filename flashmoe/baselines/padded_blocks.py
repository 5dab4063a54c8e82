"""Rows in blocks of one expert each, the plan of most grouped kernels: an expert's rows are filled up to whole blocks.

Nothing here waits for a GPU or depends on its counts, so calls can be captured in CUDA graphs.
"""

import torch
from torch import Tensor


def padded_blocks(ids: Tensor, num_experts: int, height: int, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """(pair of each place, expert of each block): places without a pair hold the number of pairs, blocks -1.

    Args:
        ids: [T, k], the expert of each (token, expert) pair; none is dropped.
        height: of a block, in rows.
        multiple: the number of blocks is a multiple of it.
    """
    pairs = ids.numel()
    most = pairs + min(pairs, num_experts) * (height - 1)
    blocks = -(-most // height)
    blocks = -(-blocks // multiple) * multiple
    flat = ids.flatten().long()
    expert, order = flat.sort(stable=True)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=ids.device).scatter_add_(0, flat, torch.ones_like(flat))
    padded = (counts + height - 1) // height * height
    ends = padded.cumsum(0)
    begins, firsts = ends - padded, counts.cumsum(0) - counts
    place = begins[expert] + torch.arange(pairs, device=ids.device) - firsts[expert]
    pair_of_place = torch.full((blocks * height,), pairs, dtype=torch.int32, device=ids.device)
    pair_of_place.scatter_(0, place, order.to(torch.int32))
    first_place = torch.arange(blocks, device=ids.device) * height
    owner = torch.searchsorted(ends, first_place, right=True)
    return pair_of_place, torch.where(first_place < ends[-1], owner, -1).to(torch.int32)
