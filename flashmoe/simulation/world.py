"""The event loop: followed ranks perform what their roles decide, and everything takes its time. Picoseconds."""

import heapq
from collections.abc import Callable
from itertools import count

from ..models import LayerShape
from .devices import PICO, Memory, Node, Port, picoseconds
from .machine import Machine
from .outcome import Outcome, RankOutcome
from .packets import CHUNK_SLOTS, header_bytes, plan
from .rank import COMBINE_TOKENS, Rank
from .row_blocks import row_blocks
from .tiles import BLOCK_ROWS, ITEM_BYTES, Engine, choose_engine
from .workload import Workload

SIGNAL_BYTES = 8
KINDS = ("plan", "send", "up", "down", "combine")
TRAFFIC = ("header", "rows", "results", "signals")


class _Player:
    """A rank with its workers and devices."""

    def __init__(self, rank: Rank, machine: Machine, memory: Memory, node: Node, late: int, slow: float) -> None:
        self.rank, self.memory, self.node = rank, memory, node
        self.near, self.far = Port(machine.near), Port(machine.far)
        self.late, self.slow = late, slow
        self.idle = dict.fromkeys(range(machine.workers))
        self.has_sent = [False] * machine.workers  # on the host, tiles and sends take turns
        self.tiles_running = 0
        self.looking = self.deciding = False
        self.expert_of = rank.blocks.expert_of()
        self.busy = dict.fromkeys(KINDS, 0)
        self.sent = {kind: [0] * rank.num_ranks for kind in TRAFFIC}
        self.end = self.landed = late
        self.most_in_ring = 0


