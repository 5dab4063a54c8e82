"""Ranks that a test commands one by one, kills, stops, and asks again: what ``flashmoe.launch`` would clean up."""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

import flashmoe
from flashmoe.launch import end_processes, enter_world

# One process imports what is slow to import, and every rank is forked from it: a world starts in a fraction of a
# second. (torch.testing.assert_close imports torch.distributed.tensor.)
rank_processes = multiprocessing.get_context("forkserver")
rank_processes.set_forkserver_preload(["torch.distributed.tensor", "flashmoe", "pytest"])


@dataclasses.dataclass
class Outcome:
    """What one command brought on one rank."""

    value: Any = None
    error: str | None = None  # the exception's text
    kind: str | None = None  # its type's name
    seconds: float = 0.0
    story: str = ""  # its traceback


class Hosts(Protocol):
    """Where ranks shall run, if not simply here."""

    def make_store(self) -> dist.TCPStore: ...

    def of_rank(self, rank: int) -> Callable[[], None]:
        """What a rank's process does before anything else."""


class RankWorld:
    """``nproc`` ranks with torch.distributed; every wait for them ends within ``patience_s`` or kills them all."""

    def __init__(self, nproc: int, patience_s: float = 60.0, hosts: Hosts | None = None):
        self.patience_s = patience_s
        self.store = hosts.make_store() if hosts else make_store("127.0.0.1")
        self.pipes, self.processes = [], []
        for rank in range(nproc):
            mine, theirs = rank_processes.Pipe()
            arguments = (rank, nproc, self.store.host, self.store.port, theirs, hosts.of_rank(rank) if hosts else None)
            process = rank_processes.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)
        self.collect(range(nproc))  # until all have joined the torch world

    def start(self, ranks: Sequence[int], fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Have ``ranks`` call a module-level function; ``collect`` brings what came of it."""
        for rank in ranks:
            self.pipes[rank].send((fn, args, kwargs))

    def collect(self, ranks: Sequence[int]) -> list[Outcome]:
        deadline = time.monotonic() + self.patience_s
        outcomes = []
        for rank in ranks:
            if not self.pipes[rank].poll(max(0.0, deadline - time.monotonic())):
                self.close()
                raise AssertionError(f"rank {rank} hangs: no answer after {self.patience_s:g} s")
            outcomes.append(self.pipes[rank].recv())
        return outcomes

    def outcomes(
        self, fn: Callable[..., Any], *args: Any, ranks: Sequence[int] | None = None, **kwargs: Any
    ) -> list[Outcome]:
        ranks = range(len(self.processes)) if ranks is None else ranks
        self.start(ranks, fn, *args, **kwargs)
        return self.collect(ranks)

    def call(self, fn: Callable[..., Any], *args: Any, ranks: Sequence[int] | None = None, **kwargs: Any) -> list[Any]:
        """The values by rank; none of the calls may raise."""
        outcomes = self.outcomes(fn, *args, ranks=ranks, **kwargs)
        for outcome in outcomes:
            assert outcome.error is None, outcome.story
        return [outcome.value for outcome in outcomes]

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.processes[rank].pid, number)

    def kill(self, rank: int) -> None:
        self.signal(rank, signal.SIGKILL)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        end_processes(self.processes)
        for pipe in self.pipes:
            pipe.close()


def make_store(address: str) -> dist.TCPStore:
    return dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)


@contextlib.contextmanager
def rank_world(nproc: int, hosts: Hosts | None = None, **init_kwargs: Any) -> Iterator[RankWorld]:
    """A world whose ranks have called ``flashmoe.distributed.init``, unless there is nothing to call it with."""
    world = RankWorld(nproc, hosts=hosts)
    try:
        if init_kwargs:
            world.call(flashmoe.distributed.init, **init_kwargs)
        yield world
    finally:
        world.close()


def fresh_environment() -> dict[str, str]:
    """For a fresh interpreter that shall find the same flashmoe."""
    path = os.pathsep.join([str(Path(flashmoe.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


def _serve(rank: int, nproc: int, address: str, port: int, pipe: Any, enter_host: Callable[[], None] | None) -> None:
    if enter_host is not None:
        enter_host()
    enter_world(rank, nproc, port, address)
    pipe.send(Outcome())
    while True:
        try:
            fn, args, kwargs = pipe.recv()
        except EOFError:
            return
        begin = time.monotonic()
        outcome = Outcome()
        try:
            outcome.value = fn(*args, **kwargs)
        except Exception as error:
            outcome = Outcome(error=str(error), kind=type(error).__name__, story=traceback.format_exc())
        outcome.seconds = time.monotonic() - begin
        pipe.send(outcome)
