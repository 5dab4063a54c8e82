"""The named shapes and the activations that `flashmoe run` feeds them."""

import pytest
import torch

from flashmoe import activations
from flashmoe.models import SHAPES


@pytest.mark.parametrize("name", ["mixtral-8x7b", "deepseek-v3", "llama4-scout"])
def test_shapes_are_those_of_the_published_configurations(name):
    transformers = pytest.importorskip("transformers")
    config = {
        "mixtral-8x7b": lambda: transformers.MixtralConfig(),
        "deepseek-v3": lambda: transformers.DeepseekV3Config(),
        "llama4-scout": lambda: transformers.Llama4TextConfig(),
    }[name]()  # their defaults are these models
    shape = SHAPES[name]
    assert shape.hidden_size == config.hidden_size and shape.activation == config.hidden_act
    assert shape.intermediate_size == getattr(config, "moe_intermediate_size", config.intermediate_size)
    assert shape.num_experts == getattr(config, "n_routed_experts", None) or config.num_local_experts
    assert shape.top_k == config.num_experts_per_tok
    if name == "deepseek-v3":
        assert shape.router_options == {
            "num_groups": config.n_group,
            "topk_groups": config.topk_group,
            "routed_scaling_factor": config.routed_scaling_factor,
        }


def test_every_shape_has_a_router_that_takes_its_options():
    from flashmoe.routing import make_router

    for shape in SHAPES.values():
        small = shape.scaled(64)
        router = make_router(small.router, small.hidden_size, small.num_experts, small.top_k, **small.router_options)
        routing = router(torch.randn(3, small.hidden_size))
        assert routing.topk_ids.shape == (3, shape.top_k), shape.name
        assert shape.source, shape.name


def test_text_is_the_same_each_time_and_skews_the_routing():
    first = activations.text_activations(256, 128, rank=0, seed=1)
    again = activations.text_activations(256, 128, rank=0, seed=1)
    assert torch.equal(first, again)
    assert torch.allclose(first.square().mean(1), torch.ones(256), atol=1e-3)
    ids = activations.text_token_ids(300, skip=100)
    assert torch.equal(ids[:156], activations.text_token_ids(256)[100:])
    other = activations.text_activations(256, 128, rank=1, seed=1)
    assert not torch.equal(first, other)
    noise = activations.random_activations(256, 128, seed=1)
    gate = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))
    busiest = [torch.bincount((x @ gate.T).topk(4).indices.flatten(), minlength=64).max() for x in (first, noise)]
    assert busiest[0] > 1.5 * busiest[1]


def test_a_state_depends_on_what_stands_before_it_and_not_on_what_follows():
    long, short = activations.text_activations(64, 128), activations.text_activations(32, 128)
    assert torch.allclose(long[:32], short, atol=1e-5)
    ids = activations.text_token_ids(64)
    same = (ids[None] == ids[:, None]).triu(1)
    similarity = (long @ long.T / 128)[same]  # cosines: every row has a root mean square of 1
    assert len(similarity) > 20 and similarity.mean() > 0.5 and (similarity < 0.97).float().mean() > 0.5