class World:
    """One call of one layer on all ranks of a world.

    Raises:
        ValueError: the engine cannot cut this shape into tiles.
    """

    def __init__(self, workload: Workload, shape: LayerShape, machine: Machine, dtype: str) -> None:
        self.workload, self.shape, self.machine = workload, shape, machine
        self.item_bytes = ITEM_BYTES[dtype]
        self.row_bytes = shape.hidden_size * self.item_bytes
        tokens = sum(len(ids) for ids in workload.ids)
        pairs = tokens * workload.top_k * workload.num_ranks // workload.period
        self.engine: Engine = choose_engine(machine, dtype, pairs, workload.num_experts)
        up, down = self.engine.up_tiles(shape), self.engine.down_tiles(shape)
        self.up_costs = [self._cost(shape.up_rows / up, shape.hidden_size, rows) for rows in range(BLOCK_ROWS + 1)]
        self.down_costs = [self._cost(shape.hidden_size / down, shape.intermediate_size, r) for r in range(BLOCK_ROWS + 1)]
        self.plans = [plan(workload, rank) for rank in range(workload.period)]
        self.players: list[_Player] = []
        nodes: dict[int, tuple[Memory, Node]] = {}
        for rank in range(workload.period):
            # On the host all ranks of a node share one memory; a GPU has its own.
            shared = nodes.setdefault(rank if machine.has_agents else rank // machine.ranks_per_node,
                                      (Memory(machine), Node(machine)))  # fmt: skip
            late = picoseconds(workload.late_s[rank]) if workload.late_s else 0
            slow = workload.slow[rank] if workload.slow else 1.0
            state = Rank(workload, self.plans, row_blocks(workload, self.plans, rank), rank, (up, down), machine.ring_blocks)
            self.players.append(_Player(state, machine, *shared, late, slow))
        self.notice = picoseconds(machine.notice_s)
        # A look at the chunks of all sources: the subscriber's lanes take 32 at a time.
        self.look_ps = self.notice * max(1, -(-workload.num_ranks // 32))
        self.header_ps, self.tile_ps = picoseconds(machine.header_s), picoseconds(machine.tile_s)
        self.copy_ps, self.add_ps = PICO / machine.copy, PICO / machine.add
        self.cache_ps = PICO / machine.cache_read if machine.cache_read else 0.0
        self.cache_sharers = machine.cache_read / machine.worker_cache_read if machine.cache_read else 0.0
        self.events: list[tuple] = []
        self.ticks = count()

    def run(self) -> Outcome:
        for player in self.players:
            workers, player.idle = list(player.idle), {}
            for worker in workers:
                self._at(player.late, self._ready, player, worker)
        events = self.events
        while events:
            now, _, happen, player, *what = heapq.heappop(events)
            happen(now, player, *what)
        stuck = [player.rank.index for player in self.players if not player.rank.done()]
        if stuck:
            raise RuntimeError(f"the simulated ranks {stuck} wait for ever")
        return self._outcome()

    # ---- Workers.
    def _ready(self, now: int, player: _Player, worker: int) -> None:
        """A worker wants to decide; on the host it needs a core for that."""
        node = player.node
        if node.free_cores is not None:
            if node.free_cores == 0:
                node.waiting.append((player, worker))
                return
            node.free_cores -= 1
        self._decide(now, player, worker)

    def _decide(self, now: int, player: _Player, worker: int) -> None:
        if not self.machine.has_agents:
            self._follow(now, player)
        rank = player.rank
        if (not player.has_sent[worker] and self._dispatch(now, player, worker)) or self._tile(now, player, worker):
            return
        if player.has_sent[worker] and self._dispatch(now, player, worker):
            return
        task = rank.combine_task_of(worker)
        if task is not None and rank.rows_missing[task] == 0 and rank.rows_here_at[task] <= now:
            self._combine(now, player, worker, task)
            return
        player.idle[worker] = None
        self._pass_core(now, player.node)

    def _next(self, now: int, player: _Player, worker: int) -> None:
        """A worker has finished something."""
        player.end = now
        node = player.node
        if node.waiting:  # others want the core, too
            node.waiting.append((player, worker))
            self._pass_core(now, node)
        else:
            self._decide(now, player, worker)

    def _pass_core(self, now: int, node: Node) -> None:
        if node.free_cores is None:
            return
        if node.waiting:
            self._decide(now, *node.waiting.popleft())
        else:
            node.free_cores += 1

    def _wake(self, now: int, player: _Player, most: int) -> None:
        idle = player.idle
        for _ in range(min(most, len(idle))):
            worker, _ = idle.popitem()
            self._at(now + self.notice, self._ready, player, worker)

    def _at(self, time: int, happen: Callable[..., None], player: _Player, *what: int) -> None:
        heapq.heappush(self.events, (time, next(self.ticks), happen, player, *what))

    def _work(self, now: int, end: int, kind: str, done: Callable[..., None], player: _Player, *what: int) -> None:
        player.busy[kind] += end - now
        self._at(end, done, player, *what)

    # ---- Dispatcher.
    def _dispatch(self, now: int, player: _Player, worker: int) -> bool:
        rank = player.rank
        if not rank.plan_ready:
            if rank.plan_claimed:
                return False
            rank.plan_claimed = True
            machine, pairs = self.machine, len(rank.task_of_row)
            seconds = machine.plan_s + machine.plan_pair_s * pairs + machine.plan_peer_s * (rank.num_ranks - 1)
            self._work(now, now + picoseconds(seconds), "plan", self._planned, player, worker)
            return True
        chunk = rank.next_chunk()
        player.has_sent[worker] = chunk is not None and not self.machine.has_agents
        if chunk is not None:
            self._send(now, player, worker, *chunk)
        return chunk is not None

    def _planned(self, now: int, player: _Player, worker: int) -> None:
        rank = player.rank
        rank.plan_ready = rank.header_here[0] = True
        for offset in range(1, rank.num_ranks):
            destination = (rank.index + offset) % rank.num_ranks
            num_bytes = header_bytes(self.workload, rank.plan, destination)
            self._count(player, "header", offset, num_bytes)
            port, peer, peer_port = self._wire(player, offset)
            left = port.leave(now, num_bytes + SIGNAL_BYTES)
            player.landed = max(player.landed, left)
            self._at(peer_port.arrive(left, num_bytes), self._header_arrives, peer, rank.num_ranks - offset)
        self._notice(now, player)
        self._wake(now, player, self.machine.workers)
        self._next(now, player, worker)

    def _send(self, now: int, player: _Player, worker: int, offset: int, chunk: int) -> None:
        rank = player.rank
        slots = int(rank.plan.num_slots[(rank.index + offset) % rank.num_ranks])
        num_bytes = min(CHUNK_SLOTS, slots - chunk * CHUNK_SLOTS) * self.row_bytes
        self._count(player, "rows", offset, num_bytes)
        port, peer, peer_port = self._wire(player, offset)
        copied = now + int(num_bytes * self.copy_ps)
        if port is player.far and self.machine.far.staged:
            end, left = copied, port.leave(copied, num_bytes)
        else:
            end = left = max(copied, port.leave(now, num_bytes))
        player.landed = max(player.landed, left)
        self._at(peer_port.arrive(left, num_bytes), self._chunk_arrives, peer, rank.num_ranks - offset, chunk)
        self._work(now, end, "send", self._sent, player, worker)

    def _sent(self, now: int, player: _Player, worker: int) -> None:
        player.rank.sends_done += 1
        self._next(now, player, worker)

    def _wire(self, player: _Player, offset: int) -> tuple[Port, _Player, Port]:
        """My port towards a rank, who does what that rank does, and its port."""
        index, ranks = player.rank.index, self.machine.ranks_per_node
        other = (index + offset) % player.rank.num_ranks
        peer = self.players[other % self.workload.period]
        near = index // ranks == other // ranks
        return (player.near, peer, peer.near) if near else (player.far, peer, peer.far)

    def _count(self, player: _Player, kind: str, offset: int, num_bytes: int) -> None:
        player.sent[kind][offset] += num_bytes
        player.sent["signals"][offset] += SIGNAL_BYTES

    # ---- Subscriber and scheduler.
    def _header_arrives(self, now: int, player: _Player, source_index: int) -> None:
        player.rank.header_here[source_index] = True
        self._notice(now, player)

    def _chunk_arrives(self, now: int, player: _Player, source_index: int, chunk: int) -> None:
        player.rank.chunk_arrives(source_index, chunk)
        self._notice(now, player)

    def _notice(self, now: int, player: _Player) -> None:
        """Something has come. An agent looks a moment later; on the host, a worker that has nothing else to do."""
        player.end = max(player.end, now)
        if not self.machine.has_agents:
            self._wake(now, player, 1)
        elif not player.looking:
            player.looking = True
            self._at(now + self.look_ps, self._look, player)

    def _look(self, now: int, player: _Player) -> None:
        """The agents': one header at a time, as each takes its while."""
        rank = player.rank
        player.end = now
        rank.known += player.deciding
        player.deciding = rank.next_header_is_here()
        player.looking = player.deciding
        if player.deciding:
            self._at(now + self.header_ps, self._look, player)
        self._publish(now, player)

    def _follow(self, now: int, player: _Player) -> None:
        """The host's: all that is here."""
        while player.rank.next_header_is_here():
            player.rank.known += 1
        self._publish(now, player)

    def _publish(self, now: int, player: _Player) -> None:
        rank = player.rank
        if rank.waiting_experts and rank.publish():
            player.most_in_ring = max(player.most_in_ring, len(rank.sequence_of))
            self._wake(now, player, rank.tiles_waiting())

    # ---- Processors.
    def _tile(self, now: int, player: _Player, worker: int) -> bool:
        rank = player.rank
        down = rank.next_down()
        task = down or rank.next_up()
        if task is None:
            return False
        block, tile = task
        rows = rank.blocks.rows[block]
        math, cache_bytes, weight_bytes = self.down_costs[rows] if down else self.up_costs[rows]
        player.has_sent[worker] = False
        player.tiles_running += 1
        taken = int(math * player.slow)
        if cache_bytes and self.cache_ps:
            sharers = max(player.tiles_running, self.cache_sharers)
            taken = max(taken, int(cache_bytes * self.cache_ps * sharers))
        weights = (rank.index, down is not None, player.expert_of[block], tile)
        end = max(now + taken, player.memory.read_cached(now, weights, weight_bytes)) + self.tile_ps
        kind, done = ("down", self._down_written) if down else ("up", self._up_done)
        self._work(now, end, kind, done, player, worker, block)
        return True

    def _down_written(self, now: int, player: _Player, worker: int, block: int) -> None:
        """A down tile writes rows of near peers into their results; they must have left before it is done."""
        left = player.near.leave(now, self._near_rows(player, block) * self.row_bytes // player.rank.down_tiles)
        self._work(now, left, "down", self._down_done, player, worker, block)

    def _near_rows(self, player: _Player, block: int) -> int:
        """Of other ranks, that are written directly."""
        blocks, rows = player.rank.blocks, 0
        for run in range(blocks.run_begin[block], blocks.run_begin[block + 1]):
            source = blocks.run_source[run]
            if source and not self._is_staged(player, source):
                rows += blocks.run_rows[run]
        return rows

    def _is_staged(self, player: _Player, offset: int) -> bool:
        index, ranks = player.rank.index, self.machine.ranks_per_node
        return self.machine.far.staged and index // ranks != (index + offset) % player.rank.num_ranks // ranks

    def _up_done(self, now: int, player: _Player, worker: int, block: int) -> None:
        player.tiles_running -= 1
        if player.rank.finish_up(block):
            self._wake(now, player, player.rank.down_tiles)
        self._next(now, player, worker)

    def _down_done(self, now: int, player: _Player, worker: int, block: int) -> None:
        player.tiles_running -= 1
        if player.rank.finish_down(block):
            self._return_rows(now, player, block)
        self._next(now, player, worker)

    def _return_rows(self, now: int, player: _Player, block: int) -> None:
        rank, blocks, landed = player.rank, player.rank.blocks, now
        for run in range(blocks.run_begin[block], blocks.run_begin[block + 1]):
            offset, rows, here = blocks.run_source[run], blocks.run_rows[run], now
            owner = player
            if offset:
                num_bytes = rows * self.row_bytes
                self._count(player, "results", offset, num_bytes)
                port, owner, owner_port = self._wire(player, offset)
                left = now
                if self._is_staged(player, offset):
                    left = port.leave(now, num_bytes)
                    landed = max(landed, left)
                here = owner_port.arrive(left, num_bytes)
            self._rows_return(here, owner, blocks.run_row[run], rows)
        player.landed = max(player.landed, landed)
        rank.blocks_done += 1
        if landed > now:
            self._at(landed, self._slot_free, player, block)
        else:
            self._slot_free(now, player, block)

    def _slot_free(self, now: int, player: _Player, block: int) -> None:
        player.rank.free_slot(block)
        self._publish(now, player)

    # ---- Combine.
    def _rows_return(self, here: int, owner: _Player, row: int, rows: int) -> None:
        rank = owner.rank
        missing, here_at = rank.rows_missing, rank.rows_here_at
        for task in rank.task_of_row[row : row + rows]:
            missing[task] -= 1
            if here_at[task] < here:
                here_at[task] = here
            if missing[task] == 0:
                self._at(here_at[task], self._combinable, owner, task)

    def _combinable(self, now: int, player: _Player, task: int) -> None:
        """If a worker waits for nothing but this, it goes on."""
        for worker in player.idle:
            if player.rank.held.get(worker) == task:
                del player.idle[worker]
                self._at(now + self.notice, self._ready, player, worker)
                return

    def _combine(self, now: int, player: _Player, worker: int, task: int) -> None:
        tokens = min(COMBINE_TOKENS, player.rank.plan.num_tokens - task * COMBINE_TOKENS)
        num_bytes = tokens * (self.workload.top_k + 1) * self.row_bytes
        end = max(now + int(num_bytes * self.add_ps), player.memory.read(now, num_bytes))
        self._work(now, end, "combine", self._combined, player, worker)

    def _combined(self, now: int, player: _Player, worker: int) -> None:
        del player.rank.held[worker]
        player.rank.combine_done += 1
        self._next(now, player, worker)

    # ---- Costs and what came of it.
    def _cost(self, weight_rows: float, depth: int, rows: int) -> tuple[int, int, int]:
        cost = self.engine.cost(self.machine, weight_rows, depth, self.item_bytes, rows)
        return cost.math_ps, int(cost.cache_bytes), int(cost.weight_bytes)

    def _outcome(self) -> Outcome:
        return Outcome(
            ranks=tuple(
                RankOutcome(
                    seconds=(max(player.end, player.landed) - player.late) / PICO,
                    entered=player.late / PICO,
                    busy={kind: busy / PICO for kind, busy in player.busy.items()},
                    sent=player.sent,
                    rows=sum(player.rank.blocks.rows),
                    blocks=len(player.rank.blocks.rows),
                    most_in_ring=player.most_in_ring,
                    memory_bytes_read=player.memory.bytes_read,
                )
                for player in self.players
            ),
            workers=self.machine.workers,
            engine=self.engine.name,
            flops=self.shape.flops(sum(sum(player.rank.blocks.rows) for player in self.players)),
        )
