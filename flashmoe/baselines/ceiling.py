"""Dense products with as many FLOPs, by BLAS or cuBLAS: what the layer would take if it were only that."""

import time

import torch

from .problem import Call, Problem


def make(problem: Problem) -> list[Call]:
    """Two products with this rank's kept entries for rows, as if all had one expert, and with the backward pass the
    four of their gradients. They compute nothing to check.

    On a CPU they are of the dtype or of float32, whichever is faster there: not every BLAS is good at 16 bits.
    """
    rows = sum(problem.kept(routing) for _, routing in problem.inputs) // len(problem.inputs)
    products = [_products(problem, rows, problem.dtype)]
    if problem.device.type == "cpu" and problem.dtype != torch.float32:
        products.append(_products(problem, rows, torch.float32))
    return [min(products, key=_seconds) if len(products) > 1 else products[0]]


def _products(problem: Problem, rows: int, dtype: torch.dtype) -> Call:
    def drawn(height: int, width: int) -> torch.Tensor:
        return torch.randn(height, width, device=problem.device, dtype=dtype)

    shape = problem.shape
    x, up = drawn(rows, shape.hidden_size), drawn(shape.up_rows, shape.hidden_size)
    hidden, down = drawn(rows, shape.intermediate_size), drawn(shape.hidden_size, shape.intermediate_size)
    wide, y = drawn(rows, shape.up_rows), drawn(rows, shape.hidden_size)

    def forward() -> torch.Tensor:
        torch.mm(x, up.T, out=wide)
        return torch.mm(hidden, down.T, out=y)

    if not problem.backward:
        return forward
    grad_x, grad_hidden = torch.empty_like(x), torch.empty_like(hidden)
    grad_up, grad_down = torch.empty_like(up), torch.empty_like(down)

    def step() -> torch.Tensor:
        forward()
        torch.mm(y.T, hidden, out=grad_down)
        torch.mm(y, down, out=grad_hidden)
        torch.mm(wide.T, x, out=grad_up)
        return torch.mm(wide, up, out=grad_x)

    return step


def _seconds(call: Call) -> float:
    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
