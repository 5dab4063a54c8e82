"""Training a model around layers over a group, as docs/training.md says it: the parameters are one process' own."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import flashmoe

H, STEPS, TOKENS, MAX_NORM = 24, 4, 31, 0.05


class Model(nn.Module):
    """Two layers between dense ones, drawn alike wherever their experts are."""

    def __init__(self, group=None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.before, self.after = nn.Linear(H, H), nn.Linear(H, 1)
        self.layers = nn.ModuleList(flashmoe.MoE(H, 16, 6, 2, bias=True, group=group) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        for layer in self.layers:
            x = x + 10 * layer(x)
        return self.after(x).square().mean()


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(TOKENS, H, generator=torch.Generator().manual_seed(10 * step + rank))


def clip(model: nn.Module, own: dict[str, nn.Parameter]) -> float:
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.get_total_norm
    squares = norm([g for name, g in grads.items() if name in own]) ** 2
    dist.all_reduce(squares)
    squares += norm([g for name, g in grads.items() if name not in own]) ** 2
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), MAX_NORM, squares.sqrt())
    return float(squares.sqrt())


def train_over_ranks() -> tuple[dict[str, Tensor], list[int], list[float]]:
    """On one rank: its parameters in the end, its experts, and the norms."""
    model = Model(dist.group.WORLD)
    own = flashmoe.expert_parameters(model)
    for parameter in own.values():
        parameter.register_hook(lambda grad: grad / dist.get_world_size())
    DDP._set_params_and_buffers_to_ignore_for_model(model, list(own))
    wrapped, optimizer, norms = DDP(model), torch.optim.Adam(model.parameters()), []
    for step in range(STEPS):
        optimizer.zero_grad()
        wrapped(batch(step, dist.get_rank())).backward()
        norms.append(clip(model, own))
        optimizer.step()
    parameters = {name: one.detach() for name, one in model.named_parameters()}
    return parameters, model.layers[0].local_experts, norms


def test_two_ranks_train_as_one_process():
    model = Model()
    first = {name: one.detach().clone() for name, one in model.named_parameters()}
    optimizer, norms = torch.optim.Adam(model.parameters()), []
    for step in range(STEPS):
        optimizer.zero_grad()
        ((model(batch(step, 0)) + model(batch(step, 1))) / 2).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
    assert min(norms) > 2 * MAX_NORM, "a norm that is never clipped shows nothing"

    for parameters, experts, found_norms in flashmoe.launch(train_over_ranks, 2, timeout_s=100):
        torch.testing.assert_close(torch.tensor(found_norms), torch.tensor(norms), rtol=1e-4, atol=0)
        assert len(experts) == 3 and parameters.keys() == first.keys()
        for name, expected in model.named_parameters():
            of_expert = "layers" in name and "router" not in name
            expected, begun = (one[experts] if of_expert else one for one in (expected.detach(), first[name]))
            torch.testing.assert_close(parameters[name], expected, rtol=0, atol=2e-5)
            assert (expected - begun).abs().max() > 1e-3, f"{name} has not been trained"


def test_expert_parameters_are_those_that_no_other_rank_has():
    assert flashmoe.expert_parameters(Model()) == {}
    assert flashmoe.expert_parameters(nn.Linear(2, 2)) == {}
    names = ["down_bias", "down_proj", "gate_up_bias", "gate_up_proj"]
    of_layer, of_model = flashmoe.launch(_names_of_expert_parameters, 2, timeout_s=100)[0]
    assert of_layer == names and of_model == [f"layers.{layer}.{name}" for layer in range(2) for name in names]


def _names_of_expert_parameters() -> tuple[list[str], list[str]]:
    model = Model(dist.group.WORLD)
    return sorted(flashmoe.expert_parameters(model.layers[0])), sorted(flashmoe.expert_parameters(model))
