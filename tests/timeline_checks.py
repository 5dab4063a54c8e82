"""What the timeline of any call must hold, whoever made it."""

import numpy as np

import flashmoe
from flashmoe.timeline import DOWN, PLAN, PUBLISHED, UP, RankTrace

BLOCK_ROWS = flashmoe.build_info()["block_rows"]


def of_kind(events: np.ndarray, *kinds: int) -> np.ndarray:
    return events[np.isin(events["kind"], kinds)]


def everything(rank: RankTrace) -> np.ndarray:
    return np.sort(np.concatenate(rank.workers), order="begin")


def check_call(rank: RankTrace, rows_of_expert: list[int]) -> None:
    """What one rank did is the work of that many rows, and no piece began before what it needs was done."""
    events = everything(rank)
    assert (events["begin"] <= events["end"]).all() and (events["loads"] <= events["end"]).all()
    assert len(of_kind(events, PLAN)) == 1
    blocks = {int(event["sequence"]): event for event in of_kind(events, UP)}
    rows = [0] * len(rows_of_expert)
    for event in blocks.values():
        rows[event["expert"]] += event["rows"]
        assert 0 < event["rows"] <= BLOCK_ROWS
    assert rows == rows_of_expert
    for sequence in blocks:
        up, down = (of_kind(events, kind)[of_kind(events, kind)["sequence"] == sequence] for kind in (UP, DOWN))
        assert sorted(up["part"]) == list(range(len(up))) and sorted(down["part"]) == list(range(len(down)))
        assert down["begin"].min() >= up["end"].max()
        published = of_kind(events, PUBLISHED)
        assert published[published["sequence"] > sequence]["begin"].min() <= up["begin"].min()
