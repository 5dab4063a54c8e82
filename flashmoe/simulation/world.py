"""One call on all ranks: workers perform what their roles decide, and everything takes its time. Picoseconds."""

from ..models import LayerShape
from .devices import PICO, Memory, Node, Port, picoseconds
from .machine import Machine
from .network import SIGNAL_BYTES, Network
from .outcome import Outcome, outcome_of
from .packets import CHUNK_SLOTS, header_bytes, plan
from .player import Player
from .rank import COMBINE_TOKENS, Rank
from .row_blocks import row_blocks
from .tiles import ITEM_BYTES, choose_engine, costs_by_rows
from .workers import Workers
from .workload import Workload


class World(Workers):
    """Followed ranks of a world, ready for one call."""

    def __init__(self, workload: Workload, shape: LayerShape, machine: Machine, dtype: str) -> None:
        super().__init__(machine)
        self.workload, self.shape = workload, shape
        item_bytes = ITEM_BYTES[dtype]
        self.row_bytes = shape.hidden_size * item_bytes
        tokens = sum(len(ids) for ids in workload.ids)
        pairs = tokens * workload.top_k * workload.num_ranks // workload.period
        self.engine = choose_engine(machine, dtype, pairs, workload.num_experts)
        self.costs = costs_by_rows(self.engine, machine, shape, item_bytes)
        # A look at the chunks of all sources: the subscriber's lanes take 32 at a time.
        self.look_ps = self.notice * max(1, -(-workload.num_ranks // 32))
        self.header_ps, self.tile_ps = picoseconds(machine.header_s), picoseconds(machine.tile_s)
        self.copy_ps, self.add_ps = PICO / machine.copy, PICO / machine.add
        self.cache_ps = PICO / machine.cache_read if machine.cache_read else 0.0
        self.least_sharers = machine.cache_read / machine.worker_cache_read if machine.cache_read else 0.0
        self.players = self._players()
        self.network = Network(machine, workload.num_ranks, self.players, self.clock)

    def _players(self) -> list[Player]:
        workload, machine, players = self.workload, self.machine, []
        tiles = self.engine.up_tiles(self.shape), self.engine.down_tiles(self.shape)
        plans = [plan(workload, rank) for rank in range(workload.period)]
        nodes: dict[int, tuple[Memory, Node]] = {}
        for rank in range(workload.period):
            # On the host all ranks of a node share one memory; a GPU has its own.
            node = rank if machine.has_agents else rank // machine.ranks_per_node
            shared = nodes.setdefault(node, (Memory(machine), Node(machine)))
            late = picoseconds(workload.late_s[rank]) if workload.late_s else 0
            slow = workload.slow[rank] if workload.slow else 1.0
            state = Rank(workload, plans, row_blocks(workload, plans, rank), rank, tiles, machine.ring_blocks,
                         machine.workers)  # fmt: skip
            players.append(Player(state, machine, *shared, late, slow))
        return players

    def run(self) -> Outcome:
        """
        Raises:
            RuntimeError: a rank waits for ever, which would be an error of the order that is simulated.
        """
        for player in self.players:
            for worker in range(self.machine.workers):
                self.clock.at(player.late, self._ready, player, worker)
        self.clock.run()
        stuck = [player.rank.index for player in self.players if not player.rank.done()]
        if stuck:
            raise RuntimeError(f"the simulated ranks {stuck} wait for ever")
        return outcome_of(self.players, self.machine.workers, self.engine.name, self.shape)

    # ---- Worker.
    def _decide(self, now: int, player: Player, worker: int) -> None:
        if not self.machine.has_agents:
            self._follow(now, player)
        rank, has_sent = player.rank, player.has_sent[worker]
        if (not has_sent and self._dispatch(now, player, worker)) or self._tile(now, player, worker):
            return
        if has_sent and self._dispatch(now, player, worker):
            return
        task = rank.combine_task_of(worker)
        if task is not None and rank.rows_missing[task] == 0 and rank.rows_here_at[task] <= now:
            self._combine(now, player, worker, task)
            return
        self._be_idle(now, player, worker)

    # ---- Dispatcher.
    def _dispatch(self, now: int, player: Player, worker: int) -> bool:
        rank, machine = player.rank, self.machine
        if not rank.plan_ready:
            if rank.plan_claimed:
                return False
            rank.plan_claimed = True
            pairs = len(rank.task_of_row)
            seconds = machine.plan_s + machine.plan_pair_s * pairs + machine.plan_peer_s * (rank.num_ranks - 1)
            self._work(now, now + picoseconds(seconds), "plan", self._planned, player, worker)
            return True
        if machine.senders is not None and player.sending >= machine.senders:
            return False
        chunk = rank.next_chunk()
        player.has_sent[worker] = chunk is not None and not machine.has_agents
        if chunk is not None:
            self._send(now, player, worker, *chunk)
        return chunk is not None

    def _planned(self, now: int, player: Player, worker: int) -> None:
        rank = player.rank
        rank.plan_ready = rank.header_here[0] = True
        for offset in range(1, rank.num_ranks):
            num_bytes = header_bytes(self.workload, rank.plan, (rank.index + offset) % rank.num_ranks)
            self.network.count(player, "header", offset, num_bytes)
            num_bytes += SIGNAL_BYTES
            left = self.network.port(player, offset).leave(now, num_bytes)
            self.network.travel(left, player, offset, num_bytes, self._header_arrives, rank.num_ranks - offset)
        self._notice(now, player)
        self._wake(now, player, self.machine.workers)
        self._next(now, player, worker)

    def _send(self, now: int, player: Player, worker: int, offset: int, chunk: int) -> None:
        slots = int(player.rank.plan.num_slots[(player.rank.index + offset) % player.rank.num_ranks])
        num_bytes = min(CHUNK_SLOTS, slots - chunk * CHUNK_SLOTS) * self.row_bytes
        self.network.count(player, "rows", offset, num_bytes)
        player.sending += 1
        copied = now + int(num_bytes * self.copy_ps)
        if self.network.is_staged(player, offset):
            self._work(now, copied, "send", self._sent_staged, player, worker, offset, chunk, num_bytes)
            return
        end = max(copied, player.near.leave(now, num_bytes))
        self._chunk_travels(end, player, offset, chunk, num_bytes)
        self._work(now, end, "send", self._sent, player, worker)

    def _sent_staged(self, now: int, player: Player, worker: int, offset: int, chunk: int, num_bytes: int) -> None:
        """The rows are copied aside, and leave when the port comes to them; the worker need not wait."""
        self._chunk_travels(player.far.leave(now, num_bytes), player, offset, chunk, num_bytes)
        self._sent(now, player, worker)

    def _sent(self, now: int, player: Player, worker: int) -> None:
        player.sending -= 1
        player.rank.sends_done += 1
        self._next(now, player, worker)

    def _chunk_travels(self, left: int, player: Player, offset: int, chunk: int, num_bytes: int) -> None:
        source_index = player.rank.num_ranks - offset
        self.network.travel(left, player, offset, num_bytes, self._chunk_arrives, source_index, chunk)

    # ---- Subscriber and scheduler.
    def _header_arrives(self, now: int, player: Player, source_index: int) -> None:
        player.rank.header_here[source_index] = True
        self._notice(now, player)

    def _chunk_arrives(self, now: int, player: Player, source_index: int, chunk: int) -> None:
        player.rank.chunk_arrives(source_index, chunk)
        self._notice(now, player)

    def _notice(self, now: int, player: Player) -> None:
        """Something has come. An agent looks a moment later; on the host, a worker that has nothing else to do."""
        player.end = max(player.end, now)
        if not self.machine.has_agents:
            self._wake(now, player, 1)
        elif not player.looking:
            player.looking = True
            self.clock.at(now + self.look_ps, self._look, player)

    def _look(self, now: int, player: Player) -> None:
        """The agent's: one header at a time, as each takes its while."""
        player.end = now
        player.rank.known += player.deciding
        player.looking = player.deciding = player.rank.next_header_is_here()
        if player.deciding:
            self.clock.at(now + self.header_ps, self._look, player)
        self._publish(now, player)

    def _follow(self, now: int, player: Player) -> None:
        """A host worker's: all that is here."""
        while player.rank.next_header_is_here():
            player.rank.known += 1
        self._publish(now, player)

    def _publish(self, now: int, player: Player) -> None:
        rank = player.rank
        if rank.waiting_experts and rank.publish():
            player.most_in_ring = max(player.most_in_ring, len(rank.sequence_of))
            self._wake(now, player, rank.tiles_waiting())

    # ---- Processors.
    def _tile(self, now: int, player: Player, worker: int) -> bool:
        rank = player.rank
        down = rank.next_down()
        task = down or rank.next_up()
        if task is None:
            return False
        block, tile = task
        cost = self.costs[down is not None][rank.blocks.rows[block]]
        weights = (rank.index, down is not None, player.expert_of[block], tile)
        player.has_sent[worker] = False
        player.running[worker] = (weights, cost.weight_bytes)
        sharers = max(len(player.running), self.least_sharers)
        taken = int(max(cost.math_ps, cost.cache_bytes * self.cache_ps * sharers) * player.slow)
        read = player.memory.begin_use(now, weights, cost.weight_bytes)
        kind, done = ("down", self._down_written) if down else ("up", self._up_done)
        self._work(now, max(now + taken, read) + self.tile_ps, kind, done, player, worker, block)
        return True

    def _end_tile(self, player: Player, worker: int) -> None:
        player.memory.end_use(*player.running.pop(worker))

    def _up_done(self, now: int, player: Player, worker: int, block: int) -> None:
        self._end_tile(player, worker)
        if player.rank.finish_up(block):
            self._wake(now, player, player.rank.down_tiles)
        self._next(now, player, worker)

    def _down_written(self, now: int, player: Player, worker: int, block: int) -> None:
        """A down tile writes rows of near peers into their results; they must have left before it is done."""
        self._end_tile(player, worker)
        num_bytes = self.network.near_rows(player, block) * self.row_bytes // player.rank.down_tiles
        self._work(now, player.near.leave(now, num_bytes), "down", self._down_done, player, worker, block)

    def _down_done(self, now: int, player: Player, worker: int, block: int) -> None:
        if player.rank.finish_down(block):
            self._return_rows(now, player, block)
        self._next(now, player, worker)

    def _return_rows(self, now: int, player: Player, block: int) -> None:
        blocks, network, landed = player.rank.blocks, self.network, now
        for run in range(blocks.run_begin[block], blocks.run_begin[block + 1]):
            offset, rows, row = blocks.run_source[run], blocks.run_rows[run], blocks.run_row[run]
            if offset == 0:
                self._rows_return(now, player, row, rows)
                continue
            num_bytes = rows * self.row_bytes
            network.count(player, "results", offset, num_bytes)
            owner, port = network.peer(player, offset)
            if network.is_staged(player, offset):
                left = player.far.leave(now, num_bytes)
                landed = max(landed, left)
                self.clock.at(left, self._run_comes_in, owner, port, num_bytes, row, rows)
            else:
                self._run_comes_in(now, owner, port, num_bytes, row, rows)
        player.landed = max(player.landed, landed)
        player.rank.blocks_done += 1
        if landed > now:  # until then they lie in the stage of their ring slot
            self.clock.at(landed, self._slot_free, player, block)
        else:
            self._slot_free(now, player, block)

    def _slot_free(self, now: int, player: Player, block: int) -> None:
        player.rank.free_slot(block)
        self._publish(now, player)

    # ---- Combine.
    def _run_comes_in(self, now: int, owner: Player, port: Port, num_bytes: int, row: int, rows: int) -> None:
        self._rows_return(port.arrive(now, num_bytes), owner, row, rows)

    def _rows_return(self, here: int, owner: Player, row: int, rows: int) -> None:
        missing, here_at = owner.rank.rows_missing, owner.rank.rows_here_at
        for task in owner.rank.task_of_row[row : row + rows]:
            missing[task] -= 1
            if here_at[task] < here:
                here_at[task] = here
            if missing[task] == 0:
                self.clock.at(here_at[task], self._combinable, owner, task)

    def _combinable(self, now: int, player: Player, task: int) -> None:
        """If a worker waits for nothing but this, it goes on."""
        worker = player.rank.holder.get(task)
        if worker in player.idle:
            del player.idle[worker]
            self.clock.at(now + self.notice, self._ready, player, worker)

    def _combine(self, now: int, player: Player, worker: int, task: int) -> None:
        tokens = min(COMBINE_TOKENS, player.rank.plan.num_tokens - task * COMBINE_TOKENS)
        num_bytes = tokens * (self.workload.top_k + 1) * self.row_bytes
        end = max(now + int(num_bytes * self.add_ps), player.memory.read(now, num_bytes))
        self._work(now, end, "combine", self._combined, player, worker)

    def _combined(self, now: int, player: Player, worker: int) -> None:
        player.rank.finish_combine(worker)
        self._next(now, player, worker)
