"""What the other threads of a process may do while a call waits for its peers."""

import threading
import time

import torch
from layer_case import LayerCase
from thread_ranks import PATIENCE_S, make_team

import flashmoe


def test_questions_do_not_wait_for_a_call_that_waits_for_a_peer():
    """Whoever asks holds the interpreter. If the question waited for the call, the peer, a thread of this process,
    could never enter it."""
    case = LayerCase(tokens=(5, 6))
    team = make_team(2, entry_timeout_s=10.0)
    results: dict[int, torch.Tensor] = {}

    def call(rank: int) -> None:
        results[rank] = case.call(rank, team[rank])

    first = threading.Thread(target=call, args=(0,), daemon=True)
    flashmoe.groups.name_of(team[0])  # check() knows the groups that were named
    first.start()
    time.sleep(0.3)
    begin = time.monotonic()
    flashmoe.check()
    assert team[0].failed is None
    assert team[0].stats()["tokens_per_expert"] == []
    team[0].num_workers = 2
    assert team[0].num_workers == 2
    assert time.monotonic() - begin < 2.0
    assert first.is_alive(), "the call must still wait, or nothing was shown"
    call(1)
    first.join(PATIENCE_S)
    assert set(results) == {0, 1}
