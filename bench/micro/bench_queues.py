"""What it costs to hand a tile to a worker, beside the tile's own microseconds. The primitives check each tile."""

import pytest


@pytest.mark.sizes("tiles", [6], [1, 32])
def test_take_alone(micro, measure, tiles):
    """One worker: a tile from the up or the down queue, a sixth or so of a row block's publishing with it."""
    measure(lambda n: micro.take_alone(tiles, n))


@pytest.mark.sizes("workers", [2], [4, 8])
def test_take_together(micro, measure, workers):
    """Workers that draw tickets from one queue at the same time: from one tile's taking to the next, by anybody."""
    measure(lambda n: micro.take_together(workers, 6, max(n, 1000)))


def test_hand_off(micro, measure):
    """Two workers: from the publishing on one to the tile's being in the other's hands."""
    measure(micro.hand_off)
