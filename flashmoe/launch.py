"""Ranks without a launcher: run a function in fresh processes on this host, from a script or a notebook."""

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from . import distributed, portable_function
from ._C import PeerError
from .cores import usable_cores

_GRACE_S = 5.0  # for processes that were asked to end, until they are killed
_ROOT_CAUSE_S = 1.0  # a rank that lost its peer often reports before the one that caused it
_PR_SET_PDEATHSIG = 1


class RankError(RuntimeError):
    """A rank ended in a way that is no exception of its own, or the text of one that cannot travel."""


def launch(
    fn: Callable[..., Any],
    nproc: int,
    *args: Any,
    timeout_s: float | None = None,
    init_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> list[Any]:
    """Call ``fn(*args, **kwargs)`` in ``nproc`` fresh processes, the ranks of one world; return the results by rank.

    Each rank has ``torch.distributed`` (gloo) and ``flashmoe.distributed`` set up, the variables that torchrun sets,
    and its share of the cores for torch's threads. All of them end with this call, however it ends.

    A script must call this under ``if __name__ == "__main__":``, as for any ``multiprocessing`` start. In a notebook,
    functions of the notebook travel together with the globals they name; classes must come from a module file.
    Tensors in arguments and results are copied.

    Args:
        timeout_s: seconds for everything; None: no limit.
        init_kwargs: arguments of ``flashmoe.distributed.init``.

    Raises:
        The first exception that a rank raised, here too, its ``__cause__`` a RankError with rank and traceback.
        RankError: a rank was killed by a signal, or ended before it returned.
        TimeoutError: names the ranks that had not returned.
        TypeError: ``fn``, its arguments or a result cannot travel between processes.
    """
    if type(nproc) is not int or nproc < 1:
        raise ValueError(f"nproc must be an integer of at least 1, got {nproc!r}")
    if not callable(fn):
        raise TypeError(f"fn must be a function, got {type(fn).__name__}")
    task = portable_function.dumps((fn, args, kwargs, init_kwargs or {}))
    # The ranks meet in a store that this process serves, on a port that the system picked for it.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    processes, connections = [], []
    try:
        for rank in range(nproc):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_run_rank, args=(rank, nproc, store.port, sender, task), name=f"flashmoe rank {rank}"
            )
            with _main_as_it_can_be_imported():
                process.start()
            sender.close()  # ours; else the end of the rank would not end the pipe
            processes.append(process)
            connections.append(receiver)
        reports = _collect(processes, connections, timeout_s)
        if all(report[0] == "result" for report in reports.values()):
            _join(processes)  # they still have their own exit to make
    finally:
        end_processes(processes)
        for connection in connections:
            connection.close()
    return _results(reports)


@contextlib.contextmanager
def _main_as_it_can_be_imported() -> Iterator[None]:
    """Hide the name of a main module that is no file ("<stdin>"): a fresh process would look for that file."""
    variables = vars(sys.modules["__main__"])
    hidden = {} if portable_function.main_is_a_file() else {"__file__": variables.pop("__file__", None)}
    try:
        yield
    finally:
        variables.update((name, value) for name, value in hidden.items() if value is not None)


def enter_world(rank: int, nproc: int, port: int, address: str = "127.0.0.1") -> None:
    """Make this process a rank of the torch world that meets at the store on ``port``; it ends with its parent."""
    # Even a parent that is killed leaves nothing behind.
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    torch.set_num_threads(max(1, usable_cores() // nproc))
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(nproc), LOCAL_WORLD_SIZE=str(nproc),
        MASTER_ADDR=address, MASTER_PORT=str(port),
    )  # fmt: skip
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's own name may not resolve
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=nproc)


def end_processes(processes: list[Any]) -> None:
    """End and collect those that still run: politely, then by force."""
    for process in processes:
        if process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
                os.kill(process.pid, signal.SIGCONT)  # only a process that runs can end itself
    _join(processes)
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()


def _join(processes: list[Any]) -> None:
    deadline = time.monotonic() + _GRACE_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))


def _run_rank(rank: int, nproc: int, port: int, connection: Connection, task: bytes) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends us
    try:
        enter_world(rank, nproc, port)
        fn, args, kwargs, init_kwargs = pickle.loads(task)
        distributed.init(**init_kwargs)
        report = ("result", portable_function.dumps(fn(*args, **kwargs)))
    except BaseException as error:
        report = ("error", _portable_error(error), traceback.format_exc())
    connection.send(report)
    connection.close()
    distributed.finalize()
    if dist.is_initialized():
        dist.destroy_process_group()


def _portable_error(error: BaseException) -> bytes | None:
    """The exception as a pickle, or None where it would not come back as what it is."""
    if not isinstance(error, Exception):
        return None
    try:
        data = pickle.dumps(error)
        return data if type(pickle.loads(data)) is type(error) else None
    except Exception:
        return None


def _collect(processes: list[Any], connections: list[Connection], timeout_s: float | None) -> dict[int, tuple]:
    """Reports by rank, until all are there or one is not a result."""
    reports: dict[int, tuple] = {}
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while len(reports) < len(processes):
        pending = {connections[r]: r for r in range(len(processes)) if r not in reports}
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = wait(list(pending), left)
        if not ready:
            if any(report[0] != "result" for report in reports.values()):
                return reports
            late = sorted(pending.values())
            names = f"rank{'s' if len(late) > 1 else ''} {', '.join(map(str, late))}"
            raise TimeoutError(f"launch: {names} had not returned after {timeout_s:g} s")
        for connection in ready:
            rank = pending[connection]
            try:
                reports[rank] = connection.recv()
            except (EOFError, OSError):  # the rank ended without a report, or within it
                reports[rank] = ("ended", _ending(processes[rank]))
            if reports[rank][0] == "error" and _is_consequence(reports[rank]):
                root_cause = time.monotonic() + _ROOT_CAUSE_S
                deadline = root_cause if deadline is None else min(deadline, root_cause)
            elif reports[rank][0] != "result":
                return reports
    return reports


def _is_consequence(report: tuple) -> bool:
    return report[1] is not None and isinstance(pickle.loads(report[1]), PeerError)


def _ending(process: Any) -> str:
    process.join(_GRACE_S)
    code = process.exitcode
    if code is None:
        return "closed its connection before it returned"
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code} before it returned; what it said stands on stderr"


def _results(reports: dict[int, tuple]) -> list[Any]:
    failed = [rank for rank in reports if reports[rank][0] != "result"]
    # In the order of arrival, but what killed or broke a rank before what that did to its peers.
    failed.sort(key=lambda rank: reports[rank][0] == "error" and _is_consequence(reports[rank]))
    if not failed:
        return [pickle.loads(reports[rank][1]) for rank in range(len(reports))]
    rank = failed[0]
    if reports[rank][0] == "ended":
        raise RankError(f"rank {rank} {reports[rank][1]}")
    _, error, text = reports[rank]
    story = RankError(f"rank {rank} raised:\n\n{text}")
    if error is None:
        raise story
    raise pickle.loads(error) from story
