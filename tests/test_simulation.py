"""The simulation does what the protocol says: rows, bytes, order, limits; and it is held against measured runs."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from flashmoe.models import SHAPES
from flashmoe.records import read_records
from flashmoe.simulation import measured, row_blocks, validation
from flashmoe.simulation.machine import H100, H200, HostFit, Wire, host
from flashmoe.simulation.memory import DoesNotFit, check_memory
from flashmoe.simulation.packets import CHUNK_SLOTS, plan
from flashmoe.simulation.scenario import Scenario, simulate
from flashmoe.simulation.tiles import BLOCK_ROWS, HOST, SM80_TF32, SM90_NARROW, SM90_WIDE, choose_engine
from flashmoe.simulation.workload import Skew, Workload, draw, with_capacity
from flashmoe.simulation.world import World

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
SMALL = SHAPES["qwen3-30b-a3b"].scaled(4)
FIT = HostFit(math_share=0.9, call_s=3e-4, widen_s=4e-11)


def workload(
    ranks: int, tokens: int = 96, experts: int = 32, top_k: int = 4, skew: str = "uniform", seed: int = 0, **uneven
):
    ids = tuple(draw(tokens, experts, top_k, Skew.parse(skew), rank=rank, seed=seed) for rank in range(ranks))
    return Workload(ids, ranks, experts, **uneven)


class Watched(World):
    """Follows what is done, and complains of what the protocol forbids."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.tiles = {"up": [], "down": []}

    def _work(self, now, end, kind, done, player, *what):
        super()._work(now, end, kind, done, player, *what)
        rank = player.rank
        assert len(rank.sequence_of) <= rank.ring_blocks <= self.machine.ring_blocks
        if kind == "up":
            block = what[1]
            blocks = rank.blocks
            for run in range(blocks.run_begin[block], blocks.run_begin[block + 1]):
                source = blocks.run_source[run]
                assert source < rank.known
                assert source == 0 or rank.chunks_here[source] >= blocks.run_chunks[run]
            assert len(rank.down_queue) * rank.down_tiles == rank.down_head  # no down tile waits
            self.tiles["up"].append((rank.index, block))
        elif done == self._down_written:
            assert rank.up_left[what[1]] == 0
            self.tiles["down"].append((rank.index, what[1]))


@pytest.mark.parametrize("ranks, skew", [(1, "uniform"), (3, "zipf:1.2"), (4, "hot:6"), (8, "uniform")])
@pytest.mark.parametrize("machine", [H100, host(8, 2, 4, 130e9, 24e9, FIT)], ids=["gpu", "host"])
def test_every_row_is_computed_once_and_in_the_protocols_order(machine, ranks, skew):
    work = workload(ranks, skew=skew)
    world = Watched(work, SMALL, machine, "bf16")
    outcome = world.run()
    assert sum(rank.rows for rank in outcome.ranks) == sum(ids.size for ids in work.ids)
    for kind, tiles in (("up", world.engine.up_tiles(SMALL)), ("down", world.engine.down_tiles(SMALL))):
        done = world.tiles[kind]
        assert len(done) == tiles * sum(rank.blocks for rank in outcome.ranks)
        assert all(done.count(block) == tiles for block in set(done))
    for player in world.players:
        assert not player.memory.in_use and not player.rank.held and set(player.rank.rows_missing) <= {0}


def test_row_blocks_are_the_canonical_lists_cut():
    work = workload(3, tokens=200, experts=7, skew="zipf:1")
    plans = [plan(work, rank) for rank in range(3)]
    for rank in range(3):
        blocks = row_blocks.row_blocks(work, plans, rank)
        begin = work.rank_begin[rank]
        for expert, (first, last) in enumerate(pairwise(blocks.expert_begin)):
            expected = []  # (source, row among its results) of the canonical list
            for i in range(3):
                segment = plans[(rank + i) % 3].segment_row[begin + expert : begin + expert + 2]
                expected += [(i, row) for row in range(*segment)]
            rows = [
                (blocks.run_source[run], blocks.run_row[run] + i)
                for run in range(blocks.run_begin[first], blocks.run_begin[last]) for i in range(blocks.run_rows[run])
            ]  # fmt: skip
            assert rows == expected
            assert blocks.rows[first:last] == [
                min(BLOCK_ROWS, len(expected) - at) for at in range(0, len(expected), BLOCK_ROWS)
            ]


