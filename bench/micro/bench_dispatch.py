"""The protocol's own work on a call's rows: the plan, the sending, the lists and row blocks, and the gather.

All on rank 0 of ``ranks``, whose tokens choose among 128 experts at random; checked against plans made naively.
"""

import pytest
import torch

EXPERTS, TOP_K = 128, 8
RANKS = pytest.mark.sizes("ranks", [1, 2], [4, 8])
TOKENS = pytest.mark.sizes("tokens", [16, 512], [1, 128, 4096])
COPIES = 4  # of x, that take turns


class Drawn:
    """One call's tensors, of all ranks."""

    def __init__(self, micro, ranks: int, tokens: int, hidden: int) -> None:
        self.x = torch.randn(COPIES, ranks, tokens, hidden)
        self.ids = torch.rand(ranks, tokens, EXPERTS).topk(TOP_K).indices.int()
        self.row_bytes = hidden * 4
        self.planned = micro.PlannedRanks(
            ranks, tokens, hidden, EXPERTS, TOP_K, self.x.data_ptr(), COPIES, self.ids.data_ptr()
        )
        self.per_rank = EXPERTS // ranks

    def slots(self, rank: int) -> list[int]:
        """Rank 0's tokens that travel to ``rank``, each once, in the order of the experts there that need them."""
        owned = range(rank * self.per_rank, (rank + 1) * self.per_rank)
        tokens = [token for expert in owned for token in (self.ids[0] == expert).any(-1).nonzero().flatten().tolist()]
        return list(dict.fromkeys(tokens))


@pytest.fixture
def drawn(micro, ranks, tokens):
    return Drawn(micro, ranks, tokens, hidden=512)


@RANKS
@TOKENS
def test_plan(drawn, measure, tokens):
    """From the routing to every row's place: a stable sort by expert, and one slot for each token of each rank."""
    order = drawn.ids[0].flatten().argsort(stable=True)
    wanted = torch.empty_like(order)
    wanted[order] = torch.arange(len(order))
    assert drawn.planned.plan(1) > 0 and drawn.planned.result_rows == wanted.tolist()
    for rank in range(1, EXPERTS // drawn.per_rank):
        assert drawn.planned.slot_tokens(rank) == drawn.slots(rank)
    measure(drawn.planned.plan, items=tokens * TOP_K)


@pytest.mark.sizes("ranks", [2], [4, 8])
@TOKENS
def test_dispatch(drawn, measure, ranks):
    """Rows to the other ranks' inboxes, chunk by chunk, each with its signal, which every stretch checks."""
    drawn.planned.send(2)  # copy 0 lies there already
    sent = 0
    for rank in range(1, ranks):
        inbox = torch.frombuffer(bytearray(drawn.planned.inbox(rank)), dtype=torch.float32)
        assert torch.equal(inbox.view(-1, 512), drawn.x[1, 0, drawn.slots(rank)])
        sent += len(drawn.slots(rank))
    measure(drawn.planned.send, bytes=sent * drawn.row_bytes)


def canonical_rows(drawn: Drawn) -> list[list[torch.Tensor]]:
    """By rank 0's experts the rows of all sources: rank 0's first, then the others', tokens in order."""
    return [
        [drawn.x[0, source, token] for source in range(len(drawn.ids))
         for token in (drawn.ids[source] == expert).any(-1).nonzero().flatten().tolist()]
        for expert in range(drawn.per_rank)
    ]  # fmt: skip


@RANKS
@TOKENS
def test_row_blocks(drawn, measure):
    """From the headers to each expert's list, cut into row blocks of 128."""
    drawn.planned.build_lists(1)
    lists = [len(rows) for rows in canonical_rows(drawn)]
    wanted = [(expert, min(128, rows - first)) for expert, rows in enumerate(lists) for first in range(0, rows, 128)]
    assert drawn.planned.blocks == wanted
    measure(drawn.planned.build_lists, items=sum(lists))


@RANKS
@TOKENS
def test_gather(drawn, measure):
    """All row blocks' rows from x and the inboxes, by index, into one place."""
    wanted = torch.stack([row for rows in canonical_rows(drawn) for row in rows])
    gathered = torch.frombuffer(bytearray(drawn.planned.gathered()), dtype=torch.float32)
    assert torch.equal(gathered.view(-1, 512), wanted)
    measure(drawn.planned.gather, bytes=len(wanted) * drawn.row_bytes)
