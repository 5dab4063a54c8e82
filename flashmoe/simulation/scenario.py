"""One question to the simulation: this layer on so many GPUs, with this routing; and its answer."""

from dataclasses import asdict, dataclass
from typing import Any

from ..models import LayerShape
from .machine import Machine
from .memory import MemoryNeed, check_memory, memory_need
from .outcome import Outcome
from .workload import Skew, Workload, draw, with_capacity
from .world import World

_FOLLOW_ALL = 8  # ranks; of a larger world with even routing the ranks of one node are followed


@dataclass(frozen=True)
class Scenario:
    """A call on ``num_gpus`` GPUs.

    Attributes:
        tokens: of each rank.
        skew: of the routing.
        slow, late_s: of rank 0, the straggler: how many times as long its products take, how much later it enters.
        capacity_factor: tokens above it are dropped, as in the FlashMoE paper; None: nothing is dropped.
        layers: whose weights have to fit beside each other.
        follow: ranks that are followed, a divisor of the ranks of a group; None: all, or those of one node.
        seed: of the routing.
    """

    shape: LayerShape
    machine: Machine
    num_gpus: int
    tokens: int
    dtype: str = "bf16"
    skew: Skew = Skew()
    slow: float = 1.0
    late_s: float = 0.0
    capacity_factor: float | None = None
    layers: int = 1
    follow: int | None = None
    seed: int = 0

    @property
    def ep_size(self) -> int:
        """Ranks that share the experts: as many as there can be with equally many each. More GPUs are more such groups,
        with tokens of their own, which have nothing to say to each other in this layer."""
        experts = self.shape.num_experts
        return max(d for d in range(1, min(self.num_gpus, experts) + 1) if self.num_gpus % d == 0 and experts % d == 0)

    @property
    def followed(self) -> int:
        if self.follow is not None:
            return self.follow
        uneven = self.skew.kind != "uniform" or self.ep_size % self.machine.ranks_per_node
        return self.ep_size if uneven or self.ep_size <= _FOLLOW_ALL else self.machine.ranks_per_node

    def memory_need(self) -> MemoryNeed:
        return memory_need(self.shape, self.machine, self.ep_size, self.tokens, self.dtype, self.layers)

    def workload(self) -> Workload:
        """
        Raises:
            ValueError: so many followed ranks do not divide the world.
        """
        experts, top_k = self.shape.num_experts, self.shape.top_k
        ids = [draw(self.tokens, experts, top_k, self.skew, rank=r, seed=self.seed) for r in range(self.followed)]
        if self.capacity_factor is not None:
            ids = [with_capacity(part, experts, self.capacity_factor) for part in ids]
        others = self.followed - 1
        return Workload(tuple(ids), self.ep_size, experts, (self.late_s, *[0.0] * others), (self.slow, *[1.0] * others))


def simulate(scenario: Scenario) -> dict[str, Any]:
    """The answer, as JSON-like values; seconds, bytes, FLOPs a second.

    Raises:
        DoesNotFit: its memory cannot be had.
        ValueError: so many followed ranks do not divide the world.
    """
    need = scenario.memory_need()
    check_memory(need, scenario.machine)
    workload = scenario.workload()

    def run(machine: Machine) -> Outcome:
        return World(workload, scenario.shape, machine, scenario.dtype).run()

    outcome, alone = run(scenario.machine), run(scenario.machine.with_free_wires())
    exposed = max(0.0, outcome.seconds - alone.seconds)
    wires = outcome.wire_seconds
    return {
        "model": scenario.shape.name,
        "experts": scenario.shape.num_experts,
        "machine": scenario.machine.name,
        "senders": scenario.machine.senders,
        "dtype": scenario.dtype,
        "capacity_factor": scenario.capacity_factor,
        "gpus": scenario.num_gpus,
        "ep_size": scenario.ep_size,
        "followed": scenario.followed,
        "tokens": scenario.tokens,
        "skew": str(scenario.skew),
        "slow": scenario.slow,
        "late_s": scenario.late_s,
        "engine": outcome.engine,
        "seconds": outcome.seconds,
        "seconds_with_free_wires": alone.seconds,
        "exposed_seconds": exposed,
        "wire_seconds": wires,
        # Of the time that the bytes need on their wires, the part that costs the call nothing.
        "hidden_share": min(1.0, max(0.0, 1 - exposed / wires)) if wires else 1.0,
        "utilisation": outcome.utilisation,
        "flops_per_gpu": outcome.flops_of_a_rank,
        "tokens_per_s": scenario.tokens * scenario.num_gpus / outcome.seconds,
        "busiest_rank": outcome.busiest_rank,
        "busy_seconds": {kind: busy / outcome.workers for kind, busy in _mean(outcome).items()},
        "memory_bytes": asdict(need) | {"total": need.total},
    }


def _mean(outcome: Outcome) -> dict[str, float]:
    ranks = outcome.ranks
    return {kind: sum(rank.busy[kind] for rank in ranks) / len(ranks) for kind in ranks[0].busy}