def test_a_token_travels_once_to_each_rank():
    work = workload(4, tokens=300, top_k=8)
    one = plan(work, 1)
    owners = work.ids[1] // 8
    for rank in range(4):
        visitors = np.flatnonzero((owners == rank).any(axis=1))
        assert one.num_slots[rank] == (0 if rank == 1 else len(visitors))
        rows = slice(one.segment_row[8 * rank], one.segment_row[8 * rank + 8])
        slots = dict(zip(one.row_token[rows].tolist(), one.row_slot[rows].tolist(), strict=True))
        if rank != 1:
            assert sorted(slots.values()) == list(range(len(visitors)))
            by_row = one.row_slot[rows]
            first = [int(slot) for at, slot in enumerate(by_row) if slot not in by_row[:at]]
            assert first == sorted(first)  # in the order in which experts need them
    assert one.num_chunks[0] == -(-one.num_slots[0] // CHUNK_SLOTS)


@pytest.fixture(scope="module")
def records():
    found = [record for folder in (RESULTS, RESULTS / "scale") for record in read_records(folder)]
    return {record.name: record for record in found if record.passes == "forward"}


@pytest.mark.parametrize("name", ["mixtral-4.w2.t512.fp32", "qwen3.w2.t512.fp32", "qwen3.w4.t256.fp32"])
def test_bytes_and_rows_are_those_that_the_transport_counted(records, name):
    record = records[name]
    try:
        work = measured.workload_of(record)
    except ValueError as other_text:
        pytest.skip(str(other_text))
    outcome = World(work, measured.shape_of(record), measured.host_of(record, FIT), record.data["run"]["dtype"]).run()
    assert [rank.rows for rank in outcome.ranks] == record.data["rows_computed"]
    for index, (rank, counted) in enumerate(zip(outcome.ranks, record.data["bytes_per_peer"], strict=True)):
        for kind, by_offset in rank.sent.items():
            by_peer = [by_offset[(peer - index) % len(by_offset)] for peer in range(len(by_offset))]
            assert by_peer == counted[kind], (index, kind)


def test_committed_comparison_is_what_the_simulation_says_now(records):
    committed = json.loads((RESULTS / "scale.json").read_text())["validation"]
    fit = HostFit(**committed["fit"])
    compared = {one["name"]: one for one in committed["runs"]}
    assert set(compared) == set(records)
    held_out = [one for one in compared.values() if not one["fitted"]]
    assert {1, 2, 4} == {one["ranks"] for one in held_out}
    assert all(abs(one["error"]) < 0.15 for one in held_out)
    for name in ("paper.w2.t512.fp32", "mixtral-4.w1.t16.fp16"):
        try:
            again = validation.compare([records[name]], fit)[0]
        except ValueError as other_text:
            pytest.skip(str(other_text))
        if "skipped" in again:
            pytest.skip(again["skipped"])
        assert again["simulated_s"] == pytest.approx(compared[name]["simulated_s"], rel=1e-6)


def test_fit_finds_the_numbers_that_made_the_runs(records):
    """Of runs that took just what the simulation says."""
    truth = HostFit(math_share=0.8, call_s=2e-4, widen_s=8e-11)
    made = []
    for name in validation.FITTED.values():
        record = records[name]
        try:
            seconds = measured.simulated_seconds(record, measured.workload_of(record), truth)
        except ValueError as other_text:
            pytest.skip(str(other_text))
        data = record.data | {"latency": record.data["latency"] | {"p50": seconds}}
        made.append(replace(record, data=data))
    fit = validation.fit_host(made)
    assert fit.math_share == pytest.approx(truth.math_share, rel=0.01)
    assert fit.call_s == pytest.approx(truth.call_s, rel=0.05)
    assert fit.widen_s == pytest.approx(truth.widen_s, rel=0.05)


def test_one_worker_takes_the_sum_of_its_tiles():
    machine = replace(host(1, 1, 1, 100e9, 1e15, FIT), plan_s=0, plan_pair_s=0, tile_s=0)
    work = workload(1, tokens=256)
    outcome = World(work, SMALL, machine, "fp32").run()
    flops = SMALL.flops(256 * 4)
    assert outcome.seconds == pytest.approx(flops / (0.9 * 100e9), rel=1e-3)


def test_free_wires_leave_the_computation():
    scenario = Scenario(SHAPES["mixtral-8x7b"], H100, 8, 4096)
    free = World(scenario.workload(), scenario.shape, H100.with_free_wires(), "bf16").run()
    bytes_per_flop = (256 + 128) * 2 / (2 * 256 * 128)  # of a wide tile out of L2, which bounds it
    bound = free.flops / 8 * max(bytes_per_flop / H100.cache_read, 1 / (132 * H100.math_flops))
    assert bound < free.seconds < 1.25 * bound * free.busiest_rank


def test_decode_takes_as_long_as_reading_the_weights():
    scenario = Scenario(SHAPES["mixtral-8x7b"], H100, 1, 1)
    seconds = simulate(scenario)["seconds"]
    floor = 2 * 2 * scenario.shape.expert_elements / H100.memory_read
    assert floor < seconds < 1.2 * floor


def test_wires_bound_a_call_that_has_little_to_compute():
    slow_wire = replace(H100, near=Wire(1e9, 2e-6))
    found = simulate(Scenario(SMALL, slow_wire, 8, 1024))
    assert found["wire_seconds"] < found["seconds"] < 1.2 * found["wire_seconds"] + found["seconds_with_free_wires"]
    assert found["hidden_share"] < 0.5


def test_more_bandwidth_or_more_workers_never_hurt_much():
    scenario = Scenario(SMALL, H100, 8, 1024)
    base = simulate(scenario)["seconds"]
    assert simulate(replace(scenario, machine=replace(H100, near=Wire(1e12, 2e-6))))["seconds"] < 1.02 * base
    assert simulate(replace(scenario, machine=replace(H100, workers=16)))["seconds"] > base


def test_same_seed_same_answer_and_another_seed_another():
    scenario = Scenario(SMALL, H100, 4, 256, skew=Skew("zipf", 0.5))
    assert simulate(scenario) == simulate(scenario)
    assert simulate(scenario)["seconds"] != simulate(replace(scenario, seed=1))["seconds"]


@pytest.mark.parametrize("change, added", [({"late_s": 3e-4}, 3e-4), ({"slow": 3.0}, None)])
def test_a_straggler_delays_the_others_by_no_more_than_it_is_late(change, added):
    scenario = Scenario(SMALL, H100, 8, 1024)
    even, uneven = simulate(scenario)["seconds"], simulate(replace(scenario, **change))["seconds"]
    alone = 3 * even if added is None else even + added
    assert even < uneven < 1.1 * alone
    if added is not None:
        assert uneven > added


def test_skew_costs_no_more_than_the_busiest_rank_says():
    scenario = Scenario(SHAPES["qwen3-30b-a3b"], H100, 8, 2048, follow=8)
    even, hot = simulate(scenario), simulate(replace(scenario, skew=Skew.parse("hot:16")))
    assert hot["busiest_rank"] > 1.5
    assert even["seconds"] < hot["seconds"] < 1.2 * hot["busiest_rank"] * even["seconds"]


@pytest.mark.parametrize("name, gpus", [("qwen3-30b-a3b", 16), ("flashmoe-paper", 16)])
def test_following_the_ranks_of_one_node_tells_the_same(name, gpus):
    scenario = Scenario(SHAPES[name], H100, gpus, 512)
    fewer = simulate(scenario)
    assert fewer["followed"] == 8
    assert fewer["seconds"] == pytest.approx(simulate(replace(scenario, follow=gpus))["seconds"], rel=0.05)


def test_a_thousand_ranks_in_one_group():
    found = simulate(Scenario(replace(SHAPES["flashmoe-paper"], num_experts=1024), H100, 1024, 64))
    assert (found["ep_size"], found["followed"]) == (1024, 8)
    assert found["seconds"] > 1023 * H100.header_s  # one subscriber reads that many headers


def test_what_does_not_fit_is_rejected_with_its_numbers():
    scenario = Scenario(SHAPES["deepseek-v3"], H100, 256, 16384)
    with pytest.raises(DoesNotFit, match=r"needs 12\d\.\d GB of 80 GB a GPU \(heap .* staging .* weights"):
        simulate(scenario)
    need = scenario.memory_need()
    inboxes, results = 255 * 16384 * 14336, 16384 * 8 * 14336
    assert inboxes + results < need.heap < 1.01 * (inboxes + results)
    assert inboxes < need.staging < 1.01 * inboxes
    assert need.weights == 3 * 7168 * 2048 * 2
    check_memory(need, H200)
    with pytest.raises(DoesNotFit, match="more than a process can address"):
        simulate(replace(scenario, num_gpus=256, tokens=2**26))


def test_groups_are_as_large_as_the_experts_allow():
    mixtral = Scenario(SHAPES["mixtral-8x7b"], H100, 1024, 8)
    assert mixtral.ep_size == 8
    assert replace(mixtral, shape=SHAPES["deepseek-v3"]).ep_size == 256
    assert replace(mixtral, shape=SHAPES["deepseek-v2-lite"], num_gpus=24).ep_size == 8


def test_engines_cut_tiles_as_the_library_does():
    qwen, paper = SHAPES["qwen3-30b-a3b"], SHAPES["flashmoe-paper"]
    assert (SM90_WIDE.up_cols(qwen), SM90_WIDE.down_cols(qwen), SM90_WIDE.up_cols(paper)) == (128, 256, 256)
    assert (SM90_NARROW.up_tiles(SHAPES["mixtral-8x7b"]), SM90_NARROW.down_tiles(SHAPES["mixtral-8x7b"])) == (448, 64)
    assert (HOST.up_cols(qwen.scaled(16)), HOST.up_cols(qwen), HOST.down_cols(qwen)) == (48, 128, 256)
    assert choose_engine(H100, "bf16", 32 * 8, 8) is SM90_NARROW
    assert choose_engine(H100, "bf16", 32 * 8 + 1, 8) is SM90_WIDE
    assert choose_engine(H100, "tf32", 1, 8) is SM80_TF32


def test_capacity_keeps_the_first_tokens_of_each_expert():
    ids = np.array([[0, 1], [0, 2], [0, 1], [0, 3]], dtype=np.int32)
    assert with_capacity(ids, 4, 1.0).tolist() == [[0, 1], [0, 2], [-1, 1], [-1, 3]]
    dropped = World(
        Workload((with_capacity(ids, 4, 1.0),), 1, 4), replace(SMALL, num_experts=4, top_k=2), H100, "bf16"
    ).run()
    assert dropped.ranks[0].rows == 6


@pytest.mark.parametrize("text", ["zipf", "zipf:9", "hot:0.5", "uniform:1", "cold:2", "zipf:x"])
def test_skews_that_mean_nothing_are_refused(text):
    with pytest.raises(ValueError, match="must be uniform, zipf:S"):
        Skew.parse(text)
