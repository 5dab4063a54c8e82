"""What a put of rows costs, and how soon the other rank knows, by each transport."""

import pytest

from flashmoe.hosts import ucx_library


@pytest.fixture(params=["threads", "processes", "rehearsal", "ucx"])
def ends(request, micro):
    if request.param not in micro.TRANSPORTS:
        pytest.skip("this build is without UCX; `flashmoe info` tells why")
    return micro.Ends(request.param, ucx_library() if request.param == "ucx" else "")


@pytest.mark.parametrize("memory", ["cold", "warm"])
@pytest.mark.sizes("size", [64, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20], [4 << 20])
def test_put(ends, measure, size, memory):
    """Bandwidth: one rank puts, nobody reads. The rehearsal sleeps now and then, as it is meant to."""
    cold = memory == "cold"
    ends.put(size, cold, 100)
    assert ends.landed(size, cold, 100)
    measure(lambda n: ends.put(size, cold, n), bytes=size)


@pytest.mark.sizes("size", [0, 64, 1 << 10, 8 << 10, 64 << 10], [512 << 10])
def test_signal(ends, measure, size):
    """Latency: half of there and back, of a signal alone or with its payload. The primitive checks each payload."""
    measure(lambda n: ends.ping_pong(size, n), bytes=size)
