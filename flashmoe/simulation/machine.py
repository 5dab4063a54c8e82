"""Machines that a layer is simulated on: how many workers a rank has, how fast they are, what joins the ranks."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Wire:
    """What joins two ranks. Every rank has one port to it, with as much again in the other direction.

    Attributes:
        bytes_per_s: of one direction of a port.
        latency_s: from the last byte's departure until the peer can see its signal.
        put_s: the least time between two transfers of a port.
        staged: the peer's memory is not mapped: rows are copied aside, and travel while the worker goes on.
    """

    bytes_per_s: float
    latency_s: float
    put_s: float = 0.0
    staged: bool = False


@dataclass(frozen=True)
class Machine:
    """One kind of rank and what stands between several of them; rates in bytes and FLOPs a second.

    Attributes:
        workers: of a rank. On a GPU each has a multiprocessor of its own.
        cores: of a node, where its ranks' workers share them; None where every worker has its own.
        memory_bytes: of a rank's device; None: it is not asked.
        math_flops: of one worker, in dense 16-bit products on a GPU, in fp32 on the host.
        memory_read: out of memory, for all that share one: a GPU's workers, or the host's ranks.
        worker_read: the most that one worker draws.
        cache_bytes, cache_read: of the cache in front of it; ``cache_read`` None: it never limits a tile.
        worker_cache_read: the most that one worker draws out of it.
        copy, add: of one worker that copies rows to peers, or adds up those that came back.
        near, far: between ranks of one node, and of two.
        has_agents: a part of each worker decides while the rest computes, and one of them watches the signals. On the
            host a worker does either.
        senders: workers of a rank that send at one time; None: all that are free, as it is built.
        ring_blocks: row blocks between their up and down tiles at one time.
        tile_s: of a tile beside its products.
        widen_s: of a worker that turns one 16-bit weight into fp32.
        plan_s, plan_pair_s, plan_peer_s: of the plan, with the headers: once, for each pair, for each peer.
        header_s: of the subscriber for one packet's header.
        notice_s: until an idle worker takes what has become possible.
        source: where the numbers come from.
    """

    name: str
    source: str
    workers: int
    math_flops: float
    memory_read: float
    worker_read: float
    cache_bytes: float
    copy: float
    add: float
    near: Wire
    far: Wire
    ring_blocks: int
    ranks_per_node: int
    has_agents: bool
    cores: int | None = None
    senders: int | None = None
    memory_bytes: float | None = None
    cache_read: float | None = None
    worker_cache_read: float | None = None
    tile_s: float = 0.0
    widen_s: float = 0.0
    plan_s: float = 0.0
    plan_pair_s: float = 0.0
    plan_peer_s: float = 0.0
    header_s: float = 0.0
    notice_s: float = 0.0

    def with_free_wires(self) -> "Machine":
        """The same with transfers that cost nothing: what is left is computation and the order of things."""
        free = Wire(float("inf"), 0.0)
        return replace(self, near=free, far=free, copy=float("inf"))


# What a data sheet does not say is predicted in docs/performance.md, or assumed; docs/simulation.md says which.
H100 = Machine(
    name="h100",
    source="NVIDIA H100 SXM data sheet: 132 multiprocessors, 989 TFLOP/s dense bf16, 3.35 TB/s, 80 GB, NVLink 450 GB/s "
    "and one 400 Gb/s adapter a direction; 80 to 90 % of memory and link rates; L2 and latencies as predicted in "
    "docs/performance.md",
    workers=132,
    math_flops=989e12 / 132,
    memory_read=0.9 * 3.35e12,
    worker_read=104e9,  # 13 stages of 8 KiB in flight at 1 µs of latency
    cache_bytes=40e6,  # of 50 MB: rows and activations want a place, too
    cache_read=6.2e12,
    worker_cache_read=64 * 1.83e9,  # 64 bytes a cycle
    copy=30e9,
    add=30e9,
    near=Wire(0.8 * 450e9, 2e-6),
    far=Wire(0.9 * 50e9, 5e-6, put_s=0.5e-6, staged=True),
    ring_blocks=64,
    ranks_per_node=8,
    has_agents=True,
    memory_bytes=80e9,
    tile_s=2e-6,
    plan_s=3e-6,
    plan_pair_s=2.2e-9,
    plan_peer_s=2e-6,
    header_s=2e-6,
    notice_s=1e-6,
)

H200 = replace(
    H100,
    name="h200",
    source="NVIDIA H200 SXM data sheet: as the H100, with 4.8 TB/s and 141 GB; else as for the H100",
    memory_read=0.9 * 4.8e12,
    memory_bytes=141e9,
)

GPUS = {machine.name: machine for machine in (H100, H200)}


@dataclass(frozen=True)
class HostFit:
    """What no rate of a host tells: fitted to a few runs.

    Attributes:
        math_share: what the products of a tile reach of a BLAS on one core.
        call_s: of a call, before and after its work.
        widen_s: of turning one 16-bit weight into fp32.
    """

    math_share: float
    call_s: float
    widen_s: float


def host(ranks: int, threads: int, cores: int, gemm_flops: float, read: float, fit: HostFit) -> Machine:
    """Ranks as processes of one host.

    Args:
        threads: of a rank.
        cores: that all ranks share.
        gemm_flops, read: what a BLAS and reading memory reach with all the cores.
    """
    memcpy = Wire(float("inf"), 1e-6)  # a worker copies rows itself, at its own rate
    copied = read / 4  # read, and written to memory that must be read first
    return Machine(
        name="host",
        source="a BLAS and reading memory in the same run; what else there is, fitted",
        workers=threads,
        math_flops=fit.math_share * gemm_flops / cores,
        memory_read=read,
        worker_read=read,
        cache_bytes=16e6,
        copy=copied,
        add=copied,
        near=memcpy,
        far=memcpy,
        ring_blocks=16,
        ranks_per_node=ranks,
        has_agents=False,
        cores=cores,
        tile_s=5e-6,
        widen_s=fit.widen_s,
        plan_s=fit.call_s,
        plan_pair_s=20e-9,
        plan_peer_s=2e-6,
    )
