"""Each router on the CPU: scores, probabilities and the choice of experts, in torch's operators."""

import pytest
import torch
from bench_calls import stretch_of

from flashmoe.routing import ROUTERS, make_router


def chosen_naively(name: str, logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """The experts of each token, ascending; no two random scores are equal."""
    if name == "grouped":  # one expert in each of top_k groups
        inside = logits.unflatten(-1, (top_k, -1)).argmax(-1)
        return inside + torch.arange(top_k) * (logits.shape[-1] // top_k)
    if name == "group_limited":  # the four best of eight groups, by their two best experts
        scores = logits.sigmoid().unflatten(-1, (8, -1))
        best = scores.sort(-1).values[..., -2:].sum(-1).sort(-1).indices[:, -4:]
        shut = torch.ones(scores.shape[:2], dtype=torch.bool).scatter(-1, best, False)
        logits = logits.masked_fill(shut.repeat_interleave(scores.shape[-1], -1), -torch.inf)
    return logits.sort(-1).indices[:, -top_k:].sort(-1).values


@pytest.mark.parametrize("router", list(ROUTERS))
@pytest.mark.sizes("tokens", [1, 512], [16, 4096])
@torch.no_grad()
def test_router(measure, router, tokens):
    hidden, experts, top_k = 512, 128, 8
    made = make_router(router, hidden, experts, top_k)
    x = torch.randn(tokens, hidden)
    ids = made(x).topk_ids.sort(-1).values
    assert torch.equal(ids, chosen_naively(router, x @ made.weight.T, top_k))
    measure(stretch_of(lambda: made(x)), items=tokens)
