"""Functions that tests run in ranks. Every rank draws all ranks' data from one seed, so truth needs no messages."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

import flashmoe
from distributed_problem import Problem
from gradient_case import gradients
from layer_case import LayerCase
from flashmoe import _C

_groups: dict[tuple, dist.ProcessGroup] = {}


def rank() -> int:
    return dist.get_rank()


def make_groups(*lists_of_ranks: Sequence[int]) -> None:
    """torch's groups of these global ranks; every rank of the world makes all of them in this order."""
    for ranks in lists_of_ranks:
        _groups[tuple(ranks)] = dist.new_group(list(ranks))


def group(ranks: Sequence[int]) -> dist.ProcessGroup:
    if tuple(ranks) in _groups:
        return _groups[tuple(ranks)]
    assert list(ranks) == list(range(dist.get_world_size())), f"no group {ranks} was made"
    return dist.group.WORLD


def run_and_check(
    seed: int, ranks: Sequence[int], tokens: Sequence[int], threads: bool = False, **problem: object
) -> None:
    """One call over ``ranks``: right, and the same bits as where one process owns every expert."""
    p = Problem(seed, tokens, **problem)
    ep_rank = list(ranks).index(rank())
    y = p.run(ep_rank, group(ranks))
    p.check(ep_rank, y)
    assert torch.equal(y, p.alone(ep_rank)), "bits differ from those of W = 1"
    assert torch.equal(y, p.run(ep_rank, group(ranks))), "bits differ on repeat"
    if threads:
        assert torch.equal(y, p.as_threads()[ep_rank]), "bits differ from those of ranks that are threads"


def gradients_of(tokens: Sequence[int], **how: object) -> dict[str, torch.Tensor]:
    return gradients(LayerCase(tokens=tuple(tokens), **how), rank(), group(range(len(tokens))))


def result_of(seed: int, ranks: Sequence[int], tokens: Sequence[int], **problem: object) -> torch.Tensor:
    return Problem(seed, tokens, **problem).run(list(ranks).index(rank()), group(ranks))


def many_calls(seed: int, ranks: Sequence[int], calls: Sequence[Sequence[int]]) -> None:
    """One call after another with other token counts, nothing between them; then every result is checked."""
    hot_ranks = [i % len(ranks) if i % 3 == 0 else None for i in range(len(calls))]
    problems = [Problem(seed + i, tokens, one_rank=hot_ranks[i]) for i, tokens in enumerate(calls)]
    ep_rank = list(ranks).index(rank())
    results = [p.run(ep_rank, group(ranks)) for p in problems]
    for p, y in zip(problems, results, strict=True):
        p.check(ep_rank, y)


def overlapping_groups(first: Sequence[int], second: Sequence[int], rounds: int) -> None:
    """Every rank calls the groups it is in, in one order; ranks in both are slow in turns."""
    for i in range(rounds):
        for ranks in (first, second):
            if rank() in ranks:
                if i % 2 and rank() in first and rank() in second:
                    time.sleep(0.01)
                run_and_check(1000 * i + len(ranks), ranks, [3 + (i + j) % 5 for j in range(len(ranks))])


def several_layers(ranks: Sequence[int], num_layers: int, rounds: int) -> None:
    """Modules share the group; each keeps its own weights and its own statistics."""
    ep_rank = list(ranks).index(rank())
    torch.manual_seed(5)
    layers = [
        flashmoe.MoE(64, 32, 8, 2, group=group(ranks), max_tokens=16, dtype=torch.float32) for _ in range(num_layers)
    ]
    whole = [flashmoe.MoE(64, 32, 8, 2, dtype=torch.float32) for _ in range(num_layers)]
    each = 8 // len(ranks)
    for layer, all_experts in zip(layers, whole, strict=True):
        mine = slice(ep_rank * each, (ep_rank + 1) * each)
        state = all_experts.state_dict()
        layer.load_state_dict(
            {name: value[mine] if name in ("gate_up_proj", "down_proj") else value for name, value in state.items()}
        )
    with torch.no_grad():
        for i in range(rounds):
            x = torch.randn(5 + i + ep_rank, 64, generator=torch.Generator().manual_seed(100 * i + ep_rank))
            expected = x
            for layer, all_experts in zip(layers, whole, strict=True):
                x, expected = layer(x), all_experts(expected)
            torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


def init_twice_in_vain() -> tuple[int, int]:
    """Generations before and after an init() that asks for what is there."""
    before = flashmoe.distributed.arena()["generation"]
    flashmoe.distributed.init()
    return before, flashmoe.distributed.arena()["generation"]


def init_by_rank(arguments: Sequence[dict]) -> None:
    flashmoe.distributed.init(**arguments[rank()])


def init_with_environment(variables: dict[str, str], **arguments: object) -> dict:
    os.environ.update(variables)
    try:
        flashmoe.distributed.init(**arguments)
        return flashmoe.distributed.arena()
    finally:
        for name in variables:
            del os.environ[name]


def arena() -> dict | None:
    return flashmoe.distributed.arena()


def join(*groups_of_ranks: Sequence[int]) -> list[int]:
    """Use groups for the first time; bytes taken from the arena after each."""
    used = []
    for ranks in groups_of_ranks:
        flashmoe.distributed.group_of(group(ranks))
        used.append(flashmoe.distributed.arena()["used_bytes"])
    return used


def join_by_rank(groups_of_ranks: Sequence[Sequence[int]]) -> None:
    join(groups_of_ranks[rank()])


