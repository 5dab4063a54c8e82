"""Ranks that are processes: the layer over them, the arena, and the groups."""

import math
import time

import distributed_cases as cases
import pytest
import torch
import torch.distributed as dist
from gradient_case import assert_same_gradients, check_gradients, gradients
from layer_case import LayerCase
from rank_world import rank_world
from thread_ranks import make_team, on_ranks

import flashmoe
from flashmoe.settings import Settings

LIMITS = dict(max_tokens=64, max_wire_bytes=512, max_top_k=4, max_experts=32, timeout_s=20.0, entry_timeout_s=20.0)
GROUPS = [(0, 1), (2, 3), (0, 1, 2), (1, 2, 3), (0, 3)]


@pytest.fixture(scope="module")
def world():
    """Four ranks with groups of two, three and four of them. Tests leave it whole."""
    with rank_world(4, max_groups=8, num_workers=1, **LIMITS) as world:
        world.call(cases.make_groups, *GROUPS)
        yield world


# --- the layer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "ranks, tokens, problem",
    [
        ((0, 1), [7, 5], {}),
        ((2, 3), [64, 1], dict(top_k=1)),
        ((0, 1, 2), [4, 33, 9], {}),
        ((0, 1, 2, 3), [16, 3, 64, 8], dict(top_k=4)),
        ((0, 1, 2, 3), [5, 6, 7, 8], dict(owners=[3, 3, 1, 0, 1, 3, 3, 0, 0, 0, 3, 1])),  # rank 2 has no expert
        ((0, 3), [12, 20], dict(one_rank=1, dropped=True)),
        ((0, 1, 2, 3), [0, 20, 0, 0], dict(one_rank=2)),
        ((0, 1, 2, 3), [0, 0, 0, 0], {}),
    ],
    ids=["two", "k1", "three", "four", "rank without expert", "hot rank, dropped", "one has tokens", "no tokens"],
)
def test_right_and_bitwise_equal_to_one_process_and_to_threads(world, ranks, tokens, problem, dtype):
    world.call(cases.run_and_check, 3, ranks, tokens, ranks=ranks, dtype=dtype, threads=True, **problem)


def test_token_counts_change_every_call_with_nothing_between(world):
    calls = [[1, 2, 3, 4], [0, 0, 0, 9], [64, 0, 5, 0], [0, 0, 0, 0], [0, 1, 0, 0], [30, 64, 2, 7]] * 3
    world.call(cases.many_calls, 17, (0, 1, 2, 3), calls)


def test_groups_that_overlap(world):
    world.call(cases.overlapping_groups, (0, 1, 2), (1, 2, 3), 6)


def test_disjoint_groups_do_not_wait_for_each_other(world):
    world.start((2, 3), cases.run_and_check, 5, (2, 3), [8, 8])
    world.collect((2, 3))  # while ranks 0 and 1 have not even begun
    world.call(cases.run_and_check, 5, (0, 1), [8, 8], ranks=(0, 1))


def test_layers_share_a_group(world):
    world.call(cases.several_layers, (0, 1), 3, 4, ranks=(0, 1))


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_remote_only_gives_the_same_bits(world, seed):
    """Peers reached by delayed, reordered puts alone."""
    arguments = (9, (0, 1, 2), [10, 0, 33])
    with rank_world(3, remote_only=seed, **LIMITS) as remote:
        remote.call(cases.many_calls, seed, (0, 1, 2), [[4, 5, 6], [0, 7, 0], [64, 1, 0], [0, 0, 0], [2, 2, 2]] * 2)
        through_network = remote.call(cases.result_of, *arguments)
        assert remote.call(cases.arena)[0]["remote_only"] == seed
    for mine, theirs in zip(through_network, world.call(cases.result_of, *arguments, ranks=(0, 1, 2)), strict=True):
        assert torch.equal(mine, theirs)


# --- gradients ------------------------------------------------------------------------------------------------

