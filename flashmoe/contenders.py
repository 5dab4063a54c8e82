"""Contenders of a measurement: each is made and checked before it is timed, or says why it is not."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import baselines
from .accuracy import Check
from .gpu_timing import captured
from .gradient_accuracy import GradientCheck
from .measure import Contender, Ranks
from .run_inputs import in_turns
from .training_step import TrainingStep

# Others round more often than we do, and sum a token's k rows in the dtype: their errors may be so much larger.
LENIENCE = 4.0

Make = Callable[[baselines.Problem], Sequence[Callable[[], Any]]]


@dataclass(frozen=True)
class Judge:
    """What every rank needs to have a result checked on rank 0, where alone the checks are.

    Attributes:
        gradients: where the backward pass is timed, too.
        experts: those whose weights' gradients are checked.
    """

    ranks: Ranks
    experts_per_rank: list[int]
    y: Check | None
    gradients: GradientCheck | None = None
    experts: Sequence[int] = ()

    def alone(self) -> "Judge":
        """Of what rank 0 computes for all, with all experts."""
        return dataclasses.replace(self, ranks=Ranks(alone=True), experts_per_rank=[sum(self.experts_per_rank)])

    def of(self, name: str, result: Tensor, gradients: Sequence[Tensor]) -> tuple[dict[str, Any], str | None]:
        """On every rank: what the record says of it, and why it is refused, if it is."""
        y = self.ranks.collect(result.float())
        collected = self._collected(gradients) if gradients else None
        said, wrong = {"name": name}, None
        if self.y is not None:
            error = self.y.error_of(y)
            said["relative_error"] = error["relative"]
            wrong = _wrong("its result", error["relative"] if error["finite"] else torch.nan, error["bound"])
            if collected is not None and self.gradients is not None:
                errors = said["gradient_errors"] = self.gradients.errors_of(*collected)
                for leaf, bound in self.gradients.bounds.items():
                    wrong = wrong or _wrong(f"its gradient of {leaf}", errors[leaf], bound)
        return self.ranks.told((said, wrong))

    def _collected(self, gradients: Sequence[Tensor]) -> list[Tensor] | None:
        """x's and the top-k weights' of all tokens, the weights' of ``experts``."""
        *tokens, gate_up, down = gradients
        first = sum(self.experts_per_rank[: self.ranks.rank])
        last = first + self.experts_per_rank[self.ranks.rank]
        mine = [expert - first for expert in self.experts if first <= expert < last]
        rows = [self.ranks.collect(one.float()) for one in tokens]
        sent = [one[mine].float() for one in (gate_up, down)]  # gigabytes, perhaps: they stay where they are if they can
        parts = self.ranks.collect_objects([one.cpu() for one in sent] if self.ranks.size > 1 else sent)
        if parts is None:
            return None
        return [*rows, *(torch.cat([one.to(rows[0].device) for one in pair]) for pair in zip(*parts, strict=True))]


def prepare(name: str, calls: Sequence[Callable[[], Any]], threads: int, graph: bool) -> tuple[Contender, Any]:
    """One whose calls, one an input, take turns; and its first result, of the graph if it is timed in one.

    Raises:
        Exception: of a call, or that it cannot be captured.
    """
    result = calls[0]()
    for call in calls[1:]:
        call()
    if not graph:
        return Contender(name, in_turns(list(calls)), threads), result
    replay, results, count = captured(calls)
    return Contender(name, replay, threads, calls=count), results[0]


def enter(
    name: str, make: Make, problem: baselines.Problem, judge: Judge, threads: int, graph: bool
) -> tuple[Contender | None, dict[str, Any]]:
    """A contender, or None, and what the record says of it so far. All ranks enter it together.

    Whatever another's code raises costs only itself, as long as the other ranks come back from it, too.
    """
    checked, entered, result, reason = name != baselines.CEILING, None, None, None
    try:
        entered, result = prepare(name, _calls(make, problem, checked), threads, graph)
    except baselines.Skipped as skipped:
        reason = str(skipped)
    except Exception as error:
        if problem.device.type == "cuda":
            torch.cuda.synchronize()  # an error that the GPU does not forgive is told here
        reason = f"it raised {type(error).__name__}: {error}"[:300]
    reason = next(filter(None, judge.ranks.everybodys(reason)), None)
    if reason is not None:
        return None, {"name": name, "skipped": reason}
    if not checked:
        return entered, {"name": name}
    y, gradients = result, []
    if problem.backward:
        y, *given = result
        leaves = problem.leaves(0).values()
        gradients = [torch.zeros_like(leaf) if one is None else one for one, leaf in zip(given, leaves, strict=True)]
    said, wrong = judge.of(name, y, gradients)
    return (None, said | {"skipped": wrong}) if wrong else (entered, said)


def _calls(make: Make, problem: baselines.Problem, differentiated: bool) -> Sequence[Callable[[], Any]]:
    if not problem.backward:
        return make(problem)
    with torch.enable_grad():
        calls = make(problem)
    if not differentiated:
        return calls
    return [TrainingStep(call, problem.leaves(number), problem.grad_y[number]) for number, call in enumerate(calls)]


def _wrong(what: str, relative: float, bound: float) -> str | None:
    limit = LENIENCE * bound
    if relative <= limit:
        return None
    return f"{what} is wrong: relative error {relative:.1e}, where rounding gives {limit:.1e} at most"
