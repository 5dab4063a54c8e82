"""What each followed rank sends, fixed by its routing alone: the result of csrc/protocol/plan.h."""

from dataclasses import dataclass

import numpy as np

from .workload import Workload

CHUNK_SLOTS = 64  # kChunkRows of csrc/protocol/config.h
_HEADER_BYTES = 40  # sizeof(PacketHeader), csrc/protocol/packet.h


@dataclass(frozen=True)
class Plan:
    """Rows are (token, expert) pairs, sorted by expert and then by token, as they are numbered among the results.

    Attributes:
        rank: whose.
        segment_row: [num_experts + 1] first row of each expert.
        row_token: [rows].
        row_slot: [rows] its slot in the destination's inbox; rows that stay here have none, and 0.
        num_slots: [num_ranks] distinct tokens that travel to each rank.
        num_tokens: of the call.
    """

    rank: int
    segment_row: np.ndarray
    row_token: np.ndarray
    row_slot: np.ndarray
    num_slots: np.ndarray
    num_tokens: int

    @property
    def num_chunks(self) -> np.ndarray:
        return -(-self.num_slots // CHUNK_SLOTS)


def plan(workload: Workload, rank: int) -> Plan:
    """Of one followed rank."""
    ids, begin = workload.ids[rank], workload.rank_begin
    tokens, top_k = ids.shape
    flat = ids.ravel()
    order = np.argsort(flat, kind="stable")
    order = order[np.count_nonzero(flat < 0) :]
    row_token, row_expert = order // top_k, flat[order]
    segment_row = np.concatenate(([0], np.cumsum(np.bincount(row_expert, minlength=workload.num_experts))))
    row_rank = np.searchsorted(begin, row_expert, side="right") - 1
    # A token's first row at a rank brings it there; its slot is that row's place among all first rows.
    _, first, of_row = np.unique(row_rank * tokens + row_token, return_index=True, return_inverse=True)
    is_first = np.zeros(len(order), dtype=np.int64)
    is_first[first] = 1
    is_first[row_rank == rank] = 0
    before = np.concatenate(([0], np.cumsum(is_first)))
    slots_begin = before[segment_row[begin]]
    row_slot = before[first[of_row]] - slots_begin[row_rank]
    row_slot[row_rank == rank] = 0
    return Plan(rank, segment_row, row_token, row_slot, np.diff(slots_begin), tokens)


def header_bytes(workload: Workload, plan: Plan, destination: int) -> int:
    """Of the header that ``plan`` sends to ``destination``; an empty packet has none."""
    begin, end = workload.rank_begin[destination], workload.rank_begin[destination + 1]
    entries = int(plan.segment_row[end] - plan.segment_row[begin])
    return _HEADER_BYTES + 4 * (int(end - begin) + 1 + entries) if entries else 0
