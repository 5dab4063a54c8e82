"""Whether a layer fits: what one rank of a GPU needs, with the library's own formula for the symmetric heap."""

from dataclasses import dataclass

from ..models import LayerShape
from ..settings import Settings
from .machine import Machine
from .tiles import BLOCK_ROWS, ITEM_BYTES

_RESERVED_BYTES = 2 << 30  # a driver's context, and what an allocator keeps
_TABLE_BYTES = 20  # of the plan and the subscriber, for each (token, expert) pair
_ALIGN = 128


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of one rank.

    Attributes:
        heap: the symmetric heap: inboxes for the worst routing, results, signals.
        staging: what travels to ranks whose memory is not mapped here, until it has landed.
        weights: of the experts of all layers.
        rest: tokens and results of the call, activations between up and down tiles, tables, and what is reserved.
    """

    heap: int
    staging: int
    weights: int
    rest: int

    @property
    def total(self) -> int:
        return self.heap + self.staging + self.weights + self.rest


class DoesNotFit(ValueError):
    """A configuration whose memory cannot be had; says what it needs."""


def memory_need(shape: LayerShape, machine: Machine, ep_size: int, tokens: int, dtype: str, layers: int) -> MemoryNeed:
    """Of a rank of ``ep_size``; ``layers`` of them share one heap.

    Raises:
        DoesNotFit: the heap alone is more than a process can address.
    """
    item = ITEM_BYTES[dtype]
    row, pairs = shape.hidden_size * item, tokens * shape.top_k
    settings = Settings(max_tokens=tokens, max_wire_bytes=row, max_top_k=shape.top_k, max_experts=shape.num_experts,
                        max_groups=1, backward=False, device="cuda")  # fmt: skip
    try:
        heap = settings.arena_bytes(ep_size)
    except RuntimeError as error:
        raise DoesNotFit(str(error)) from error
    staging = 0
    if machine.far.staged and ep_size > machine.ranks_per_node:
        header = _aligned(40 + 4 * (shape.num_experts + 1 + pairs))
        staging = (ep_size - 1) * (header + _aligned(tokens * row)) + machine.ring_blocks * BLOCK_ROWS * row
    experts = -(-shape.num_experts // ep_size)
    ring = machine.ring_blocks * BLOCK_ROWS * shape.intermediate_size * item
    return MemoryNeed(
        heap=heap,
        staging=staging,
        weights=layers * experts * shape.expert_elements * item,
        rest=2 * tokens * row + ring + _TABLE_BYTES * pairs + _RESERVED_BYTES,
    )


def check_memory(need: MemoryNeed, machine: Machine) -> None:
    """
    Raises:
        DoesNotFit: more than the machine has.
    """
    if machine.memory_bytes is None or need.total <= machine.memory_bytes:
        return
    parts = ", ".join(
        f"{part} {getattr(need, part) / 1e9:.1f}"
        for part in ("heap", "staging", "weights", "rest")
        if getattr(need, part)
    )
    raise DoesNotFit(f"needs {need.total / 1e9:.1f} GB of {machine.memory_bytes / 1e9:.0f} GB a GPU ({parts})")


def _aligned(size: int) -> int:
    return (size + _ALIGN - 1) // _ALIGN * _ALIGN