def join_under_one_name(name: str, members_by_rank: Sequence[Sequence[int]]) -> None:
    """What would happen if torch's groups of one name had other members on other ranks."""
    from flashmoe.world import join_group

    join_group(flashmoe.distributed._world, name, list(members_by_rank[rank()]))


def segments_mapped() -> list[str]:
    """Inodes of the symmetric memory that this process maps."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return sorted({line.split()[4] for line in maps if "memfd:flashmoe" in line})


def descriptors_a_child_program_gets() -> list[str]:
    listing = subprocess.run(
        ["ls", "-l", "/proc/self/fd"], capture_output=True, text=True, check=True, close_fds=False
    )
    return listing.stdout.splitlines()


def forked_child_starts_afresh() -> int:
    """Exit code of a forked child that looks at flashmoe and ends as a Python program does."""
    pid = os.fork()
    if pid == 0:
        try:
            assert flashmoe.distributed.arena() is None
            signal.alarm(10)  # a destructor that waits for threads it does not have must not hang the test
        except BaseException:
            os._exit(3)
        raise SystemExit(7)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def be_a_stranger(name: str, user: int, heard: object) -> None:
    """Another user's process that knows where rank 0 listens. What it hears goes into the pipe ``heard``."""
    memory = os.memfd_create("stranger", os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, 1 << 16)
    os.setuid(user)
    answers = []
    for message, descriptors in (b"", []), (b"rank 1", []), (b'{"rank": 1}', []), (b'{"rank": 1}', [memory]):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect("\0" + name)
            try:
                if message:
                    socket.send_fds(connection, [message], descriptors)
                connection.shutdown(socket.SHUT_WR)
                answers.append(connection.recv(100))
            except (BrokenPipeError, ConnectionResetError):  # hung up on, before or after the message
                answers.append(b"")
    heard.send(answers)


# --- failures -------------------------------------------------------------------------------------------------


def init_where_memory_ends(at_rank: int, **arguments: object) -> None:
    """As if the memory of this host sufficed for the ranks before ``at_rank``."""

    class Segment(_C.Segment):
        @staticmethod
        def create(num_bytes: int) -> _C.Segment:
            assert rank() <= at_rank, "ranks after the one that found nothing must not even try"
            if rank() == at_rank:
                raise RuntimeError("symmetric heap: nothing left")
            return _C.Segment.create(num_bytes)

    flashmoe.arena.Segment = Segment
    try:
        flashmoe.distributed.init(**arguments)
    finally:
        flashmoe.arena.Segment = _C.Segment


def calls_until_failure(ranks: Sequence[int], tokens: Sequence[int], pause_s: float = 0.0, **problem: object) -> dict:
    """Call until something is raised; then what it was, how long the last call took, and what a later call does."""
    p = Problem(0, tokens, **problem)
    ep_rank = list(ranks).index(rank())
    calls = 0
    while True:
        begin = time.monotonic()
        try:
            p.run(ep_rank, group(ranks))
        except flashmoe.PeerError as error:
            report = {"error": str(error), "at": time.monotonic(), "seconds": time.monotonic() - begin, "calls": calls}
            break
        calls += 1
        time.sleep(pause_s)
    for name, attempt in (("later_call", lambda: p.run(ep_rank, group(ranks))), ("check", flashmoe.check)):
        try:
            attempt()
            report[name] = None
        except flashmoe.PeerError as error:
            report[name] = str(error)
    return report


def calls(ranks: Sequence[int], tokens: Sequence[int], number: int, **problem: object) -> None:
    p = Problem(0, tokens, **problem)
    for _ in range(number):
        p.run(list(ranks).index(rank()), group(ranks))


def calls_and_end(ranks: Sequence[int], tokens: Sequence[int], number: int) -> None:
    calls(ranks, tokens, number)
    os._exit(0)


def call_layers_by_rank(ranks: Sequence[int], tokens: Sequence[int], layers: Sequence[int]) -> None:
    ep_rank = list(ranks).index(rank())
    Problem(0, tokens).run(ep_rank, group(ranks), layer=layers[ep_rank])


def bad_ids_then_good(ranks: Sequence[int], tokens: Sequence[int], culprit: int) -> str | None:
    """Nothing is sent for a call with bad arguments, so its rank may simply make a good one instead."""
    p = Problem(0, tokens)
    ep_rank = list(ranks).index(rank())
    message = None
    if ep_rank == culprit:
        good = p.topk_ids[ep_rank]
        p.topk_ids[ep_rank] = good + 1000
        try:
            p.run(ep_rank, group(ranks))
        except ValueError as error:
            message = str(error)
        p.topk_ids[ep_rank] = good
    p.check(ep_rank, p.run(ep_rank, group(ranks)))
    return message


# --- the network ----------------------------------------------------------------------------------------------


def bytes_of_call(seed: int, ranks: Sequence[int], tokens: Sequence[int]) -> dict[str, list[int]]:
    """What one call sent to each rank, by kind."""
    result_of(seed, ranks, tokens)
    return flashmoe.distributed.group_of(group(ranks)).stats()["bytes_per_peer"]


def init_without_ucx(**arguments: object) -> None:
    """As if its library were not installed."""
    ucx_library = flashmoe.hosts.ucx_library
    flashmoe.hosts.ucx_library = lambda: "libucp-that-is-not-here.so"
    try:
        flashmoe.distributed.init(**arguments)
    finally:
        flashmoe.hosts.ucx_library = ucx_library


def listening_sockets() -> list[str]:
    """Inodes of this process's sockets."""
    links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if fd.isdecimal() and int(fd) > 2
             and os.path.islink(f"/proc/self/fd/{fd}")]
    return [link[len("socket:[") : -1] for link in links if link.startswith("socket:[")]
