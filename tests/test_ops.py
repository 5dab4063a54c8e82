"""The operators under torch: opcheck, torch.compile, autograd, threads, forks."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from layer_case import LayerCase, assert_same_bits
from thread_ranks import make_team, on_ranks

import flashmoe
from flashmoe import MoE, Routing, backward, groups, ops

H, I, E, K = 32, 24, 8, 2
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def one_rank():
    (group,) = make_team(1)
    return group


def operator(kind: str, group):
    """(the operator, its last arguments)."""
    if kind == "local":
        return torch.ops.flashmoe.moe_local.default, ()
    return torch.ops.flashmoe.moe_ep.default, (groups.name_of(group),)


def arguments(num_tokens: int, *, bias=False, owners=False, requires_grad=False, dtype=torch.float32):
    case = LayerCase(H, I, E, K, (num_tokens,), bias=bias, dtype=dtype)
    tensors = [case.x[0], case.topk_ids[0], case.topk_weights[0], case.gate_up_proj, case.down_proj]
    if requires_grad:
        for index in (0, 2, 3, 4):
            tensors[index].requires_grad_()
    expert_map = torch.zeros(E, dtype=torch.int32) if owners else None
    return (*tensors, case.gate_up_bias, case.down_bias, expert_map, "silu", True, 3)


# --- torch.library --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens, options", [(5, {}), (0, {}), (7, {"bias": True, "owners": True})], ids=str)
@pytest.mark.parametrize("kind", ["local", "ep"])
def test_opcheck(kind, num_tokens, options, one_rank):
    op, more = operator(kind, one_rank)
    results = torch.library.opcheck(op, (*arguments(num_tokens, **options), *more))
    assert set(results.values()) == {"SUCCESS"} and len(results) == 4


@pytest.mark.parametrize("num_tokens, options", [(5, {}), (0, {}), (7, {"bias": True, "owners": True})], ids=str)
@pytest.mark.parametrize("kind", ["local", "ep"])
def test_opcheck_with_gradients(kind, num_tokens, options, one_rank):
    op, more = operator(kind, one_rank)
    args = (*arguments(num_tokens, requires_grad=True, **options), *more)
    results = torch.library.opcheck(op, args)
    assert set(results.values()) == {"SUCCESS"} and len(results) == 4


@pytest.mark.parametrize("kind", ["local", "ep"])
def test_operator_carries_gradients_as_the_function_does(kind, one_rank):
    op, more = operator(kind, one_rank)
    args = arguments(5, requires_grad=True)
    leaves = [one for one in args[:5] if one.requires_grad]
    with torch.no_grad():
        expected = op(*args, *more)
    keywords = {"group": one_rank} if kind == "ep" else {}
    gradients = []
    for y in (op(*args, *more), flashmoe.fused_moe(*args[:5], **keywords)):
        assert_same_bits(y.detach(), expected)
        gradients.append(torch.autograd.grad(y.sum(), leaves))
    for one, other in zip(*gradients, strict=True):
        assert_same_bits(one, other)


def test_shapes_alone_on_the_meta_device():
    args = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments(5)]
    y = flashmoe.fused_moe(*args[:5])
    assert y.device.type == "meta" and y.shape == (5, H)


# --- torch.compile --------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """The layer number of every call that reaches the core."""
    seen, forward = [], ops._forward

    def spy(*args):
        seen.append(args[-1])
        return forward(*args)

    monkeypatch.setattr(ops, "_forward", spy)
    return seen


@torch.no_grad()
@pytest.mark.parametrize("kind", ["local", "ep"])
def test_compiled_layer_with_changing_token_counts(kind, one_rank, fresh_compiler):
    layer = MoE(H, I, E, K, bias=True, group=one_rank if kind == "ep" else None)
    compiled = torch.compile(lambda x: layer(x.tanh()) * 2, fullgraph=True, backend="aot_eager")
    for shape in ((5, H), (9, H), (0, H), (1, H), (2, 3, H), (4, 5, H)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), layer(x.tanh()) * 2)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", ["local", "ep"])
def test_compiled_training_step(kind, backend, one_rank, fresh_compiler):
    layers = [MoE(H, I, E, K, bias=True, group=one_rank if kind == "ep" else None) for _ in range(2)]
    leaves = [parameter for layer in layers for parameter in layer.parameters()]

    def step(x):
        return layers[1](layers[0](x.tanh()) * 2) + x

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for num_tokens in (9, 5):
        x = torch.randn(num_tokens, H, requires_grad=True)
        found, expected = (torch.autograd.grad(call(x).square().sum(), [x, *leaves]) for call in (compiled, step))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_compiled_backward_calls_of_a_group_are_kept_in_order(one_rank, fresh_compiler, monkeypatch):
    layers = [MoE(H, I, E, K, group=one_rank) for _ in range(3)]
    seen, core = [], backward._backward
    monkeypatch.setattr(backward, "_backward", lambda *args: seen.append(args[-2]) or core(*args))
    routing = Routing(torch.randint(0, E, (5, K)), torch.rand(5, K), E)

    def step(x):
        return layers[2](x, routing) + layers[0](x, routing) + layers[1](layers[0](x, routing), routing)

    orders = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x = torch.randn(5, H, requires_grad=True)
        call(x).sum().backward()
        orders.append(seen.copy())
        seen.clear()
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(layers[i].layer for i in (0, 0, 1, 2))


@torch.no_grad()
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_calls_of_a_group_are_kept_single_and_in_order(backend, one_rank, calls, fresh_compiler):
    layers = [MoE(H, I, E, K, group=one_rank) for _ in range(3)]
    alone = MoE(H, I, E, K)
    routing = Routing(torch.randint(0, E, (5, K)), torch.rand(5, K), E)

    def step(x):
        layers[2](x, routing)  # unused
        alone(x, routing)  # unused, and nobody else's business
        first = layers[0](x, routing)
        again = layers[0](x, routing)  # the same call twice
        layers[1](first, routing)  # unused
        return first + again

    x = torch.randn(5, H)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    y = compiled(x)
    expected_calls = [layers[i].layer for i in (2, 0, 0, 1)]
    assert calls == expected_calls
    compiled(x)
    assert calls == expected_calls * 2
    torch.testing.assert_close(y, 2 * layers[0](x, routing))


@pytest.mark.parametrize("ignored", ["no_tokens", "unused"])
def test_compiled_ranks_that_differ(ignored, fresh_compiler):
    """One rank has no tokens, or ignores its result: its part in the call stays."""
    team = make_team(2)
    layers = [MoE(H, I, E, K, group=group) for group in team]
    tokens = (5, 0 if ignored == "no_tokens" else 7)
    x = [torch.randn(t, H) for t in tokens]
    routings = [Routing(torch.randint(0, E, (t, K)), torch.rand(t, K), E) for t in tokens]

    def step(rank, x):
        y = layers[rank](x, routings[rank])
        return x * 2 if ignored == "unused" and rank == 1 else y * 2

    @torch.no_grad()
    def run(rank, group):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        return [compiled(rank, x[rank]) for _ in range(3)]

    eager = on_ranks(team, torch.no_grad()(lambda rank, group: step(rank, x[rank])))
    for results, expected in zip(on_ranks(team, run), eager, strict=True):
        for y in results:
            torch.testing.assert_close(y, expected)


# --- one process ----------------------------------------------------------------------------------------------


def test_leading_shapes_strides_and_dtypes_that_are_taken_as_they_come():
    case = LayerCase(H, I, E, K, (12,))
    x, ids, weights = case.x[0], case.topk_ids[0], case.topk_weights[0]
    expected = flashmoe.fused_moe(x, ids, weights, case.gate_up_proj, case.down_proj)

    def same(x=x, ids=ids, weights=weights):
        y = flashmoe.fused_moe(x, ids, weights, case.gate_up_proj, case.down_proj)
        assert y.shape == x.shape and y.is_contiguous()
        assert_same_bits(y.reshape(12, H), expected)

    same(x=x.view(2, 3, 2, H))
    same(x=x.T.contiguous().T)
    same(ids=ids.int())
    same(ids=ids.T.contiguous().T, weights=weights.T.contiguous().T)
    same(weights=weights.double())
    same(x=torch.cat([x, x], dim=1)[:, :H])
    vector = flashmoe.fused_moe(x[0], ids[:1], weights[:1], case.gate_up_proj, case.down_proj)
    assert vector.shape == (H,)
    assert_same_bits(vector, expected[0])


def test_several_threads_share_the_local_group():
    cases = [LayerCase(H, I, E, K, (40 + n,), seed=n) for n in range(4)]
    expected = [case.call(0, None) for case in cases]
    wrong = []

    def work(n):
        for _ in range(50):
            try:
                assert_same_bits(cases[n].call(0, None), expected[n])
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and not any(thread.is_alive() for thread in threads)


FORK = """
import os, sys, torch, flashmoe
torch.set_num_threads(2)
x, ids, weights = torch.randn(64, 256), torch.randint(0, 4, (64, 2)), torch.rand(64, 2)
up, down = torch.randn(4, 512, 256), torch.randn(4, 256, 256)
before = flashmoe.fused_moe(x, ids, weights, up, down)
pid = os.fork()
after = flashmoe.fused_moe(x, ids, weights, up, down)
assert torch.equal(before, after)
if pid == 0:
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, cwd=ROOT.anchor
    )


def test_the_local_group_survives_a_fork_and_both_processes_end():
    done = run_python(FORK)
    assert done.returncode == 0, done.stderr


def test_workers_follow_torch_or_the_environment(monkeypatch):
    local = groups.LocalGroup()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert local.acquire().num_workers == 2
        torch.set_num_threads(1)
        assert local.acquire().num_workers == 1
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setenv("FLASHMOE_NUM_WORKERS", "3")
    assert groups.LocalGroup().acquire().num_workers == 3
    monkeypatch.setenv("FLASHMOE_NUM_WORKERS", "two")
    with pytest.raises(ValueError, match="FLASHMOE_NUM_WORKERS must be a positive integer, got 'two'"):
        groups.LocalGroup().acquire()
