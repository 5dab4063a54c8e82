"""The layer against Hugging Face's MoE blocks: tiny configurations, copied weights, float32 and bfloat16."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from thread_ranks import make_team, on_ranks
from torch import nn
from transformers import DeepseekV3Config, MixtralConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import flashmoe
from flashmoe import MoE, moe_reference
from flashmoe.routing import GroupLimited, SoftmaxTopK

H, I, E, K = 64, 48, 16, 4


@dataclasses.dataclass
class Block:
    config: object
    block: type[nn.Module]
    router: Callable[[], nn.Module]


BLOCKS = {
    "mixtral": Block(
        MixtralConfig(hidden_size=H, intermediate_size=I, num_local_experts=E, num_experts_per_tok=K),
        MixtralSparseMoeBlock,
        lambda: SoftmaxTopK(H, E, K),
    ),
    "qwen3_moe": Block(
        Qwen3MoeConfig(
            hidden_size=H, moe_intermediate_size=I, num_experts=E, num_experts_per_tok=K, norm_topk_prob=True
        ),
        Qwen3MoeSparseMoeBlock,
        lambda: SoftmaxTopK(H, E, K),
    ),
    "olmoe": Block(
        OlmoeConfig(hidden_size=H, intermediate_size=I, num_experts=E, num_experts_per_tok=K, norm_topk_prob=False),
        OlmoeSparseMoeBlock,
        lambda: SoftmaxTopK(H, E, K, renormalize=False),
    ),
    "deepseek_v3": Block(
        DeepseekV3Config(
            hidden_size=H, moe_intermediate_size=I, n_routed_experts=E, num_experts_per_tok=K, n_group=4, topk_group=2,
            n_shared_experts=1, routed_scaling_factor=2.5, norm_topk_prob=True, num_attention_heads=4,
            num_key_value_heads=4,
        ),
        DeepseekV3MoE,
        lambda: GroupLimited(H, E, K, num_groups=4, topk_groups=2, routed_scaling_factor=2.5),
    ),
}  # fmt: skip


def build(name: str, dtype: torch.dtype, **options) -> tuple[nn.Module, MoE]:
    """Their block, and our layer with its weights."""
    made = BLOCKS[name]
    made.config._experts_implementation = "eager"
    theirs = made.block(made.config)
    for tensor in [*theirs.parameters(), *theirs.buffers()]:
        tensor.normal_(std=tensor.shape[-1] ** -0.5)
    theirs.to(dtype).eval()
    ours = MoE(H, I, E, K, router=made.router().to(dtype), dtype=dtype, **options)
    ours.router.weight.copy_(theirs.gate.weight)
    if name == "deepseek_v3":
        ours.router.selection_bias.copy_(theirs.gate.e_score_correction_bias)
    ours.gate_up_proj.copy_(theirs.experts.gate_up_proj[ours.local_experts])
    ours.down_proj.copy_(theirs.experts.down_proj[ours.local_experts])
    return theirs, ours


def routed_part(theirs: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Their block's output; where it adds a shared expert, without that."""
    if isinstance(theirs, DeepseekV3MoE):
        _, weights, ids = theirs.gate(x)
        flat = x.reshape(-1, H)
        routed = theirs.experts(flat, ids, weights).view(x.shape)
        assert torch.equal(theirs(x), routed + theirs.shared_experts(x))
        return routed
    return theirs(x)


@torch.no_grad()
@pytest.mark.parametrize("name", BLOCKS)
def test_float32_block(name):
    theirs, ours = build(name, torch.float32)
    x = torch.randn(3, 37, H)
    torch.testing.assert_close(ours(x), routed_part(theirs, x), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", BLOCKS)
def test_float32_block_learns_alike(name):
    """Gradients of tokens, router and experts are autograd's of their block."""
    with torch.no_grad():
        theirs, ours = build(name, torch.float32)
    x = torch.randn(3, 37, H, requires_grad=True)
    grad_y = torch.randn(x.shape)
    pairs = [(ours.router.weight, theirs.gate.weight), (ours.gate_up_proj, theirs.experts.gate_up_proj),
             (ours.down_proj, theirs.experts.down_proj)]  # fmt: skip
    found, expected = (
        torch.autograd.grad(y, [x, *leaves], grad_y)
        for y, leaves in zip((ours(x), routed_part(theirs, x)), zip(*pairs, strict=True), strict=True)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5 * float(other.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("name", BLOCKS)
def test_bfloat16_block_is_at_least_as_close_to_the_truth(name):
    """Their routing replayed: they round it, the activations and the running sum to bfloat16; we round twice."""
    theirs, ours = build(name, torch.bfloat16)
    x = torch.randn(3, 37, H).bfloat16()
    _, weights, ids = theirs.gate(x.reshape(-1, H))
    expected = routed_part(theirs, x)
    got = ours(x, flashmoe.Routing(ids, weights, E))
    truth = moe_reference(
        x, ids, weights, ours.gate_up_proj, ours.down_proj, compute_dtype=torch.float64
    )  # fmt: skip

    def error(y):
        return float((y.double() - truth).norm() / truth.norm())

    assert error(got) < 2.0**-8, f"ours is off by {error(got):.2e}, one rounding to bfloat16 is 2^-9 to 2^-8"
    assert error(got) <= error(expected), f"ours is off by {error(got):.2e}, theirs by {error(expected):.2e}"
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02 * float(truth.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("name", BLOCKS)
def test_bfloat16_block_with_our_own_routing(name):
    """Where their rounded logits leave no doubt about the experts, all of it agrees."""
    theirs, ours = build(name, torch.bfloat16)
    x = torch.randn(3, 37, H).bfloat16()
    _, _, ids = theirs.gate(x.reshape(-1, H))
    same = (ours.router(x).topk_ids.sort()[0] == ids.sort()[0]).all(-1)
    assert same.float().mean() > 0.9
    got, expected = ours(x).reshape(-1, H)[same], routed_part(theirs, x).reshape(-1, H)[same]
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("name", BLOCKS)
def test_float32_block_over_three_ranks(name):
    owners = [(5 * e) % 3 for e in range(E)]
    x = [torch.randn(tokens, H) for tokens in (20, 0, 33)]
    team = make_team(3)
    torch.manual_seed(1)
    theirs, whole = build(name, torch.float32)
    layers = [MoE(H, I, E, K, router=whole.router, group=group, expert_map=owners) for group in team]
    for layer in layers:
        layer.gate_up_proj.copy_(whole.gate_up_proj[layer.local_experts])
        layer.down_proj.copy_(whole.down_proj[layer.local_experts])

    @torch.no_grad()  # of the thread
    def call(rank, group):
        return layers[rank](x[rank])

    for rank, y in enumerate(on_ranks(team, call)):
        torch.testing.assert_close(y, routed_part(theirs, x[rank][None])[0], rtol=1e-5, atol=2e-6)
