"""W ranks as threads of this process: make a team, run a function on every rank, get what came of it."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

from flashmoe import _C

PATIENCE_S = 60.0


def make_team(
    ep_size: int,
    *,
    max_tokens: int = 96,
    max_wire_bytes: int = 512,
    max_top_k: int = 8,
    max_experts: int = 32,
    backward: bool = True,
    timeout_s: float = 20.0,
    entry_timeout_s: float = 20.0,
    **options: Any,
) -> list[_C.Group]:
    """The groups of ``ep_size`` ranks, one each. ``options``: remote_only_seed, num_workers, last_epoch."""
    limits = _C.Limits(ep_size, max_tokens, max_wire_bytes, max_top_k, max_experts, backward)
    return _C.local_team(limits, timeout_s=timeout_s, entry_timeout_s=entry_timeout_s, **options)


def outcomes(team: Sequence[_C.Group], fn: Callable[[int, _C.Group], Any]) -> list[Any]:
    """``fn(rank, group)`` on every rank at once: its value, or the exception that it raised."""
    results: list[Any] = [None] * len(team)

    def serve(rank: int) -> None:
        try:
            results[rank] = fn(rank, team[rank])
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=serve, args=(rank,), daemon=True) for rank in range(len(team))]
    for thread in threads:
        thread.start()
    for rank, thread in enumerate(threads):
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), f"rank {rank} is still in its call after {PATIENCE_S} s"
    return results


def on_ranks(team: Sequence[_C.Group], fn: Callable[[int, _C.Group], Any]) -> list[Any]:
    """As ``outcomes``, but an exception on any rank is raised here."""
    results = outcomes(team, fn)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results
