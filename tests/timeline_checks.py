"""What the timeline of any call must hold, whoever made it."""

import numpy as np

import flashmoe
from flashmoe.timeline import COMBINE, DOWN, PLAN, PUBLISHED, SEND, UP, RankTrace
from flashmoe.timeline_clocks import puts

BLOCK_ROWS, CHUNK_ROWS = (flashmoe.build_info()[name] for name in ("block_rows", "chunk_rows"))
COMBINE_TOKENS = 16  # csrc/protocol/config.h


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


def check_combines(rank: RankTrace, num_tokens: int) -> None:
    """Each task of so many tokens once."""
    combined = of_kind(everything(rank), COMBINE)
    assert sorted(combined["index"]) == list(range(-(-num_tokens // COMBINE_TOKENS)))


def check_rows_sent(ranks: list[RankTrace], rows: list[list[int]]) -> None:
    """Every chunk of ``rows[source][destination]`` was sent once, and seen when it had been; all by one clock."""
    chunks = [[-(-count // CHUNK_ROWS) for count in row] for row in rows]
    for rank in ranks:
        sent = of_kind(everything(rank), SEND)
        # A source takes as many chunks to everybody as its longest packet has; of a shorter one the rest is empty.
        tickets = max((count for to, count in enumerate(chunks[rank.rank]) if to != rank.rank), default=0)
        wanted = [(to, chunk) for to in range(len(ranks)) for chunk in range(tickets) if to != rank.rank]
        assert sorted(zip(sent["index"], sent["part"], strict=True)) == wanted
    seen = [(put.source, put.destination, put.chunk) for put in puts(ranks) if put.seen >= put.sent]
    others = [(source, to) for source in range(len(ranks)) for to in range(len(ranks)) if source != to]
    assert sorted(seen) == [(source, to, chunk) for source, to in others for chunk in range(chunks[source][to])]
