"""Other libraries on one GPU, where they are installed: written from their sources, called as those document it.

Weights are brought into a library's layout once, before anything is timed, as loading a model would.
"""

import functools
import importlib
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..routing import Routing
from .padded_blocks import padded_blocks
from .problem import Call, Problem, Skipped


def _imported(module: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Skipped(f"needs {module.split('.')[0]} ({where}): {error}") from error


@functools.cache
def _start_liger(core: ModuleType) -> None:
    unique_id = torch.empty(core.uniqueid_nbytes(), dtype=torch.uint8)
    core.get_uniqueid(unique_id.data_ptr())
    core.init_with_uniqueid(0, 1, unique_id.data_ptr())


def liger_cute(problem: Problem) -> list[Call]:
    """liger-kernel's fused persistent kernel, as a world of one rank; NVSHMEM is started for it."""
    problem.needs_gpu()
    problem.needs_dtype(torch.bfloat16)
    problem.needs_gated_silu()
    problem.needs_every_entry()
    problem.needs_multiple(8)
    where = "its wheel is built from liger_cute_kernels/ of github.com/linkedin/Liger-Kernel"
    core = _imported("liger_cute_kernels.tvm_ffi", where)
    moe_fused = _imported("liger_kernel.ops.cute.ops.moe", "pip install liger-kernel").moe_fused
    _start_liger(core)
    core.pool_clear_all()  # what an earlier layer needed may be too small for this one
    shape = problem.shape
    core.moe_configure_symmetric(
        max_tokens=problem.num_tokens, hidden_dim=shape.hidden_size, max_num_experts=shape.num_experts,
        max_top_k=shape.top_k, num_pes=1, num_hosts=1, gpus_per_host=1,
    )  # fmt: skip
    gate, up = problem.gate_up_proj.chunk(2, dim=1)
    return [
        partial(moe_fused, x, routing.topk_ids.int(), routing.topk_weights.to(x.dtype), gate, up, problem.down_proj,
                shape.num_experts, shape.top_k)
        for x, routing in problem.inputs
    ]  # fmt: skip


def deepgemm(problem: Problem) -> list[Call]:
    """DeepGEMM's grouped product twice; rows are gathered, activated and added up by torch."""
    problem.needs_gpu()
    problem.needs_dtype(torch.bfloat16)
    problem.needs_every_entry()
    problem.needs_multiple(64)
    deep_gemm = _imported("deep_gemm", "github.com/deepseek-ai/DeepGEMM, install.sh")
    height, shape = deep_gemm.get_mk_alignment_for_contiguous_layout(), problem.shape

    def product(rows: Tensor, weights: Tensor, expert: Tensor) -> Tensor:
        out = rows.new_empty(rows.shape[0], weights.shape[1])
        deep_gemm.m_grouped_bf16_gemm_nt_contiguous(rows, weights, out, expert)
        return out

    def call(x: Tensor, routing: Routing, weights: Tensor) -> Tensor:
        (num_tokens, top_k), pairs = routing.topk_ids.shape, routing.topk_ids.numel()
        pair, expert = padded_blocks(routing.topk_ids, shape.num_experts, height)
        expert = torch.where(pair < pairs, expert.repeat_interleave(height), -1).int()
        rows = x[pair.clamp(max=pairs - 1) // top_k]
        out = product(problem.activate(product(rows, problem.gate_up_proj, expert)), problem.down_proj, expert)
        place = torch.empty(pairs + 1, dtype=torch.int64, device=x.device)
        place.scatter_(0, pair.long(), torch.arange(len(pair), device=x.device))
        return (out[place[:pairs]].view(num_tokens, top_k, -1) * weights).sum(1)

    return [partial(call, x, routing, routing.topk_weights.to(x.dtype).unsqueeze(-1)) for x, routing in problem.inputs]


def sonicmoe(problem: Problem) -> list[Call]:
    """SonicMoE's layer for routing from outside: a list of (token, expert, weight), by token."""
    problem.needs_gpu()
    problem.needs_dtype(torch.bfloat16, torch.float16)
    problem.needs_every_entry()
    if not problem.shape.gated or problem.shape.activation not in ("silu", "gelu", "relu"):
        raise Skipped("is for gated silu, gelu or relu")
    where = "pip install sonic-moe; from the version whose moe_general_routing_inputs has concat_layout"
    moe = _imported("sonicmoe.functional", where).moe_general_routing_inputs
    kinds = _imported("sonicmoe.enums", where).ActivationType
    kind = {"silu": kinds.SWIGLU, "gelu": kinds.GEGLU, "relu": kinds.REGLU}[problem.shape.activation]
    gate_up, down = (weights.permute(1, 2, 0) for weights in (problem.gate_up_proj, problem.down_proj))

    def call(x: Tensor, scores: Tensor, token: Tensor, expert: Tensor) -> Tensor:
        return moe(
            x, scores, token, expert, gate_up, None, down, None, E=problem.shape.num_experts,
            stream_id=torch.cuda.current_stream().cuda_stream, activation_type=kind, concat_layout=True,
            is_inference_mode_enabled=not problem.backward,
        )[0]  # fmt: skip

    calls = []
    for x, routing in problem.inputs:
        token = torch.arange(len(x), dtype=torch.int32, device=x.device).repeat_interleave(problem.shape.top_k)
        calls.append(partial(call, x, routing.topk_weights.float().flatten(), token, routing.topk_ids.int().flatten()))
    return calls


def flashinfer(problem: Problem) -> list[Call]:
    """FlashInfer's CUTLASS layer, after its own autotuner has seen these sizes; it wants the gate's rows last."""
    problem.needs_gpu()
    problem.needs_dtype(torch.bfloat16, torch.float16)
    problem.needs_every_entry()
    problem.needs_multiple(8)
    where = "pip install flashinfer-python"
    moe = _imported("flashinfer.fused_moe", where).cutlass_fused_moe
    autotune = _imported("flashinfer.autotuner", where).autotune
    kinds = _imported("flashinfer.tllm_enums", where).ActivationType
    shape, gate_up = problem.shape, problem.gate_up_proj
    names = {("silu", True): "Swiglu", ("gelu", True): "Geglu", ("gelu_tanh", True): "GegluTanh",
             ("silu", False): "Silu", ("gelu", False): "Gelu", ("relu", False): "Relu"}  # fmt: skip
    name = names.get((shape.activation, shape.gated))
    if name is None:
        raise Skipped(f"has no {'gated ' if shape.gated else ''}{shape.activation}")
    if shape.gated:
        gate_up = torch.cat(gate_up.chunk(2, dim=1)[::-1], dim=1)

    def call(x: Tensor, ids: Tensor, weights: Tensor, y: Tensor) -> Tensor:
        moe(x, ids, weights, gate_up, problem.down_proj, x.dtype, quant_scales=None, output=y,
            activation_type=getattr(kinds, name), tune_max_num_tokens=problem.num_tokens)  # fmt: skip
        return y

    calls = [
        partial(call, x, routing.topk_ids.int(), routing.topk_weights.float(), torch.empty_like(x))
        for x, routing in problem.inputs
    ]
    with autotune(True):
        calls[0]()
    return calls


def tutel(problem: Problem) -> list[Call]:
    """Tutel's encoding into equally many rows for each expert, as many as the busiest has; products by torch."""
    problem.needs_gpu()
    problem.needs_every_entry()
    tutel_moe = _imported("tutel.moe", "pip install --no-build-isolation git+https://github.com/microsoft/tutel@main")
    gate_up, down = (weights.transpose(1, 2) for weights in (problem.gate_up_proj, problem.down_proj))

    def scored(x: Tensor, routing: Routing) -> Tensor:
        none = x.new_zeros(len(x), problem.shape.num_experts, dtype=torch.float32)
        return none.scatter(1, routing.topk_ids.long(), routing.topk_weights.float())

    def call(x: Tensor, scores: Tensor) -> Tensor:
        # A capacity factor of 0 drops nothing.
        planned: tuple[Any, Any] = tutel_moe.top_k_routing(
            scores, top_k=problem.shape.top_k, loss_fn=None, capacity_factor=0.0, normalize_gate=False
        )
        rows = tutel_moe.fast_encode(x, planned[0])
        return tutel_moe.fast_decode(torch.bmm(problem.activate(torch.bmm(rows, gate_up)), down), planned[0])

    if problem.backward:
        return [lambda x=x, routing=routing: call(x, scored(x, routing)) for x, routing in problem.inputs]
    return [partial(call, x, scored(x, routing)) for x, routing in problem.inputs]