GRADIENTS = {
    "uneven": ((40, 0, 13, 64), {"bias": True}),
    "bf16, skewed": ((64, 64, 9, 1), {"dtype": torch.bfloat16, "skew": "zipf", "top_k": 4}),
    "own placement": ((30, 5, 41, 8), {"num_experts": 9, "owners": (0, 0, 2, 2, 2, 0, 1, 1, 0), "skew": "some_dropped"}),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_right_and_those_of_threads(world, name):
    tokens, how = GRADIENTS[name]
    case = LayerCase(tokens=tokens, **how)
    found = world.call(cases.gradients_of, tokens, **how)
    check_gradients(case, found)
    threads = on_ranks(make_team(len(tokens)), lambda rank, group: gradients(case, rank, group))
    for one, other in zip(found, threads, strict=True):
        assert_same_gradients(one, other)


def test_init_may_leave_out_the_memory_for_gradients():
    with rank_world(2, backward=False, **LIMITS) as world:
        world.call(cases.run_and_check, 3, (0, 1), [7, 5])
        small = world.call(cases.arena)[0]
        for outcome in world.outcomes(cases.gradients_of, (7, 5)):
            assert outcome.kind == "ValueError" and "has no memory for backward calls" in outcome.error
    with rank_world(2, **LIMITS) as world:
        assert world.call(cases.arena)[0]["bytes"] > small["bytes"] and small["backward"] is False


# --- the arena and the groups ---------------------------------------------------------------------------------


def test_init_again_changes_nothing(world):
    for before, after in world.call(cases.init_twice_in_vain):
        assert before == after


def test_init_with_other_arguments_points_to_reserve(world):
    world.call(cases.run_and_check, 1, (0, 1, 2, 3), [1, 1, 1, 1])
    for outcome in world.outcomes(flashmoe.distributed.init, max_tokens=65):
        assert outcome.kind == "RuntimeError"
        assert "max_tokens=64" in outcome.error and "max_tokens=65" in outcome.error and "reserve()" in outcome.error
    world.call(cases.run_and_check, 1, (0, 1, 2, 3), [1, 1, 1, 1])


def test_arguments_must_agree(world):
    arguments = [{}, {}, dict(max_top_k=3), {}]
    for outcome in world.outcomes(cases.init_by_rank, arguments):
        assert outcome.kind == "ValueError"
        assert outcome.error == (
            "max_top_k must be equal on all ranks, got 4 on rank 0, 4 on rank 1, 3 on rank 2, 4 on rank 3"
        )


def test_one_ranks_bad_argument_is_everybodys(world):
    outcomes = world.outcomes(cases.init_by_rank, [{}, dict(max_tokens=0), {}, {}])
    text = "max_tokens must be an integer from 1 to 2^31 - 1, got 0"
    assert [outcome.kind for outcome in outcomes] == ["ValueError"] * 4
    assert [outcome.error for outcome in outcomes] == [f"rank 1: {text}", text, f"rank 1: {text}", f"rank 1: {text}"]


def test_init_and_reserve_do_not_mix(world):
    world.start((0, 1, 2), flashmoe.distributed.init)
    world.start((3,), flashmoe.distributed.reserve)
    for outcome in world.collect((0, 1, 2, 3)):
        assert outcome.kind == "ValueError" and "'reserve' on rank 3" in outcome.error


def test_reserve_grows_once_and_groups_come_back():
    with rank_world(2, max_groups=1, **{**LIMITS, "entry_timeout_s": 1.0}) as world:
        world.call(cases.run_and_check, 1, (0, 1), [4, 4])
        for outcome in world.outcomes(cases.run_and_check, 1, (0, 1), [65, 0]):
            assert outcome.kind in ("ValueError", "PeerError")
        # Rank 1 waits for rank 0, whose call was refused: only a new generation helps.
        before = world.call(cases.arena)
        world.call(flashmoe.distributed.reserve, max_tokens=100)
        after = world.call(cases.arena)
        assert after[0]["max_tokens"] == 100 and after[0]["max_top_k"] == 4
        assert after[0]["generation"] == before[0]["generation"] + 1 and after[0]["bytes"] > before[0]["bytes"]
        world.call(cases.run_and_check, 1, (0, 1), [100, 0])
        assert len(world.call(cases.segments_mapped)[0]) == 2, "the old arena must be let go"
        world.call(flashmoe.distributed.reserve, max_tokens=50)
        assert world.call(cases.arena)[0]["generation"] == after[0]["generation"]


def test_other_arguments_before_any_group_is_used():
    with rank_world(2, max_groups=1, **LIMITS) as world:
        world.call(flashmoe.distributed.init, max_tokens=10, max_groups=2)
        assert world.call(cases.arena)[1]["max_tokens"] == 10
        world.call(cases.run_and_check, 1, (0, 1), [10, 4])


def test_a_full_arena_names_max_groups_and_reserve_helps():
    with rank_world(3, max_groups=1, **LIMITS) as world:
        world.call(cases.make_groups, (0, 1), (1, 2), (0, 2))
        world.call(cases.join, (0, 1), ranks=(0, 1))
        outcomes = world.outcomes(cases.join, (1, 2), ranks=(1, 2))
        assert [outcome.kind for outcome in outcomes] == ["RuntimeError"] * 2
        assert all("max_groups" in outcome.error for outcome in outcomes)
        assert outcomes[1].error.startswith("rank 1: the arena is full")
        world.call(flashmoe.distributed.reserve, max_groups=3)
        world.call(cases.run_and_check, 2, (1, 2), [3, 3], ranks=(1, 2))
        world.call(cases.run_and_check, 2, (0, 1), [3, 3], ranks=(0, 1))


def test_ranks_that_wait_for_each_other_in_different_groups():
    with rank_world(2, max_groups=4, **LIMITS) as world:
        world.call(cases.make_groups, (0, 1), (1, 0))
        begin = time.monotonic()
        outcomes = world.outcomes(cases.join_by_rank, [(0, 1), (1, 0)])
        assert time.monotonic() - begin < 5
        assert [outcome.kind for outcome in outcomes] == ["PeerError"] * 2
        assert all("mismatched groups: rank " in outcome.error for outcome in outcomes)


def test_a_group_with_other_members_elsewhere():
    with rank_world(3, max_groups=4, **LIMITS) as world:
        outcomes = world.outcomes(cases.join_under_one_name, "g", [(0, 1), (0, 1, 2), (0, 1, 2)])
        assert [outcome.kind for outcome in outcomes] == ["PeerError"] * 3
        assert "mismatched groups: group 'g' is [0, 1] on rank 0 and [0, 1, 2] on rank 1" in outcomes[0].error


def test_init_waits_no_longer_than_it_may():
    with rank_world(2) as world:
        outcome = world.outcomes(flashmoe.distributed.init, ranks=(0,), entry_timeout_s=0.5)[0]
        assert outcome.kind == "PeerError" and "rank 0 waited 0.5 s for rank 1" in outcome.error
        assert outcome.seconds < 3
        # The other rank's first attempt meets one that was given up, and does not wait for it.
        late = world.outcomes(flashmoe.distributed.init, ranks=(1,))[0]
        assert late.kind == "PeerError" and late.error.startswith("rank 0 gave up") and late.seconds < 3
        world.call(flashmoe.distributed.init, **LIMITS)
        world.call(cases.run_and_check, 1, (0, 1), [3, 4])


def test_environment_variables():
    variables = {
        "FLASHMOE_TIMEOUT_S": "7.5",
        "FLASHMOE_ENTRY_TIMEOUT_S": "70",
        "FLASHMOE_REMOTE_ONLY": "3",
        "FLASHMOE_NUM_WORKERS": "2",
    }
    expected = {"timeout_s": 7.5, "entry_timeout_s": 70.0, "remote_only": 3, "num_workers": 2}
    with rank_world(2) as world:
        for name in variables:
            for outcome in world.outcomes(cases.init_with_environment, {name: "soon"}):
                assert outcome.kind == "ValueError" and name in outcome.error and "'soon'" in outcome.error
        for arena in world.call(cases.init_with_environment, variables, max_groups=1, max_tokens=8):
            assert {name: arena[name] for name in expected} == expected


def test_seconds_that_clocks_do_not_hold():
    """An endless deadline that wrapped would end every wait at once."""
    for seconds in (math.inf, 1e12, 1e300, math.nan, 0, True):
        for name in ("timeout_s", "entry_timeout_s"):
            with pytest.raises(ValueError, match=f"{name} must be a number of seconds above 0, at most 1e"):
                Settings().changed({name: seconds})
    assert Settings().changed({"timeout_s": 1e9}).timeout_s == 1e9


def test_finalize_and_init_again(world):
    world.call(cases.run_and_check, 1, (0, 1, 2, 3), [1, 2, 3, 4])
    world.call(flashmoe.distributed.finalize)
    assert world.call(cases.arena) == [None] * 4
    assert world.call(cases.segments_mapped) == [[]] * 4
    for outcome in world.outcomes(cases.join, (0, 1, 2, 3)):
        assert outcome.kind == "RuntimeError" and "call flashmoe.distributed.init()" in outcome.error
    world.call(flashmoe.distributed.init, max_groups=8, num_workers=1, **LIMITS)
    world.call(cases.run_and_check, 1, (0, 1, 2, 3), [1, 2, 3, 4])


def test_memory_goes_to_the_ranks_alone(world):
    mapped = world.call(cases.segments_mapped)
    assert len(mapped[0]) == 4 and all(inodes == mapped[0] for inodes in mapped)
    for listing in world.call(cases.descriptors_a_child_program_gets):
        assert listing and not any("memfd" in line for line in listing)


def test_a_forked_child_starts_afresh(world):
    world.call(cases.run_and_check, 1, (0, 1, 2, 3), [1, 2, 3, 4])
    assert world.call(cases.forked_child_starts_afresh) == [7] * 4
    world.call(cases.run_and_check, 1, (0, 1, 2, 3), [1, 2, 3, 4])


def test_group_arguments():
    with pytest.raises(TypeError, match="group must be a torch.distributed.ProcessGroup, got int"):
        flashmoe.distributed.group_name(3)
    with pytest.raises(ValueError, match="NON_GROUP_MEMBER"):
        flashmoe.distributed.group_name(dist.GroupMember.NON_GROUP_MEMBER)
    with pytest.raises(RuntimeError, match="group 'nobody'.*no process group"):
        flashmoe.distributed.group_of("nobody")
    with pytest.raises(RuntimeError, match="init.. first"):
        flashmoe.distributed.reserve(max_tokens=2)


def test_init_without_a_launcher_says_what_is_missing(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RuntimeError, match="lacks RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.*torchrun.*launch"):
        flashmoe.distributed.init()
    assert not flashmoe.distributed.is_initialized() and flashmoe.distributed.arena() is None
