"""Ranks that are GPUs: how they agree, share memory, fail and end. Here GPUs and NVSHMEM are fakes, the ranks real."""

import contextlib
import gc
import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from fake_gpus import Team, World, install
from rank_world import RankWorld, rank_world

import flashmoe
from flashmoe import groups, nvshmem

SMALL = {"max_tokens": 16, "max_wire_bytes": 256, "max_experts": 8, "timeout_s": 10.0, "entry_timeout_s": 10.0}


@contextlib.contextmanager
def gpu_world(nproc: int, plans: dict[int, dict] | None = None, **both: object) -> Iterator[RankWorld]:
    """Ranks that believe in GPUs; ``plans``: what a rank's ``install`` gets besides ``both``."""
    with rank_world(nproc) as world:
        for rank in range(nproc):
            world.call(install, ranks=[rank], **both, **(plans or {}).get(rank, {}))
        yield world


def start(**options: object) -> dict:
    flashmoe.distributed.init(**{"device": "cuda", **SMALL, **options})
    return flashmoe.distributed.arena()


def join(members: list[int]) -> dict | None:
    """What this rank's team was made of."""
    group = dist.group.WORLD if len(members) == dist.get_world_size() else dist.new_group(members)
    if dist.get_rank() not in members:
        return None
    handle = groups.find(groups.name_of(group))
    assert handle.team is Team.made[-1] and handle.device == torch.device("cuda", handle.team.device)
    kept = ("device", "ep_rank", "global_ranks", "mapped", "symmetric", "pes", "stage", "stage_bytes")
    return {"heap_bytes": handle.limits.heap_bytes, **{name: getattr(handle.team, name) for name in kept}}


def state() -> dict:
    gc.collect()
    one = World.one
    return {"freed": one.freed, "idle": one.idle(), "calls": one.calls, "abandoned": one.abandoned, "ready": one.ready}


def let_go() -> None:
    Team.made.clear()
    gc.collect()


def fail(text: str) -> None:
    Team.made[-1].answer = text


def test_groups_take_their_heaps_at_offsets_of_their_own():
    with gpu_world(3) as world:
        arenas = world.call(start)
        assert [arena["device"] for arena in arenas] == ["cuda:0", "cuda:1", "cuda:2"]
        assert world.call(start) == arenas, "a second time changes nothing"
        small = world.call(join, [0, 1])
        assert small[2] is None
        large = world.call(join, [0, 1, 2])
        page = -(-small[0]["heap_bytes"] // 4096) * 4096
        offsets = [page, page, 0]  # rank 2 was not in the first group
        for rank, team in enumerate(large):
            assert (team["device"], team["ep_rank"], team["pes"]) == (rank, rank, [0, 1, 2])
            base = team["symmetric"][2]  # every arena begins at one address
            assert team["symmetric"] == [base + offset for offset in offsets]
            mapped = [base + (0x100_0000_0000 * (peer + 1) if peer != rank else 0) for peer in range(3)]
            assert team["mapped"] == [place + offset for place, offset in zip(mapped, offsets, strict=True)]
            assert team["stage"] == 0, "all are mapped"
        calls = world.call(state)[0]["calls"]
        assert [call.split()[0] for call in calls] == ["initialize", "allocate"], "groups are made without collectives"


def test_peers_that_cannot_be_mapped_are_sent_to_from_a_stage():
    with gpu_world(3, {0: {"unmapped": (2,)}, 2: {"unmapped": (0, 1)}}) as world:
        world.call(start)
        pair = world.call(join, [0, 1])
        assert pair[0]["stage"] == pair[1]["stage"] == 0
        teams = world.call(join, [0, 1, 2])
        assert [[bool(place) for place in team["mapped"]] for team in teams] == [[1, 1, 0], [1, 1, 1], [0, 0, 1]]
        assert teams[1]["stage"] == 0
        assert teams[0]["stage"] == teams[2]["stage"] != 0 and teams[0]["stage_bytes"] == 3000


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"kernels": False}, "this build has no kernels that reach it otherwise"),
        ({"ibgda": "1"}, "NVSHMEM_IB_ENABLE_IBGDA must not be set"),
    ],
)
def test_network_that_the_kernels_cannot_use_is_refused_on_every_rank(plan, message):
    with gpu_world(2, {0: {"unmapped": (1,)} | plan, 1: {"unmapped": (0,)}}) as world:
        for outcome in world.outcomes(start):
            assert outcome.kind == "RuntimeError" and message in outcome.error
    with gpu_world(2, {0: plan}) as world:  # where all is mapped, nobody asks
        world.call(start)


