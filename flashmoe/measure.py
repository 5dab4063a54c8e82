"""Timing several ways of doing the same work on all ranks, in turns, so that a noisy machine is unfair to none."""

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from . import _C

_PAUSE_S = 0.005  # before each turn: threads of the one before may still spin
_TURN_S = 0.004  # shorter calls are repeated until a turn lasts about this long
_REPORT_S = 5.0
_PATIENCE = timedelta(seconds=60)  # of ranks that have something to agree on
_GEMM_SIZE = 2048
_READ_BYTES = 256 << 20
_COPY_BYTES = 64 << 20
_GPU_GEMM_SIZE, _GPU_COPY_BYTES = 8192, 1 << 30


class Ranks:
    """What the measuring code asks of the other ranks; a process without a torch world is alone."""

    def __init__(self, alone: bool = False) -> None:
        alone = alone or not dist.is_initialized()
        self.rank, self.size = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())

    def barrier(self) -> None:
        if self.size > 1:
            dist.all_reduce(torch.zeros(1))  # on the CPU, also where torch's world has a backend for GPUs

    def slowest(self, seconds: Sequence[float]) -> list[float]:
        """Element by element, the maximum over ranks."""
        if self.size == 1:
            return list(seconds)
        maximum = torch.tensor(seconds, dtype=torch.float64)
        dist.all_reduce(maximum, dist.ReduceOp.MAX)
        return maximum.tolist()

    def collect(self, rows: torch.Tensor) -> torch.Tensor | None:
        """Everybody's ``rows`` [n, ...], one rank after the other, on rank 0; equal shapes on all ranks. They travel
        between CPUs."""
        if self.size == 1:
            return rows
        sent = rows.cpu().contiguous()
        parts = [torch.empty_like(sent) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(sent, parts)
        return torch.cat(parts).to(rows.device) if parts else None

    def collect_objects(self, value: Any) -> list[Any] | None:
        """Everybody's ``value`` on rank 0, by rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values)
        return values

    def everybodys(self, value: Any) -> list[Any]:
        """Everybody's ``value``, by rank, on every rank.

        Raises:
            RuntimeError: some rank does not come, since it waits for others elsewhere.
        """
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=_agreement(dist.group.WORLD))
        return values

    def told(self, value: Any) -> Any:
        """Rank 0's ``value``, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]


@functools.cache
def _agreement(world: Any) -> Any:
    """A group of all ranks of its own: who waits there is not taken for one who waits in another's exchange."""
    return dist.new_group(backend="gloo", timeout=_PATIENCE)


Clock = Callable[[Callable[[], Any]], float]


@dataclass
class Contender:
    """One way of doing the work.

    Attributes:
        call: does it ``calls`` times; None on a rank that has no part in it.
        threads: what torch is told to use on this rank meanwhile.
        calls: more than one where a CUDA graph is replayed.
        samples: seconds of each timed call, the slowest rank's.
        turns: medians of the samples of each turn, by the number of the round.
    """

    name: str
    call: Callable[[], Any] | None
    threads: int
    calls: int = 1
    samples: list[float] = field(default_factory=list)
    turns: dict[int, float] = field(default_factory=dict)

    def time_once(self, clock: Clock) -> float:
        """Seconds of one of the calls."""
        return 0.0 if self.call is None else clock(self.call) / self.calls


def host_seconds(call: Callable[[], Any]) -> float:
    """Until all that it has queued on GPUs is done."""
    _finish_queued_work()
    start = time.perf_counter()
    call()
    _finish_queued_work()
    return time.perf_counter() - start


def take_turns(
    contenders: list[Contender],
    ranks: Ranks,
    iterations: int,
    warmup: int,
    seconds: float,
    report: Callable[[str], None] = lambda text: None,
    clock: Clock = host_seconds,
) -> None:
    """Fill in each contender's samples: ``iterations`` rounds in which each of them has its turn.

    The first one also has a turn in every round in which another has one, so that each can be compared with it.

    A contender that would take more than its equal share of ``seconds`` sits out rounds, evenly spread, but is
    sampled at least three times, or once if a single call takes longer than its share. ``report`` hears of progress
    every few seconds. ``clock`` makes a call and says how long it took.
    """
    share, told = seconds / len(contenders), time.monotonic()
    plans = []
    for contender in contenders:
        torch.set_num_threads(contender.threads)
        estimate, spent = math.inf, 0.0
        for _ in range(max(1, warmup)):
            ranks.barrier()
            elapsed = ranks.slowest([contender.time_once(clock) * contender.calls])[0]
            estimate, spent = min(estimate, elapsed), spent + elapsed
            if spent > share / 2:
                break
        at_least = 3 if estimate <= share else 1
        turns = max(min(iterations, at_least), min(iterations, int(share / max(estimate, _TURN_S))))
        plans.append((contender, turns, min(10, math.ceil(_TURN_S / max(estimate, 1e-6)))))
    for number in range(iterations):
        if time.monotonic() - told > _REPORT_S:
            report(f"timing: round {number + 1} of {iterations}")
            told = time.monotonic()
        due = [plan for plan in plans if (number + 1) * plan[1] // iterations > number * plan[1] // iterations]
        if due and plans[0] not in due:
            due.insert(0, plans[0])
        for contender, _, burst in due:
            _take_turn(contender, ranks, number, burst, clock)


def _take_turn(contender: Contender, ranks: Ranks, number: int, burst: int, clock: Clock) -> None:
    torch.set_num_threads(contender.threads)
    time.sleep(_PAUSE_S)
    if burst > 1:  # a short call would pay for the caches that the others have filled
        contender.time_once(clock)
    samples = []
    for _ in range(burst):
        ranks.barrier()
        samples.append(contender.time_once(clock))
    samples = ranks.slowest(samples)
    contender.samples.extend(samples)
    contender.turns[number] = quantile(samples, 0.5)


def quantile(values: Sequence[float], share: float) -> float:
    """Linear between the two nearest of the sorted values."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, 95th percentile, quartiles and count."""
    return {
        "p50": quantile(values, 0.5),
        "p95": quantile(values, 0.95),
        "quartiles": [quantile(values, 0.25), quantile(values, 0.75)],
        "samples": len(values),
    }


def speedup(ours: Contender, other: Contender) -> dict[str, Any]:
    """How many times as fast ours is: median and quartiles of the ratios round by round."""
    ratios = [other.turns[number] / ours.turns[number] for number in other.turns if number in ours.turns]
    return {
        "ratio": quantile(ratios, 0.5),
        "ratio_quartiles": [quantile(ratios, 0.25), quantile(ratios, 0.75)],
    }


def gemm(threads: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Contender, int]:
    """A square product by torch's BLAS, on the CPU in float32 and on a GPU in ``dtype``, and its floating-point
    operations."""
    size, dtype = (_GEMM_SIZE, torch.float32) if device == "cpu" else (_GPU_GEMM_SIZE, dtype)
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    out = torch.empty(size, size, device=device, dtype=dtype)
    return Contender("pure GEMM", lambda: torch.mm(left, right, out=out), threads), 2 * size**3


def reading(threads: int, device: str = "cpu") -> tuple[Contender, int]:
    """Reading memory that no cache holds, with ``threads`` threads, and its bytes; on a GPU a copy, which reads and
    writes as many."""
    if device != "cpu":
        source = torch.ones(_GPU_COPY_BYTES, dtype=torch.uint8, device=device)
        to = torch.empty_like(source)
        return Contender("pure reading", lambda: to.copy_(source), threads), 2 * _GPU_COPY_BYTES
    memory = torch.ones(_READ_BYTES, dtype=torch.uint8)
    return Contender("pure reading", lambda: _C.read_memory(memory.data_ptr(), _READ_BYTES, threads), threads), _READ_BYTES


def linking(threads: int, device: str, ranks: Ranks) -> tuple[Contender, int]:
    """What ranks can send each other at one time, and the bytes that leave each of them: on CPUs copying memory that no
    cache holds, as a put into mapped memory does; on GPUs torch's all-to-all."""
    if device != "cpu":
        part = _COPY_BYTES // ranks.size
        sent = torch.ones(part * ranks.size, dtype=torch.uint8, device=device)
        received = torch.empty_like(sent)
        return Contender("pure sending", lambda: dist.all_to_all_single(received, sent), threads), part * (ranks.size - 1)
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8)
    to = torch.empty_like(source)
    return Contender("pure sending", lambda: to.copy_(source), threads), _COPY_BYTES


def _finish_queued_work() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
