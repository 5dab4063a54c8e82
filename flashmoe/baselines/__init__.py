"""What one would use instead of flashmoe, and what bounds them all: each makes calls of the same work.

A baseline is a function from a :class:`Problem` to one call for each of its inputs, or raises :class:`Skipped`. All
but the ceiling give the layer's result, which is checked before they are timed.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from . import ceiling, chain, hugging_face, libraries, pipeline, triton_moe, virtual
from .pipeline import can_exchange
from .problem import Call, Problem, Skipped

__all__ = ["CEILING", "NAMES", "ONE_PROCESS", "OURS", "Call", "Problem", "Skipped", "baseline", "can_exchange",
           "is_rival", "of_ranks", "on"]  # fmt: skip

OURS = "flashmoe"
CEILING = "ceiling"
ONE_PROCESS = "one-process"


@dataclass(frozen=True)
class Baseline:
    """``make`` is None where the layer itself, in one process, is the baseline."""

    make: Callable[[Problem], list[Call]] | None
    one_rank: bool = True
    several_ranks: bool = False
    on_cpu: bool = True
    rival: bool = True


_BASELINES = {
    **{f"hf-{name}": Baseline(partial(hugging_face.make, name)) for name in hugging_face.IMPLEMENTATIONS},
    "chain": Baseline(chain.make),
    "triton": Baseline(triton_moe.make, on_cpu=False),
    **{
        f"pipeline-{name}": Baseline(partial(pipeline.make, ffn), one_rank=False, several_ranks=True)
        for name, ffn in (("grouped_mm", pipeline.grouped_mm_ffn), ("loop", pipeline.loop_ffn))
    },
    "liger-cute": Baseline(libraries.liger_cute, on_cpu=False),
    "deepgemm": Baseline(libraries.deepgemm, on_cpu=False),
    "sonicmoe": Baseline(libraries.sonicmoe, on_cpu=False),
    "flashinfer": Baseline(libraries.flashinfer, on_cpu=False),
    "tutel": Baseline(libraries.tutel, on_cpu=False),
    **{f"virtual-{ranks}": Baseline(partial(virtual.make, ranks), on_cpu=False, rival=False) for ranks in (2, 4, 8)},
    ONE_PROCESS: Baseline(None, one_rank=False, several_ranks=True, rival=False),
    CEILING: Baseline(ceiling.make, several_ranks=True, rival=False),
}  # fmt: skip
NAMES = tuple(_BASELINES)


def baseline(name: str) -> Baseline:
    return _BASELINES[name]


def is_rival(name: str) -> bool:
    """Whether it is something else that one would use: neither flashmoe in another form nor a bound."""
    return name != OURS and (name not in _BASELINES or _BASELINES[name].rival)


def on(device: str) -> list[str]:
    """The baselines that can run there, on cpu or cuda, if what they need is installed."""
    return [name for name, one in _BASELINES.items() if one.on_cpu or device != "cpu"]


def of_ranks(ranks: int, names: Iterable[str] = NAMES) -> list[str]:
    """Those of ``names`` that a run of so many ranks can be compared with."""
    return [name for name in names if (_BASELINES[name].one_rank if ranks == 1 else _BASELINES[name].several_ranks)]


def of_virtual_ranks(names: Iterable[str] = NAMES) -> list[str]:
    """Those that a process with all tokens and experts can be compared with: others, and flashmoe as one rank."""
    others = [name for name in of_ranks(1, names) if is_rival(name) or name == CEILING]
    return [*others, *(name for name in names if name == ONE_PROCESS)]
