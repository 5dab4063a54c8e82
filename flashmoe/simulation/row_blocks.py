"""The row blocks of a rank, fixed by everybody's routing: which rows of which packets each one is made of."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .packets import CHUNK_SLOTS, Plan
from .tiles import BLOCK_ROWS
from .workload import Workload


@dataclass(frozen=True)
class RowBlocks:
    """Blocks are numbered by expert and then by their place in its canonical list; runs block by block.

    Attributes:
        expert_begin: first block of each local expert, and their number at the end.
        rows: of each block.
        sources_needed: of each block, how many sources must be decided before it can be formed.
        run_begin: first run of each block, and their number at the end.
        run_source: of each run, whose rows they are: the i-th source of the canonical list.
        run_rows, run_row: of each run, how many rows, and the first among that source's results.
        run_chunks: of each run, how many of that source's chunks must be here.
    """

    expert_begin: list[int]
    rows: list[int]
    sources_needed: list[int]
    run_begin: list[int]
    run_source: list[int]
    run_rows: list[int]
    run_row: list[int]
    run_chunks: list[int]

    def expert_of(self) -> list[int]:
        """The local expert of each block."""
        return [expert for expert, (first, last) in enumerate(pairwise(self.expert_begin)) for _ in range(last - first)]


def followed_source(workload: Workload, rank: int, source_index: int) -> tuple[int, int]:
    """The followed rank that does what the i-th source of ``rank`` does; and for whom it does what that does for me."""
    followed = (rank + source_index) % workload.period
    return followed, (followed - source_index) % workload.num_ranks


def row_blocks(workload: Workload, plans: list[Plan], rank: int) -> RowBlocks:
    """Cut the canonical lists of one followed rank's experts."""
    num_ranks = workload.num_ranks
    begin = workload.rank_begin
    experts = int(begin[rank + 1] - begin[rank])
    if experts == 0:
        return RowBlocks([0], [], [], [0], [], [], [], [])
    sources = [followed_source(workload, rank, i) for i in range(num_ranks)]
    first_row = np.stack([plans[s].segment_row[begin[d] : begin[d] + experts] for s, d in sources])  # [source, expert]
    last_row = np.stack([plans[s].segment_row[begin[d] + 1 : begin[d] + 1 + experts] for s, d in sources])
    counts = last_row - first_row
    offset = np.cumsum(counts, axis=0) - counts
    blocks_of = -(-counts.sum(axis=0) // BLOCK_ROWS)
    expert_begin = np.concatenate(([0], np.cumsum(blocks_of)))
    num_blocks = int(expert_begin[-1])

    # All lists one after the other, each starting at a whole block: a run begins where a segment or a block does.
    start = (offset + expert_begin[:-1] * BLOCK_ROWS).T.ravel()  # of segments, by expert and source
    rows = counts.T.ravel()
    kept = np.flatnonzero(rows)
    segment_start, segment_end = start[kept], start[kept] + rows[kept]
    run_start = np.union1d(segment_start, np.arange(num_blocks) * BLOCK_ROWS)
    segment = np.searchsorted(segment_start, run_start, side="right") - 1
    block = run_start // BLOCK_ROWS
    run_rows = np.minimum(segment_end[segment], (block + 1) * BLOCK_ROWS) - run_start
    source = kept[segment] % num_ranks
    run_row = first_row.T.ravel()[kept[segment]] + run_start - segment_start[segment]

    run_begin = np.searchsorted(block, np.arange(num_blocks + 1))
    block_rows = np.bincount(block, weights=run_rows, minlength=num_blocks).astype(np.int64)
    # A short block is the last of its list, and nobody may add to it any more.
    last_source = source[run_begin[1:] - 1] if num_blocks else np.zeros(0, dtype=np.int64)
    needed = np.where(block_rows == BLOCK_ROWS, last_source + 1, num_ranks)
    return RowBlocks(
        expert_begin.tolist(), block_rows.tolist(), needed.tolist(), run_begin.tolist(), source.tolist(),
        run_rows.tolist(), run_row.tolist(), _chunks_needed(workload, plans, rank, source, run_row, run_rows).tolist(),
    )  # fmt: skip


def _chunks_needed(
    workload: Workload, plans: list[Plan], rank: int, source: np.ndarray, row: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """The last slot of each run, in chunks; 0 for my own rows, which are read where they lie."""
    followed = (rank + source) % workload.period
    needed = np.zeros(len(source), dtype=np.int64)
    for index, one in enumerate(plans):
        mine = np.flatnonzero((followed == index) & (source > 0))
        if not len(mine):
            continue
        mine = mine[np.argsort(row[mine])]
        ends = np.stack((row[mine], row[mine] + rows[mine]), axis=1).ravel()
        most = np.maximum.reduceat(np.append(one.row_slot, 0), ends)[::2]
        needed[mine] = most // CHUNK_SLOTS + 1
    return needed
