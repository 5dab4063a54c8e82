"""What a call on a GPU asks of its arguments: on tensors that say they lie on one, so no GPU is needed."""

import gc
import re

import pytest
import torch
from layer_case import LayerCase
from thread_ranks import make_team
from torch._subclasses.fake_tensor import FakeTensorMode

import flashmoe
from flashmoe import _C, MoE, arguments, cuda_teams, groups
from flashmoe.virtual_ranks import VirtualRanks

T, H, I, E, K = 12, 32, 24, 8, 2
CUDA = torch.device("cuda", 0)
ON_THE_HOST = {"expert_map"}


def arguments_of_a_call() -> dict:
    case = LayerCase(H, I, E, K, (T,), bias=True)
    tensors = {"x": case.x[0], "topk_ids": case.topk_ids[0], "topk_weights": case.topk_weights[0]}
    return tensors | case.weights_of(0) | {"expert_map": torch.zeros(E, dtype=torch.int32)}


SHAPES = {name: (tensor.shape, tensor.dtype) for name, tensor in arguments_of_a_call().items()}


def on_gpu(**elsewhere) -> dict:
    """Arguments of a call on cuda:0, as fake tensors; inside of FakeTensorMode."""
    return {
        name: torch.empty(shape, dtype=dtype, device=elsewhere.get(name, "cpu" if name in ON_THE_HOST else CUDA))
        for name, (shape, dtype) in SHAPES.items()
    }


@pytest.fixture
def with_cuda(monkeypatch):
    monkeypatch.setattr(arguments, "BUILT_WITH_CUDA", True)


def test_a_build_without_cuda_says_so(monkeypatch):
    monkeypatch.setattr(arguments, "BUILT_WITH_CUDA", False)
    message = "x must be on the CPU: this build of flashmoe has no CUDA half"
    with FakeTensorMode(), pytest.raises(ValueError, match=message):
        flashmoe.fused_moe(**on_gpu())


def test_y_lies_where_x_does(with_cuda):
    with FakeTensorMode():
        given = on_gpu()
        y = flashmoe.fused_moe(**given)
        assert y.device == CUDA and y.shape == (T, H) and y.dtype == given["x"].dtype


@pytest.mark.parametrize("name", ["topk_ids", "topk_weights", "gate_up_proj", "down_proj", "gate_up_bias", "down_bias"])
@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_every_tensor_lies_on_the_device_of_x(name, device, with_cuda):
    message = f"{name} must be on the device of x, cuda:0, got {device}"
    with FakeTensorMode(), pytest.raises(ValueError, match=re.escape(message)):
        flashmoe.fused_moe(**on_gpu(**{name: device}))


def test_the_host_knows_the_placement(with_cuda):
    message = "expert_map must be on the CPU, also where x is on cuda:0, got cuda:0"
    with FakeTensorMode(), pytest.raises(ValueError, match=re.escape(message)):
        flashmoe.fused_moe(**on_gpu(expert_map=CUDA))


def test_a_layer_keeps_its_placement_on_the_host():
    layer = MoE(H, I, E, K, expert_map=[0] * E)
    assert layer.to("meta").expert_map.is_cpu
    assert layer.to_empty(device="cpu").expert_map.tolist() == [0] * E
    y = MoE(H, I, E, K, expert_map=[0] * E, device="meta")(torch.empty(T, H, device="meta"))
    assert y.shape == (T, H)


def test_ranks_on_cpus_take_no_tensors_on_gpus():
    group = make_team(2)[0]
    with FakeTensorMode():
        x = torch.empty(T, H, device=CUDA)
    message = r"x must be on the CPU, as the ranks of group 'team' are \(.*init\(device='cuda'\).*\), got cuda:0"
    with pytest.raises(ValueError, match=message):
        groups.call_on("team", group, x)
    (alone,) = make_team(1)
    for kind in ("forward", "backward"):
        queued = groups.call_on("alone", alone, x, kind)
        assert queued.func is cuda_teams.call and queued.args == (kind, "alone", 0, x.dtype)


