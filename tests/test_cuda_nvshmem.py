"""Ranks that are GPUs, through NVSHMEM: here several processes on one card, which is slow and only meant to be right.

With MPS, or else by time slicing. Without a GPU all of it is skipped, and so it is, with the reason, where the driver or
NVSHMEM refuses several processes.
"""

import contextlib
import functools
import os
import signal
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from cuda_case import CudaCase, has_cuda, worst_error
from rank_world import RankWorld
from timeline_checks import check_rows_sent

import flashmoe
from flashmoe import groups, nvshmem, ops
from flashmoe.cuda_arena import build_cuda_arena
from flashmoe.rendezvous import Rendezvous
from flashmoe.settings import Settings


def missing() -> str:
    if not has_cuda():
        return "needs a GPU and a build with nvcc"
    if not nvshmem.is_built():
        return "needs a build with NVSHMEM's headers"
    try:
        nvshmem.library()
    except RuntimeError as error:
        return str(error)
    return ""


pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "nothing is missing")
LIMITS = {"max_tokens": 128, "max_wire_bytes": 2048, "max_top_k": 4, "max_experts": 16}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def start(timeout_s: float = 20.0) -> list[str]:
    """Every rank takes the first GPU, and its share of the multiprocessors: what runs at once must fit at once."""
    blocks = torch.cuda.get_device_properties(0).multi_processor_count
    os.environ["FLASHMOE_SM_MARGIN"] = str(blocks - blocks // dist.get_world_size())
    flashmoe.distributed.init(device="cuda:0", timeout_s=timeout_s, entry_timeout_s=timeout_s, **LIMITS)
    arena = flashmoe.distributed._world.arena
    return [str(rank) for rank in arena.ranks[dist.get_rank()]["unmapped"]]


@contextlib.contextmanager
def ranks_on_one_card(nproc: int, timeout_s: float = 20.0) -> Iterator[RankWorld]:
    world = RankWorld(nproc, patience_s=55.0)
    try:
        for outcome in world.outcomes(start, timeout_s):
            if outcome.error is not None and outcome.error.startswith("flashmoe: NVSHMEM"):
                pytest.skip(f"{nproc} processes on one card: {outcome.error}")
            assert outcome.error is None, outcome.story
            if outcome.value:
                pytest.skip(f"{nproc} processes on one card: the memory of rank {', '.join(outcome.value)} cannot be mapped")
        yield world
    finally:
        world.close()


def call(tokens: list[int], dtype: torch.dtype, layer: int = 0, seed: int = 0) -> tuple[torch.Tensor, CudaCase, slice]:
    """This rank's part of one layer: its tokens, and an equal block of the experts."""
    case, rank, size = CudaCase(tokens=sum(tokens), dtype=dtype, seed=seed), dist.get_rank(), dist.get_world_size()
    mine = slice(sum(tokens[:rank]), sum(tokens[: rank + 1]))
    experts = slice(case.experts * rank // size, case.experts * (rank + 1) // size)
    y = flashmoe.fused_moe(
        case.x[mine], case.ids[mine], case.weights[mine], case.gate_up[experts], case.down[experts],
        group=dist.group.WORLD, layer=layer,
    )  # fmt: skip
    return y, case, mine


def error_of_calls(tokens: list[int], dtype: torch.dtype) -> float:
    """The worst of the results; that repeats differ in no bit is checked here."""
    first, case, mine = call(tokens, dtype)
    for _ in range(3):
        assert torch.equal(call(tokens, dtype)[0], first), "bits differ on repeat"
    flashmoe.check()
    part = case.first(mine.stop)
    part.x, part.ids, part.weights = part.x[mine], part.ids[mine], part.weights[mine]
    return worst_error(first, part) / case.tolerance


def error_of_one_rank(dtype: torch.dtype) -> float:
    """A group of one, whose heap is NVSHMEM's: what init() makes only of several ranks."""
    settings = Settings(**LIMITS, timeout_s=20.0, device="cuda")
    rendezvous = Rendezvous(dist.PrefixStore("one", dist.distributed_c10d._get_default_store()), 0, [0], "come")
    arena = build_cuda_arena(rendezvous, settings, torch.device("cuda:0"))
    limits = settings.limits(1)
    group = arena.make_group("one", [0], 0, limits, [arena.take(limits.heap_bytes)], settings)
    case = CudaCase(dtype=dtype)
    y = ops._forward(
        functools.partial(group.call, "forward", dtype), 1, case.x, case.ids, case.weights, case.gate_up, case.down, None, None,
        None, case.activation, case.gated, 0,
    )  # fmt: skip
    torch.cuda.synchronize()
    assert group.failed is None
    nvshmem._end()
    assert not nvshmem.world().ready, "finalised"
    return worst_error(y, case) / case.tolerance


@DTYPES
def test_one_rank(dtype):
    world = RankWorld(1, patience_s=55.0)
    try:
        assert world.call(error_of_one_rank, dtype)[0] <= 1
    finally:
        world.close()


@pytest.mark.parametrize("nproc", [2, 4])
def test_several_processes_on_one_card(nproc):
    with ranks_on_one_card(nproc) as world:
        for dtype in (torch.float32, torch.bfloat16):
            for tokens in ([32] * nproc, [0, 33, 128, 1][:nproc], [128] * nproc):
                assert max(world.call(error_of_calls, tokens, dtype)) <= 1, (tokens, dtype)
        assert world.call(stats_of_a_layer) == world.call(rows_of_a_layer)


def stats_of_a_layer() -> list[int]:
    call([32] * dist.get_world_size(), torch.float32, layer=7)
    return groups.stats_of_call(dist.group.WORLD.group_name, 7)["tokens_per_expert"]


def rows_of_a_layer() -> list[int]:
    rank, size = dist.get_rank(), dist.get_world_size()
    case = CudaCase(tokens=32 * size, dtype=torch.float32)
    rows = torch.bincount(case.ids.flatten(), minlength=case.experts).tolist()
    return rows[case.experts * rank // size : case.experts * (rank + 1) // size]


def traced_call(tokens: list[int]) -> tuple[flashmoe.timeline.Trace, list[list[int]]]:
    """This rank's part of a timeline; and of all ranks the rows that each sends to each."""
    call(tokens, torch.float32)
    with flashmoe.trace(dist.group.WORLD) as trace:
        _, case, _ = call(tokens, torch.float32)
    owners = (case.ids * len(tokens) // case.experts).split(tokens)
    return trace, [[int((one == to).any(-1).sum()) for to in range(len(tokens))] for one in owners]


def test_timelines_of_processes_make_one():
    with ranks_on_one_card(2) as world:
        parts, rows = zip(*world.call(traced_call, [100, 33]), strict=True)
        trace = parts[0].gathered(parts)
        assert [rank.rank for rank in trace.ranks] == [0, 1] and trace.clock_error == 0, "one card, one clock"
        check_rows_sent(trace.ranks, rows[0])


def failing_call(layer: int = 0) -> bool:
    """Whether y is NaN; then check() raises why."""
    y, _, _ = call([32] * dist.get_world_size(), torch.float32, layer=layer)
    torch.cuda.synchronize()
    if not y.isnan().all():
        return False
    flashmoe.check()
    return True


def test_a_rank_that_is_killed_and_one_that_is_left():
    with ranks_on_one_card(2, timeout_s=3.0) as world:
        assert max(world.call(error_of_calls, [32, 32], torch.float32)) <= 1
        world.signal(1, signal.SIGKILL)
        world.processes[1].join()
        failed = world.outcomes(failing_call, ranks=[0])[0]
        assert failed.kind == "PeerError" and "The process of rank 1 has ended" in failed.error, failed
        again = world.outcomes(start, ranks=[0])[0]
        assert again.kind == "PeerError" and "rank 1 has ended" in again.error, again


def test_a_rank_that_never_calls_and_a_new_arena():
    with ranks_on_one_card(2, timeout_s=3.0) as world:
        world.call(error_of_calls, [8, 8], torch.float32)
        failed = world.outcomes(failing_call, ranks=[0])[0]
        assert failed.kind == "PeerError" and "packet header of rank 1" in failed.error, failed
        world.call(start, 20.0)
        assert max(world.call(error_of_calls, [32, 32], torch.float32)) <= 1


def test_ranks_that_call_different_layers():
    with ranks_on_one_card(2, timeout_s=5.0) as world:
        world.call(error_of_calls, [8, 8], torch.float32)
        world.start([0], failing_call, 1)
        world.start([1], failing_call, 2)
        outcomes = world.collect([0, 1])
        assert [outcome.kind for outcome in outcomes] == ["PeerError"] * 2, outcomes
        assert any("is calling another layer" in outcome.error for outcome in outcomes)
