"""Whole models of transformers with their experts computed here, against the same models as they come: tiny
configurations, float32."""

import importlib
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn

import flashmoe
from flashmoe import hugging_face

H, I, E, K, VOCABULARY = 64, 48, 8, 2, 128
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": H, "intermediate_size": I, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "num_experts_per_tok": K, "initializer_range": 0.2,
}  # fmt: skip
CONFIGS = {
    "mixtral": transformers.MixtralConfig(**COMMON, num_local_experts=E),
    "qwen3_moe": transformers.Qwen3MoeConfig(**COMMON, moe_intermediate_size=I, num_experts=E, head_dim=16),
    "olmoe": transformers.OlmoeConfig(**COMMON, num_experts=E),
    "deepseek_v3": transformers.DeepseekV3Config(
        **COMMON, moe_intermediate_size=I, n_routed_experts=E, n_group=4, topk_group=2, first_k_dense_replace=1,
        kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
    ),
}  # fmt: skip
ACTIVATIONS = ["silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu"]


@pytest.fixture(autouse=True)
def registered():
    hugging_face.register()
    hugging_face.register()  # again does no harm


def build(name: str) -> nn.Module:
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[name], experts_implementation="eager")


def text(seed: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (2, 19), generator=torch.Generator().manual_seed(seed))


def learn(model: nn.Module, ids: Tensor) -> tuple[float, dict[str, Tensor]]:
    """The loss, and the gradients of all parameters."""
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    return float(loss.detach()), {name: whole(one.grad) for name, one in model.named_parameters() if one.grad is not None}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and any("experts" in name for name in found)
    for name, one in expected.items():
        message = f"the gradient of {name}: {{}}".format
        torch.testing.assert_close(found[name], one, rtol=1e-4, atol=2e-5 * float(one.abs().max()), msg=message)


@pytest.mark.parametrize("name", CONFIGS)
def test_model_learns_and_writes_alike(name):
    model, ids = build(name), text(2)
    loss, grads = learn(model, ids)
    written = model.eval().generate(ids, max_new_tokens=8, do_sample=False)
    model.set_experts_implementation("flashmoe")
    with torch.profiler.profile() as profile:
        found_loss, found = learn(model, ids)
    assert any(event.key == "flashmoe::moe_local" for event in profile.key_averages()), "experts were computed elsewhere"
    assert abs(found_loss - loss) < 1e-5
    assert_alike(found, grads)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), written)


def test_whole_model_compiles(fresh_compiler):
    model, ids = build("qwen3_moe").eval(), text(3)
    with torch.no_grad():
        expected = model(ids).logits
        model.set_experts_implementation("flashmoe")
        found = torch.compile(model, fullgraph=True)(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def experts_of(model: str, name: str, **config: object) -> nn.Module:
    """One experts module, its weights small random numbers."""
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    config = {
        "num_experts": E, "n_routed_experts": E, "num_local_experts": E, "moe_num_experts": E, "hidden_size": H,
        "moe_hidden_size": H, "moe_intermediate_size": I, "intermediate_size": I, "moe_latent_size": None,
        "hidden_act": "silu", "mlp_hidden_act": "relu2", "swiglu_alpha": 1.7, "swiglu_limit": 7.0, "post_norm_eps": 1e-5,
        "_experts_implementation": "eager",
    } | config  # fmt: skip
    experts = getattr(module, name)(SimpleNamespace(**config))
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    return experts


@torch.no_grad()
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_activations_and_entries_that_name_no_expert(activation, gated):
    if gated:
        experts = experts_of("qwen3_moe", "Qwen3MoeExperts", hidden_act=activation)
    else:
        experts = experts_of("nemotron_h", "NemotronHExperts", mlp_hidden_act=activation)
    x, ids, weights = torch.randn(37, H), torch.randint(0, E + 1, (37, K)), torch.rand(37, K)
    if not gated:
        ids.clamp_(max=E - 1)  # their own loop knows no such entry
    expected = experts(x, ids, weights)
    experts.config._experts_implementation = "flashmoe"
    torch.testing.assert_close(experts(x, ids, weights), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "name", "why"),
    [
        ("aria", "AriaExperts", r"their weights are \[E, inputs, outputs\]"),
        ("gpt_oss", "GptOssExperts", r"their weights are \[E, inputs, outputs\]"),
        ("minimax_m3_vl", "MiniMaxM3VLExperts", "their gate is a function of their own"),
        ("nemotron_h", "NemotronHExperts", "their activation is ReLUSquaredActivation"),
    ],
)
def test_experts_of_another_kind_are_refused_by_name(model, name, why):
    experts = experts_of(model, name, _experts_implementation="flashmoe")
    with pytest.raises(NotImplementedError, match=f"flashmoe does not compute {name}: {why}"):
        experts(torch.randn(3, H), torch.zeros(3, K, dtype=torch.int64), torch.rand(3, K))


# --- experts spread over two processes ------------------------------------------------------------------------


def load_and_learn(path: str, sizes: list[dict[str, int]]) -> list[tuple[float, dict[str, Tensor], list[int]]]:
    """On each rank, with each of the sizes: the loss of its batch, all gradients, and the shape of its experts."""
    from transformers.distributed import DistributedConfig

    hugging_face.register()
    found = []
    for size in sizes:
        config = DistributedConfig(**size, ep_size=2, ep_implementation="flashmoe")
        model = transformers.AutoModelForCausalLM.from_pretrained(path, distributed_config=config)
        model.save_pretrained(f"{path}/again")
        loss, grads = learn(model, text(4 + (dist.get_rank() if "fsdp_size" in size else 0)))
        found.append((loss, grads, list(model.model.layers[0].mlp.experts.gate_up_proj.to_local().shape)))
    return found


@pytest.mark.skipif(hugging_face.EPImplementationInterface is None, reason="transformers 5.23 has such a choice first")
def test_experts_of_two_processes(tmp_path):
    model = build("qwen3_moe")
    model.save_pretrained(tmp_path)
    kept = model.state_dict()
    # Each rank with a batch of its own, over which gradients are a mean; then both with one batch.
    by_rank = flashmoe.launch(load_and_learn, 2, str(tmp_path), [{"fsdp_size": 2}, {"tp_size": 2}], timeout_s=200)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    assert kept.keys() == again.keys() and all(torch.equal(one, again[name]) for name, one in kept.items())
    apart = [learn(model, text(4 + rank)) for rank in (0, 1)]
    mean = {name: (apart[0][1][name] + apart[1][1][name]) / 2 for name in apart[0][1]}
    for rank, ((own_loss, own, shape), (same_loss, same, _)) in enumerate(by_rank):
        assert shape == [E // 2, 2 * I, H], "each rank holds its own experts alone"
        assert abs(own_loss - apart[rank][0]) < 1e-5 and abs(same_loss - apart[0][0]) < 1e-5
        assert_alike(own, mean)
        assert_alike(same, apart[0][1])