def test_all_ranks_are_of_one_kind():
    with gpu_world(2) as world:
        world.start([0], flashmoe.distributed.init, device="cpu")
        world.start([1], flashmoe.distributed.init, device="cuda")
        for outcome in world.collect([0, 1]):
            assert (outcome.kind, outcome.error) == (
                "ValueError", "device must be equal on all ranks, got 'cpu' on rank 0, 'cuda' on rank 1"
            )  # fmt: skip


def test_a_rank_without_a_gpu_ends_the_attempt_of_all():
    with gpu_world(2, {1: {"gpus": 0}}) as world:
        for outcome in world.outcomes(start):
            assert outcome.kind == "RuntimeError" and "device='cuda' needs a GPU" in outcome.error
        world.call(install, ranks=[1])
        world.call(start)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"version": "3.8.0"}, "NVSHMEM must be the same on all ranks, got version: 3.7.2 on rank 0, 3.8.0 on rank 1"),
        ({"state": "initialised by somebody else"}, "got state: not initialised on rank 0, initialised by somebody else on"),
        ({"state": "finalised"}, "rank 1: NVSHMEM is finalised"),
        ({"free": 2**16}, "MiB asked on cuda:1 of"),
        ({"exhausted": 1}, "bytes of symmetric memory left on PE 1"),
    ],
)
def test_what_one_rank_lacks_all_are_told(plan, message):
    with gpu_world(2, {1: plan}) as world:
        for outcome in world.outcomes(start):
            assert outcome.kind == "RuntimeError" and message.removeprefix("rank 1: ") in outcome.error
        world.call(install)
        world.call(start)
        assert [seen["freed"] for seen in world.call(state)] == [[], []]


def test_memory_is_looked_for_before_it_is_allocated():
    with gpu_world(2, gpus=1) as world:
        need = world.call(start)[0]["bytes"]
    with gpu_world(2, gpus=1, free=2 * need - 1) as world:
        for outcome in world.outcomes(start):
            assert "for each of the 2 ranks that share it asked on cuda:0" in outcome.error
    with gpu_world(2, {0: {"unmapped": (1,)}}, free=need) as world:
        for outcome in world.outcomes(start):
            assert outcome.kind == "RuntimeError" and "memory to send from: 0 MiB asked on cuda:0 of" in outcome.error
        assert [seen["calls"][-1] for seen in world.call(state)] == [f"allocate {need}"] * 2


def test_memory_goes_when_all_have_let_go_of_it():
    with gpu_world(2) as world:
        world.call(start)
        world.call(join, [0, 1])
        before = world.call(join, [0, 1])[0]["mapped"]
        world.call(flashmoe.distributed.reserve, max_tokens=32)
        after = world.call(join, [0, 1])[0]["mapped"]
        assert not set(before) & set(after), "fresh addresses"
        assert [seen["freed"] for seen in world.call(state)] == [[], []], "the old teams are still held, here"
        world.call(let_go)
        world.call(flashmoe.distributed.reserve, max_tokens=64)
        assert [seen["freed"] for seen in world.call(state)] == [[1, 2], [1, 2]]


def test_after_a_failure_init_makes_a_new_arena_and_frees_nothing():
    with gpu_world(2) as world:
        world.call(start)
        world.call(join, [0, 1])
        world.call(fail, "no progress", ranks=[1])
        outcome = world.outcomes(flashmoe.check, ranks=[1])[0]
        assert (outcome.kind, outcome.error) == ("PeerError", "no progress")
        world.call(let_go)
        generations = [arena["generation"] for arena in world.call(start)]
        assert generations == [2, 2]
        world.call(join, [0, 1])
        world.call(flashmoe.distributed.reserve, max_tokens=32)
        assert all(1 not in seen["freed"] for seen in world.call(state))
        world.call(nvshmem._end)
        assert all("finalize" not in seen["calls"] for seen in world.call(state))


@pytest.mark.parametrize("call", ["initialize", "allocate"])
def test_a_rank_that_dies_within_the_library_leaves_nobody_there(call):
    with gpu_world(3, {1: {"dies_in": call}}) as world:
        world.start([0, 1, 2], start)
        for outcome in world.collect([0, 2]):
            assert outcome.kind == "PeerError" and outcome.seconds < 5, outcome.story
        for seen in world.call(state, ranks=[0, 2]):
            assert seen["abandoned"] and not seen["ready"]
        world.call(nvshmem._end, ranks=[0, 2])


