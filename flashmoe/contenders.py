"""Baselines as contenders of a measurement: each is made and checked before it is timed, or says why it is not."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import baselines
from .accuracy import Check
from .gpu_timing import captured
from .measure import Contender, Ranks
from .run_inputs import in_turns

# Others round more often than we do, and sum a token's k rows in the dtype: their errors may be so much larger.
LENIENCE = 4.0


def prepare(name: str, calls: Sequence[Callable[[], Tensor]], threads: int, graph: bool) -> tuple[Contender, Tensor]:
    """One whose calls, one an input, take turns; and its first result, of the graph if it is timed in one.

    Raises:
        Exception: of a call, or that it cannot be captured.
    """
    results = [call() for call in calls]
    if not graph:
        return Contender(name, in_turns(list(calls)), threads), results[0]
    replay, results, count = captured(calls)
    return Contender(name, replay, threads, calls=count), results[0]


def enter(
    name: str, problem: baselines.Problem, ranks: Ranks, check: Check | None, threads: int, graph: bool
) -> tuple[Contender | None, dict[str, Any]]:
    """A contender, or None, and what the record says of this baseline so far. ``check`` is rank 0's.

    With one rank, whatever another's code raises costs only itself; with several, the others would wait.
    """
    make = baselines.baseline(name).make
    try:
        entered, result = prepare(name, make(problem), threads, graph)
    except baselines.Skipped as reason:
        return None, {"name": name, "skipped": str(reason)}
    except Exception as error:
        if ranks.size > 1:
            raise
        if problem.device.type == "cuda":
            torch.cuda.synchronize()  # an error that the GPU does not forgive is told here
        return None, {"name": name, "skipped": f"it raised {type(error).__name__}: {error}"[:300]}
    if name == baselines.CEILING:
        return entered, {"name": name}
    gathered, error = ranks.collect(result.float()), None
    if check is not None:
        error = check.error_of(gathered)
    wrong = ranks.told(_wrong(error) if error else None)
    if wrong:
        return None, {"name": name, "skipped": wrong}
    return entered, {"name": name, "relative_error": error["relative"] if error else None}


def _wrong(error: dict[str, Any]) -> str | None:
    limit = LENIENCE * error["bound"]
    if error["finite"] and error["relative"] <= limit:
        return None
    return f"its result is wrong: relative error {error['relative']:.1e}, where rounding gives {limit:.1e} at most"
