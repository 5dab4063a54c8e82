"""The adapters to other libraries, against fakes that hold them to what those libraries' sources ask of a caller.

The fakes compute by the reference, from the layout of weights and routing that the library documents.
"""

import contextlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from baseline_case import drawn_problem, worst_error

from flashmoe import baselines
from flashmoe.baselines import libraries
from flashmoe.reference import moe_reference

BF16 = torch.bfloat16


@pytest.fixture
def on_gpu(monkeypatch):
    """As far as the adapters ask."""
    monkeypatch.setattr(baselines.Problem, "needs_gpu", lambda problem: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    libraries._start_liger.cache_clear()


@pytest.fixture
def install(monkeypatch):
    def into_sys(name, **contents):
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)

    return into_sys


def results(name, problem):
    return [call() for call in baselines.baseline(name).make(problem)]


def test_liger_cute(on_gpu, install):
    said = []

    def moe_fused(x, ids, weights, gate, up, down, num_experts, top_k):
        assert (x.dtype, ids.dtype, weights.dtype) == (BF16, torch.int32, BF16)
        assert gate.shape == up.shape == (num_experts, 24, 32) and down.shape == (num_experts, 32, 24) and top_k == 2
        assert gate[0].is_contiguous() and up[0].is_contiguous() and down.is_contiguous() and ids.is_contiguous()
        assert said[-1] == ("configured", {"max_tokens": 5, "hidden_dim": 32, "max_num_experts": 3, "max_top_k": 2,
                                           "num_pes": 1, "num_hosts": 1, "gpus_per_host": 1})  # fmt: skip
        return moe_reference(x, ids, weights, torch.cat((gate, up), 1), down).to(x.dtype)

    install("liger_kernel.ops.cute.ops.moe", moe_fused=moe_fused)
    install(
        "liger_cute_kernels.tvm_ffi", uniqueid_nbytes=lambda: 128, get_uniqueid=lambda address: said.append("id"),
        init_with_uniqueid=lambda rank, ranks, address: said.append(("started", rank, ranks)),
        pool_clear_all=lambda: said.append("cleared"),
        moe_configure_symmetric=lambda **sizes: said.append(("configured", sizes)),
    )  # fmt: skip
    problem = drawn_problem(5, 2, 3, 32, 24, dtype=BF16)
    assert worst_error(problem, results("liger-cute", problem)) < 0.02
    assert worst_error(problem, results("liger-cute", problem)) < 0.02
    assert said.count(("started", 0, 1)) == said.count("id") == 1 and said.count("cleared") == 2


def test_deepgemm(on_gpu, install):
    height = 8

    def grouped(rows, weights, out, layout):
        assert rows.dtype == weights.dtype == out.dtype == BF16 and layout.dtype == torch.int32
        assert len(rows) == len(layout) == len(out) and len(rows) % height == 0 and rows.is_contiguous()
        out.fill_(torch.nan)
        for begin in range(0, len(rows), height):
            owner, block = int(layout[begin]), layout[begin : begin + height]
            assert set(block.tolist()) <= {owner, -1}
            if owner >= 0:  # the kernel computes a block if its first row has an expert
                out[begin : begin + height] = rows[begin : begin + height] @ weights[owner].T

    align = {"get_mk_alignment_for_contiguous_layout": lambda: height}
    install("deep_gemm", m_grouped_bf16_gemm_nt_contiguous=grouped, **align)
    for how in ({}, {"gated": False, "activation": "relu"}, {"used": 2}):
        problem = drawn_problem(21, 2, 5, 64, 64, dtype=BF16, **how)
        assert worst_error(problem, results("deepgemm", problem)) < 0.02


def test_sonicmoe(on_gpu, install):
    def layer(
        x, scores, token, expert, w1, b1, w2, b2, *, E, stream_id, activation_type, is_inference_mode_enabled,
        concat_layout,
    ):  # fmt: skip
        assert concat_layout and is_inference_mode_enabled and stream_id == 7 and b1 is None and b2 is None
        assert token.dtype == expert.dtype == torch.int32 and scores.dtype == torch.float32 and scores.ndim == 1
        assert torch.equal(token, token.sort().values) and w1.shape[2] == w2.shape[2] == E
        gate_up, down = w1.permute(2, 0, 1), w2.permute(2, 0, 1)
        y = torch.zeros_like(x, dtype=torch.float32)
        for row, one, weight in zip(token.tolist(), expert.tolist(), scores.tolist(), strict=True):
            ids, weights = torch.tensor([[one]]), torch.tensor([[weight]])
            y[row] += moe_reference(x[row : row + 1], ids, weights, gate_up, down, activation=activation_type)[0]
        return y.to(x.dtype), None

    install("sonicmoe.functional", moe_general_routing_inputs=layer)
    install("sonicmoe.enums", ActivationType=SimpleNamespace(SWIGLU="silu", GEGLU="gelu", REGLU="relu"))
    for activation in ("silu", "relu"):
        problem = drawn_problem(6, 2, 4, 32, 16, dtype=BF16, activation=activation)
        assert worst_error(problem, results("sonicmoe", problem)) < 0.02
    with pytest.raises(baselines.Skipped, match="is for gated silu, gelu or relu"):
        results("sonicmoe", drawn_problem(6, 2, 4, 32, 16, dtype=BF16, gated=False))


