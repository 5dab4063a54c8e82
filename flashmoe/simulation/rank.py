"""One rank's roles: what they decide, in the order in which csrc/protocol decides it. Time is the world's business."""

from itertools import pairwise

from .packets import Plan
from .row_blocks import RowBlocks, followed_source
from .workload import Workload

COMBINE_TOKENS = 16  # kCombineTokens of csrc/protocol/config.h


class Rank:
    """The counters, queues and tables of one call.

    A tile is (block, tile). Blocks are numbered as in ``blocks``; ``published`` counts them in the order of
    publication, which is that of ring slots.
    """

    def __init__(self, workload: Workload, plans: list[Plan], blocks: RowBlocks, rank: int, tiles: tuple[int, int],
                 ring_blocks: int, workers: int) -> None:  # fmt: skip
        self.index, self.plan, self.blocks = rank, plans[rank], blocks
        self.num_ranks = workload.num_ranks
        self.up_tiles, self.down_tiles = tiles
        # dispatcher
        self.plan_claimed = self.plan_ready = False
        self.send_head = self.sends_done = 0
        chunks = self.plan.num_chunks
        self.chunks_to = chunks.tolist()
        self.send_tasks = int(chunks.max()) * (self.num_ranks - 1) if self.num_ranks > 1 else 0
        # subscriber; sources in canonical order
        self.header_here = [False] * self.num_ranks
        self.chunks_here = [0] * self.num_ranks  # leading ones
        self.early_chunks: set[tuple[int, int]] = set()
        self.known = 0
        self.chunks_missing = sum(
            int(plans[source].num_chunks[for_whom])
            for source, for_whom in (followed_source(workload, rank, i) for i in range(1, self.num_ranks))
        )
        # scheduler
        self.next_block = blocks.expert_begin[:-1]
        self.next_run = [blocks.run_begin[block] for block in self.next_block]
        bounds = pairwise(blocks.expert_begin)
        self.waiting_experts = [expert for expert, (first, last) in enumerate(bounds) if first < last]
        self.published = self.blocks_done = 0
        most = len(blocks.rows)
        self.ring_blocks = max(1, min(ring_blocks, most))
        self.ring_free = list(range(self.ring_blocks))
        self.bundle_blocks = _bundle_blocks(self.ring_blocks, self.up_tiles, workers)
        self.sequence_of: dict[int, int] = {}
        # processors
        self.up_queue: list[int] = []
        self.bundle_of: list[tuple[int, int]] = []  # (first, blocks) of each place of the queue
        self.down_queue: list[int] = []
        self.up_head = self.down_head = 0
        self.up_left = [self.up_tiles] * most
        self.down_left = [self.down_tiles] * most
        tokens = self.plan.num_tokens
        self.combine_tasks = -(-tokens // COMBINE_TOKENS)
        self.combine_head = self.combine_done = 0
        task_of_row = self.plan.row_token // COMBINE_TOKENS
        self.task_of_row = task_of_row.tolist()
        self.rows_missing = [0] * self.combine_tasks
        for task in self.task_of_row:
            self.rows_missing[task] += 1
        self.rows_here_at = [0] * self.combine_tasks
        self.held: dict[int, int] = {}  # worker → combine task
        self.holder: dict[int, int] = {}  # and the other way round

    # ---- Dispatcher.
    def next_chunk(self) -> tuple[int, int] | None:
        """(offset of the destination, chunk) of the next chunk to send: chunk-major over the destinations."""
        peers = self.num_ranks - 1
        while self.send_head < self.send_tasks:
            ticket = self.send_head
            self.send_head += 1
            offset, chunk = 1 + ticket % peers, ticket // peers
            if chunk < self.chunks_to[(self.index + offset) % self.num_ranks]:
                return offset, chunk
            self.sends_done += 1  # a shorter packet does not have it
        return None

    # ---- Subscriber.
    def next_header_is_here(self) -> bool:
        return self.known < self.num_ranks and self.header_here[self.known]

    def chunk_arrives(self, source_index: int, chunk: int) -> None:
        self.chunks_missing -= 1
        self.early_chunks.add((source_index, chunk))
        while (source_index, self.chunks_here[source_index]) in self.early_chunks:
            self.early_chunks.remove((source_index, self.chunks_here[source_index]))
            self.chunks_here[source_index] += 1

    # ---- Scheduler.
    def publish(self) -> int:
        """Cut runnable row blocks into bundles, by expert in ascending order, as far as ring slots are free; how many."""
        before = self.published
        finished = False
        for expert in self.waiting_experts:
            end, room = self.blocks.expert_begin[expert + 1], True
            while self.next_block[expert] < end and (room := self._has_slots(1)):
                here = self._blocks_here(expert)
                room = self._has_slots(here)
                if not here or not room:
                    break
                self._publish_bundle(expert, here)
            finished |= self.next_block[expert] == end
            if not room:  # and no other expert may take them
                break
        if finished:
            last = self.blocks.expert_begin
            self.waiting_experts = [e for e in self.waiting_experts if self.next_block[e] < last[e + 1]]
        return self.published - before

    def _has_slots(self, blocks: int) -> bool:
        numbers = range(self.published, self.published + blocks)
        return all(self.ring_free[number % self.ring_blocks] == number for number in numbers)

    def _blocks_here(self, expert: int) -> int:
        """How many of the expert's next blocks have their rows, up to a bundle."""
        first = self.next_block[expert]
        end = min(first + self.bundle_blocks, self.blocks.expert_begin[expert + 1])
        block = first
        while block < end and self._is_here(expert, block):
            block += 1
        return block - first

    def _publish_bundle(self, expert: int, blocks: int) -> None:
        for block in range(self.next_block[expert], self.next_block[expert] + blocks):
            self.sequence_of[block] = len(self.up_queue)
            self.up_queue.append(block)
        self.bundle_of += [(self.published, blocks)] * blocks
        self.next_block[expert] += blocks
        self.published += blocks

    def _is_here(self, expert: int, block: int) -> bool:
        blocks, here = self.blocks, self.chunks_here
        if self.known < blocks.sources_needed[block]:
            return False
        run, end = self.next_run[expert], blocks.run_begin[block + 1]
        while run < end and here[blocks.run_source[run]] >= blocks.run_chunks[run]:
            run += 1
        self.next_run[expert] = run  # may be of a later block, which was looked at before
        return run >= end

    # ---- Processor.
    def next_down(self) -> tuple[int, int] | None:
        place, tile = divmod(self.down_head, self.down_tiles)
        if place == len(self.down_queue):
            return None
        self.down_head += 1
        return self.down_queue[place], tile

    def next_up(self) -> tuple[int, int] | None:
        place = self.up_head // self.up_tiles
        if place == len(self.up_queue):
            return None
        first, blocks = self.bundle_of[place]
        tile, block = divmod(self.up_head - first * self.up_tiles, blocks)
        self.up_head += 1
        return self.up_queue[first + block], tile

    def tiles_waiting(self) -> int:
        """That some worker could take now."""
        return (len(self.down_queue) * self.down_tiles - self.down_head
                + len(self.up_queue) * self.up_tiles - self.up_head)  # fmt: skip

    def finish_up(self, block: int) -> bool:
        """Whether that was the block's last up tile; then its down tiles are runnable."""
        self.up_left[block] -= 1
        if self.up_left[block]:
            return False
        self.down_queue.append(block)
        return True

    def finish_down(self, block: int) -> bool:
        """Whether that was the block's last down tile; then its rows go back."""
        self.down_left[block] -= 1
        return self.down_left[block] == 0

    def free_slot(self, block: int) -> None:
        sequence = self.sequence_of.pop(block)
        self.ring_free[sequence % self.ring_blocks] = sequence + self.ring_blocks

    # ---- Combine.
    def combine_task_of(self, worker: int) -> int | None:
        """The task that this worker holds, or the next one; None if there are no more."""
        task = self.held.get(worker)
        if task is None and self.plan_ready and self.combine_head < self.combine_tasks:
            task = self.held[worker] = self.combine_head
            self.holder[task] = worker
            self.combine_head += 1
        return task

    def finish_combine(self, worker: int) -> None:
        del self.holder[self.held.pop(worker)]
        self.combine_done += 1

    def done(self) -> bool:
        return (
            self.plan_ready and self.sends_done == self.send_tasks and self.known == self.num_ranks
            and not self.chunks_missing and not self.waiting_experts and self.blocks_done == self.published
            and self.combine_done == self.combine_tasks
        )  # fmt: skip


def _bundle_blocks(ring_blocks: int, up_tiles: int, workers: int) -> int:
    """max_bundle_blocks of csrc/protocol/task.h."""
    return max(1, min(8, ring_blocks // 4)) if 4 * up_tiles > workers else 1
