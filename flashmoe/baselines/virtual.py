"""The same call by several virtual ranks on this GPU: the whole distributed protocol on one card."""

from functools import partial

from .problem import Call, Problem, Skipped


def make(ranks: int, problem: Problem) -> list[Call]:
    """
    Raises:
        Skipped: there is no GPU, or the experts do not go into so many equal parts.
    """
    problem.needs_gpu()
    experts = problem.shape.num_experts
    if experts % ranks:
        raise Skipped(f"{experts} experts do not go into {ranks} equal parts")
    from ..virtual_layer import VirtualLayer

    layer = VirtualLayer(
        problem.shape, problem.gate_up_proj, problem.down_proj, [experts // ranks] * ranks,
        max_tokens=-(-problem.num_tokens // ranks),
    )  # fmt: skip
    return [partial(layer, *one) for one in problem.inputs]
