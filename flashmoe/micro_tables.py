"""Tables of what ``flashmoe bench micro`` measured."""

from collections.abc import Callable
from typing import Any

from .markdown import markdown
from .micro_record import MicroRecord
from .report import seconds_of

# What a call costs beside its arithmetic; each is one operation.
_FIXED_COSTS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("`fused_moe` from Python, one token, tiny widths", "60 µs", "fused_moe_fixed_cost", {"tokens": 1}),
    ("`MoE` with its router, the same", "", "moe_fixed_cost", {"how": "eager"}),
    ("the core alone, one token", "", "epoch", {"transport": "alone", "tokens": 1}),
    ("the core, 2 ranks as threads, no tokens", "15 µs", "epoch", {"transport": "threads", "ranks": 2, "tokens": 0}),
    ("the core, 2 ranks as threads, one token each", "", "epoch", {"transport": "threads", "ranks": 2, "tokens": 1}),
    ("a signal to another process, one way", "", "signal", {"ends": "processes", "size": 0}),
)


def fixed_costs(micro: MicroRecord) -> str:
    rows = []
    for what, aim, name, parameters in _FIXED_COSTS:
        for one in micro.chosen(name, **parameters):
            low, high = map(seconds_of, one.quartiles)
            rows.append([what, aim, f"{seconds_of(one.median)} ({low} – {high})"])
    return markdown(("one call of", "aim", "median (quartiles)"), rows)


TABLES: dict[str, Callable[[Any], str]] = {"fixed-costs": fixed_costs}