def test_a_peer_that_has_ended_is_named():
    with gpu_world(2) as world:
        world.call(start)
        world.call(join, [0, 1])
        world.kill(1)
        world.processes[1].join()
        world.call(fail, "no progress.", ranks=[0])
        outcome = world.outcomes(flashmoe.check, ranks=[0])[0]
        assert outcome.error == "no progress. The process of rank 1 has ended."
        again = world.outcomes(start, ranks=[0])[0]
        assert again.kind == "PeerError" and "rank 1 has ended while rank 0 waited" in again.error


def destroy_torchs_world() -> None:
    dist.destroy_process_group()


@pytest.mark.parametrize("before", [[], [flashmoe.distributed.finalize], [destroy_torchs_world]], ids=["", "ours", "torch's"])
def test_finalised_once_in_any_order_with_torch(before):
    with gpu_world(2) as world:
        world.call(start)
        for step in before:
            world.call(step)
        world.call(nvshmem._end)
        world.call(nvshmem._end)
        for seen in world.call(state):
            assert seen["calls"][-1] == "finalize" and seen["calls"].count("finalize") == 1


def test_a_rank_that_ends_alone_waits_a_moment_and_finalises_nothing():
    with gpu_world(2) as world:
        world.call(start)
        outcome = world.outcomes(nvshmem._end, ranks=[0])[0]
        assert outcome.error is None and outcome.seconds < 4
        assert "finalize" not in world.call(state, ranks=[0])[0]["calls"]


def call_on_the_cpu() -> None:
    join([0, 1])
    x = torch.randn(2, 8)
    flashmoe.fused_moe(
        x, torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), torch.randn(1, 8, 8), torch.randn(1, 8, 4),
        group=dist.group.WORLD,
    )  # fmt: skip


def test_tensors_must_lie_where_the_rank_is():
    with gpu_world(2) as world:
        world.call(start)
        for rank, outcome in enumerate(world.outcomes(call_on_the_cpu)):
            assert outcome.kind == "ValueError", outcome.story
            assert outcome.error.startswith(f"x must be on cuda:{rank}, where this rank of group")


def traced_call() -> tuple[flashmoe.timeline.Trace, str]:
    """What was noted while this rank's group was traced, and how a second trace meanwhile was refused."""
    join(list(range(dist.get_world_size())))
    team = Team.made[-1]
    with flashmoe.trace(dist.group.WORLD, max_events=9) as trace:
        assert team.max_events == 9
        with pytest.raises(RuntimeError) as refused, flashmoe.trace(dist.group.WORLD):
            pass
    assert team.max_events == 0
    return trace, str(refused.value)


@pytest.mark.parametrize("nproc", [2, 3])
def test_each_rank_has_the_timeline_of_its_gpu_and_all_make_one(nproc):
    with gpu_world(nproc) as world:
        world.call(start)
        parts, refusals = zip(*world.call(traced_call), strict=True)
    for rank, part in enumerate(parts):
        (one,) = part.ranks
        assert (one.rank, one.clock, one.lanes) == (rank, f"GPU gpu-{rank}", [f"SM {17 + rank}, block 0"])
        assert one.workers[0]["begin"].min() == 1000 + rank * 10**9
        assert refusals[rank].startswith("trace: group '") and "is being traced already" in refusals[rank]
    trace = parts[0].gathered(parts)
    if nproc == 2:
        assert [int(one.workers[0]["begin"].min()) for one in trace.ranks] == [1000, 1000], "seconds apart before"
        assert trace.clock_error == pytest.approx(20e-9)
    else:  # no two of them have sent both ways
        assert math.isinf(trace.clock_error) and trace.summary()["clock_error"] is None


def test_a_world_of_one_needs_no_nvshmem():
    with gpu_world(1) as world:
        assert world.call(start)[0]["device"] == "cuda:0"
        assert world.call(nvshmem.is_built) == [True] and world.call(made_nothing) == [True]


def made_nothing() -> bool:
    return World.one is None and nvshmem._world is None


def test_a_named_device_and_the_kept_one():
    with gpu_world(2) as world:
        assert world.call(start, device="cuda:5")[0]["device"] == "cuda:5"
        assert world.call(start, device=None)[1]["device"] == "cuda:5"
        world.call(flashmoe.distributed.reserve, max_tokens=32)
        assert [arena["device"] for arena in world.call(flashmoe.distributed.arena)] == ["cuda:5", "cuda:5"]
        assert "got cuda:9" in world.outcomes(start, device="cuda:9")[0].error