@pytest.mark.parametrize(("gated", "activation", "kind"), [
    (True, "silu", "Swiglu"), (True, "gelu_tanh", "GegluTanh"), (False, "relu", "Relu"),
])  # fmt: skip
def test_flashinfer(on_gpu, install, gated, activation, kind):
    tuned = []

    def layer(x, ids, weights, fc1, fc2, dtype, *, quant_scales, output, activation_type, tune_max_num_tokens):
        assert (ids.dtype, weights.dtype, dtype, quant_scales) == (torch.int32, torch.float32, x.dtype, None)
        assert activation_type == kind and tune_max_num_tokens == len(x) and fc1.is_contiguous()
        if gated:  # the gate's rows are the last
            up, gate = fc1.chunk(2, dim=1)
            fc1 = torch.cat((gate, up), 1)
        output.copy_(moe_reference(x, ids, weights, fc1, fc2, activation=activation, gated=gated))

    @contextlib.contextmanager
    def autotune(tune):
        tuned.append(tune)
        yield

    names = ("Gelu", "Relu", "Silu", "Swiglu", "Geglu", "GegluTanh")
    install("flashinfer.fused_moe", cutlass_fused_moe=layer)
    install("flashinfer.autotuner", autotune=autotune)
    install("flashinfer.tllm_enums", ActivationType=SimpleNamespace(**{name: name for name in names}))
    problem = drawn_problem(6, 2, 4, 32, 16, dtype=BF16, gated=gated, activation=activation)
    assert worst_error(problem, results("flashinfer", problem)) < 0.02 and tuned == [True]
    with pytest.raises(baselines.Skipped, match="has no gated relu"):
        results("flashinfer", drawn_problem(6, 2, 4, 32, 16, dtype=BF16, activation="relu"))


def test_tutel(on_gpu, install):
    def plan(scores, *, top_k, loss_fn, capacity_factor, normalize_gate):
        assert loss_fn is None and capacity_factor == 0.0 and normalize_gate is False
        gates, ids = scores.topk(top_k)
        experts, counts, places = scores.shape[1], [0] * scores.shape[1], []
        for one in ids.flatten().tolist():
            places.append(counts[one])
            counts[one] += 1
        return (experts, ids, torch.tensor(places).view_as(ids), gates, max(counts)), None

    def encode(x, planned):
        experts, ids, places, _, capacity = planned
        out = x.new_zeros(experts, capacity, x.shape[1])
        out[ids, places] = x.unsqueeze(1).expand(-1, ids.shape[1], -1)
        return out

    def decode(out, planned):
        _, ids, places, gates, _ = planned
        assert out.is_contiguous()
        return (out[ids, places].float() * gates.unsqueeze(-1)).sum(1).to(out.dtype)

    install("tutel.moe", top_k_routing=plan, fast_encode=encode, fast_decode=decode)
    for how in ({}, {"gated": False, "activation": "gelu"}, {"dtype": BF16}):
        problem = drawn_problem(9, 2, 4, 32, 16, **how)
        assert worst_error(problem, results("tutel", problem)) < (0.02 if how.get("dtype") else 1e-5)


@pytest.mark.parametrize(("name", "missing"), [
    ("liger-cute", r"needs liger_cute_kernels \(its wheel is built from"),
    ("deepgemm", r"needs deep_gemm \(github.com/deepseek-ai/DeepGEMM"),
    ("sonicmoe", r"needs sonicmoe \(pip install sonic-moe"),
    ("flashinfer", r"needs flashinfer \(pip install flashinfer-python\)"),
    ("tutel", r"needs tutel \(pip install .*microsoft/tutel"),
])  # fmt: skip
def test_missing_library_says_where_it_comes_from(on_gpu, name, missing):
    with pytest.raises(baselines.Skipped, match=missing):
        results(name, drawn_problem(3, 1, 2, 64, 64, dtype=BF16))


@pytest.mark.parametrize(("name", "problem", "reason"), [
    ("liger-cute", drawn_problem(3, 1, 2, 64, 64, dtype=BF16, gated=False), "is for gated silu"),
    ("liger-cute", drawn_problem(3, 1, 2, 64, 64), "is for bfloat16"),
    ("liger-cute", drawn_problem(3, 1, 2, 64, 60, dtype=BF16), "multiples of 8"),
    ("deepgemm", drawn_problem(3, 1, 2, 64, 64, dtype=torch.float16), "is for bfloat16"),
    ("deepgemm", drawn_problem(3, 1, 2, 64, 48, dtype=BF16), "multiples of 64"),
    ("flashinfer", drawn_problem(3, 1, 2, 64, 64), "is for bfloat16 or float16"),
    ("tutel", drawn_problem(30, 1, 2, 64, 64, dropped=0.5), "drops nothing"),
    ("triton", drawn_problem(30, 1, 2, 64, 64, dropped=0.5), "drops nothing"),
])  # fmt: skip
def test_what_a_library_is_not_for_is_said(on_gpu, name, problem, reason):
    with pytest.raises(baselines.Skipped, match=reason):
        results(name, problem)
