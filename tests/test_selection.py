"""The operator that selects experts, against a sort of each token's scores."""

import pytest
import torch

from flashmoe.selection import Selection, select_experts


def order(scores: list[float]) -> list[int]:
    """Indices, best first; equal scores by index, NaN before all."""
    return sorted(range(len(scores)), key=lambda i: (scores[i] == scores[i], -scores[i] if scores[i] == scores[i] else 0, i))


def selected(scores: torch.Tensor, selection: Selection, bias: torch.Tensor | None) -> torch.Tensor:
    """[T, k], by the words of Selection's docstring."""
    ids = []
    for row in (scores if bias is None else scores + bias).tolist():
        size = len(row) // selection.num_groups
        groups = [range(g * size, (g + 1) * size) for g in range(selection.num_groups)]
        worth = []
        for group in groups:
            best = torch.tensor([row[e] for e in group]).sort(descending=True).values[: selection.best_of_group]
            worth.append(float(best.sum()))  # in float32, as there
        if selection.in_each_group:
            share = selection.top_k // selection.num_groups
            ids.append([group[i] for group in groups for i in order([row[e] for e in group])[:share]])
        else:
            among = [e for g in sorted(order(worth)[: selection.open_groups]) for e in groups[g]]
            ids.append([among[i] for i in order([row[e] for e in among])[: selection.top_k]])
    return torch.tensor(ids, dtype=torch.int64).view(-1, selection.top_k)


def weighed(scores: torch.Tensor, ids: torch.Tensor, selection: Selection) -> torch.Tensor:
    chosen = scores.double().gather(-1, ids)
    if selection.softmax:
        return chosen.softmax(-1) * selection.scale
    divisor = chosen.sum(-1, keepdim=True) + selection.epsilon if selection.renormalize else 1.0
    return chosen / divisor * selection.scale


SELECTIONS = {
    "plain": Selection(4),
    "renormalized": Selection(4, renormalize=True),
    "all": Selection(48, renormalize=True),
    "softmax": Selection(8, softmax=True),
    "softmax, scaled": Selection(5, softmax=True, scale=1.5),
    "scaled": Selection(3, renormalize=True, epsilon=1e-20, scale=2.5),
    "groups": Selection(4, num_groups=8, open_groups=3, best_of_group=2, scale=0.5),
    "groups by their best": Selection(6, num_groups=6, open_groups=1),
    "groups of one": Selection(5, num_groups=48, open_groups=7, best_of_group=2),
    "in each group": Selection(12, num_groups=4, open_groups=4, in_each_group=True),
}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("scores", ["spread", "ties", "signed zeros and infinities"])
@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
def test_ids_and_weights(selection, scores, biased):
    torch.manual_seed(3)
    drawn = {
        "spread": lambda: torch.rand(40, 48) + 0.01,
        "ties": lambda: torch.randint(1, 4, (40, 48)).float(),
        "signed zeros and infinities": lambda: torch.tensor([1.0, 0.0, -2.0, torch.inf, -torch.inf])[torch.randint(5, (40, 48))],
    }[scores]()  # fmt: skip
    bias = torch.randint(-2, 3, (48,)).float() if biased else None
    ids, weights = select_experts(drawn, selection, bias)
    assert ids.dtype == torch.int64 and weights.dtype == torch.float32
    assert torch.equal(ids, selected(drawn, selection, bias))
    torch.testing.assert_close(weights.double(), weighed(drawn, ids, selection), rtol=1e-6, atol=0, equal_nan=True)


def test_scores_that_differ_in_the_last_bit_are_not_a_tie():
    for base in (1e-45, 1e-38, 0.3, -0.3, 3e38):
        scores = torch.full((1, 64), base)
        scores[0, 40] = torch.nextafter(scores[0, 0], torch.tensor(torch.inf))
        assert select_experts(scores, Selection(2))[0].tolist() == [[40, 0]]


def test_nan_comes_first_and_spoils_what_is_summed():
    scores = torch.tensor([[0.0, torch.nan, torch.inf, -torch.nan], [3.0, 1.0, 2.0, 0.0]])
    ids, weights = select_experts(scores, Selection(3, softmax=True))
    assert ids.tolist() == [[1, 3, 2], [0, 2, 1]]
    assert weights[0].isnan().all() and not weights[1].isnan().any()


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
def test_gradients_are_those_of_the_equations(selection):
    scores = (torch.rand(7, 48, dtype=torch.float64) + 0.01).float().requires_grad_()
    ids, weights = select_experts(scores, selection)
    assert torch.equal(ids, select_experts(scores.detach(), selection)[0])
    upstream = torch.randn_like(weights)
    (got,) = torch.autograd.grad(weights, scores, upstream)
    exact = scores.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(weighed(exact, ids, selection), exact, upstream.double())
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-6)



@pytest.mark.parametrize(
    ("scores", "selection", "bias", "error", "message"),
    [
        (torch.rand(3, 8).double(), Selection(2), None, TypeError, "scores must be torch.float32, got torch.float64"),
        (torch.rand(8), Selection(2), None, ValueError, r"scores must have shape \(T, E\), got \(8,\)"),
        (torch.rand(3, 8), Selection(0), None, ValueError, r"top_k must be in \[1, 8\].*got 0"),
        (torch.rand(3, 8), Selection(9), None, ValueError, r"top_k must be in \[1, 8\].*got 9"),
        (torch.rand(3, 8), Selection(5, num_groups=4, open_groups=2), None, ValueError, r"in \[1, 4\], .*2 groups, got 5"),
        (torch.rand(3, 8), Selection(2, num_groups=3), None, ValueError, "num_groups must divide .* 8, got 3"),
        (torch.rand(3, 8), Selection(2, num_groups=4, open_groups=5), None, ValueError, r"open_groups .*= 4\], got 5"),
        (torch.rand(3, 8), Selection(2, best_of_group=3), None, ValueError, "best_of_group must be 1 or 2, got 3"),
        (torch.rand(3, 8), Selection(3, 2, 2, in_each_group=True), None, ValueError, "multiple of num_groups = 2.*top_k = 3"),
        (torch.rand(3, 8), Selection(2, 2, 1, in_each_group=True), None, ValueError, "all groups must be open.*open_groups = 1"),
        (torch.rand(3, 8), Selection(2), torch.rand(7), ValueError, r"bias must have shape \(8,\) on cpu, got \(7,\)"),
    ],
)
def test_what_does_not_fit_is_refused(scores, selection, bias, error, message):
    with pytest.raises(error, match=message):
        select_experts(scores, selection, bias)


def test_any_strides_and_no_tokens():
    scores = torch.rand(48, 6)
    ids, weights = select_experts(scores.T, Selection(4))
    again, same = select_experts(scores.T.contiguous(), Selection(4))
    assert torch.equal(ids, again) and torch.equal(weights, same)
    ids, weights = select_experts(torch.empty(0, 48), Selection(4))
    assert ids.shape == weights.shape == (0, 4)


def test_torch_compiles_it():
    torch.library.opcheck(torch.ops.flashmoe.select_experts.default, (torch.rand(5, 8), None, *Selection(2)))
    scores = torch.rand(5, 8)
    compiled = torch.compile(lambda s: select_experts(s, Selection(2, renormalize=True)), fullgraph=True, backend="aot_eager")
    for got, wanted in zip(compiled(scores), select_experts(scores, Selection(2, renormalize=True)), strict=True):
        assert torch.equal(got, wanted)