def test_other_devices():
    with FakeTensorMode(), pytest.raises(ValueError, match="x must be on the CPU or on a CUDA device, got xpu"):
        flashmoe.fused_moe(**on_gpu(x="xpu"))


class Team:
    """Stands in for the core's: what it was asked, and what it answers."""

    def __init__(self, *asked, answer=None, **given):
        self.given, self.answer = given, answer

    def check(self):
        if self.answer:
            raise self.answer

    def stats(self, layer):
        return {"tokens_per_expert": [layer] * 3}


@pytest.fixture
def team(monkeypatch):
    gc.collect()  # groups of other tests that failed, and that only a cycle still holds
    team = Team()
    monkeypatch.setattr(cuda_teams, "_local", {(None, 0): team})
    monkeypatch.setattr(cuda_teams, "_watched", {team})
    return team


def test_check_tells_of_gpus_and_a_failed_team_is_made_anew(team):
    flashmoe.check()
    team.answer = ValueError("topk_ids must lie in [0, 8)")
    with pytest.raises(ValueError, match="topk_ids"):
        flashmoe.check()
    assert cuda_teams._local == {(None, 0): team}, "a bad id is no reason for a new team"
    team.answer = flashmoe.PeerError("no progress")
    with pytest.raises(flashmoe.PeerError, match="no progress"):
        flashmoe.check()
    assert cuda_teams._local == {}


def test_statistics_come_from_where_the_last_call_ran(team, monkeypatch):
    layer = MoE(H, I, E, K)
    monkeypatch.setattr(cuda_teams, "device_of_layer", {(None, layer.layer): 0})
    assert layer.stats == {"tokens_per_expert": [layer.layer] * 3}
    with torch.no_grad():
        layer(torch.randn(T, H))
    assert sum(layer.stats["tokens_per_expert"]) == T * K


@pytest.mark.parametrize("legacy", [True, False])
def test_tf32_where_torch_may_use_it(legacy, monkeypatch):
    assert not cuda_teams.may_round_to_tf32(torch.float32)
    if legacy:
        torch.set_float32_matmul_precision("high")
    else:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert cuda_teams.may_round_to_tf32(torch.float32)
        assert not cuda_teams.may_round_to_tf32(torch.bfloat16)
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"


@pytest.mark.parametrize(("given", "waits"), [({}, (10.0, 20.0)), ({"timeout_s": 0.5}, (0.5, 0.5))])
def test_virtual_ranks_wait_as_long_as_the_environment_says(given, waits, monkeypatch):
    monkeypatch.setattr(_C, "CudaTeam", Team, raising=False)
    monkeypatch.setattr(cuda_teams, "has_cuda", lambda: True)
    monkeypatch.setenv("FLASHMOE_TIMEOUT_S", "10")
    monkeypatch.setenv("FLASHMOE_ENTRY_TIMEOUT_S", "20")
    limits = {"max_tokens": 1, "max_wire_bytes": 4, "max_top_k": 1, "max_experts": 2}
    team = VirtualRanks(2, **limits, device=0, **given).team
    assert (team.given["timeout_s"], team.given["entry_timeout_s"]) == waits


@pytest.mark.parametrize("text", ["-1", "many", "1.5"])
@pytest.mark.parametrize(
    ("variable", "what", "asked", "unit"),
    [
        ("FLASHMOE_SM_MARGIN", "multiprocessors", cuda_teams.sm_margin_asked, 1),
        ("FLASHMOE_BACKWARD_MIB", "MiB", cuda_teams.backward_bytes_asked, 2**20),
    ],
)
def test_a_number_that_is_none(variable, what, asked, unit, text, monkeypatch):
    assert asked() == 0
    monkeypatch.setenv(variable, text)
    with pytest.raises(ValueError, match=f"{variable} must be a number of {what}, 0 or more, got '{text}'"):
        asked()
    monkeypatch.setenv(variable, "12")
    assert asked() == 12 * unit
