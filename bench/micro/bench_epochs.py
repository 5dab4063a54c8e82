"""The fixed cost of a call in the C++ runtime: an epoch of the protocol around next to no arithmetic."""

import math

import pytest

SEEDS = {"alone": None, "threads": None, "rehearsal": 5}


@pytest.mark.sizes("transport, ranks", [("alone", 1), ("threads", 2), ("rehearsal", 2)], [("threads", 4)])
@pytest.mark.sizes("tokens", [0, 1], [8])
def test_epoch(micro, measure, ranks, tokens, transport):
    """Ranks of one worker each, back to back; without tokens they only tell each other that there are none."""
    if tokens:
        gate = 64 * 0.5 * 0.01
        wanted = 64 * 0.01 * gate * gate / (1 + math.exp(-gate))  # two experts alike, each with half the weight
        assert micro.tiny_calls(ranks, tokens, SEEDS[transport], 1)[1] == pytest.approx(wanted, rel=1e-5)
    measure(lambda n: micro.tiny_calls(ranks, tokens, SEEDS[transport], n)[0])
