"""Figures of what ``flashmoe bench micro`` measured: puts and signals by size, tiles by rows, and every other part."""

from typing import Any

from .drawing import BOUND, OURS, Figure, around, grid_of, legend_below, look, same_limits, scale_counts, scale_log
from .micro_record import MicroRecord, Operation
from .report import size

TRANSPORTS = ("threads", "processes", "rehearsal", "ucx")
_DTYPES = ("fp32", "bf16", "fp16")
_DASHES = {"avx512": "-", "avx2": "-", "baseline": ":"}
_ELSEWHERE = ("put", "signal", "up_tile", "down_tile")


def transports(micro: MicroRecord, pyplot: Any) -> Any:
    """Bandwidth of puts and the time until a signal arrives, over bytes, by transport."""
    puts, signals = micro.chosen("put"), micro.chosen("signal")
    if not (puts and signals):
        return None
    figure, (rates, times) = grid_of(pyplot, 2, 2, 4.4, 3.4)
    for transport in TRANSPORTS:
        how = look(transport, TRANSPORTS)
        for memory, line in (("cold", "-"), ("warm", "--")):
            mine = _by(puts, "size", ends=transport, memory=memory)
            if mine:
                middle, spread = _rates(mine, "bytes")
                rates.errorbar([one.parameters["size"] for one in mine], middle, yerr=spread, ls=line, lw=1.2, ms=4,
                               **how, label=f"{transport}, {memory} rows")  # fmt: skip
        mine = _by(signals, "size", ends=transport)
        if mine:
            middle = [1e6 * one.median for one in mine]
            spread = around(middle, [[1e6 * s for s in one.quartiles] for one in mine])
            # Nothing but the signal stands where one byte would.
            times.errorbar([max(1, one.parameters["size"]) for one in mine], middle, yerr=spread, lw=1.2, ms=4, **how)
    for axes, title, unit, chosen in ((rates, "put", "GB/s", puts), (times, "signal, one way", "µs", signals)):
        sizes = sorted({one.parameters["size"] for one in chosen})
        what = "bytes of a row" if axes is rates else "bytes of the payload; 0: the signal alone"
        scale_counts(axes, [max(1, count) for count in sizes], what, [_short(count) for count in sizes])
        scale_log(axes, "y")
        axes.set_title(title)
        axes.set_ylabel(unit)
        axes.grid()
    legend_below(figure, 4)
    return figure


def tiles(micro: MicroRecord, pyplot: Any) -> Any:
    """Rate of the CPU engine's tile products over rows of an expert, one panel for up and down tiles of each shape."""
    panels = [
        (what, shape, chosen)
        for shape in dict.fromkeys(one.parameters["shape"] for one in micro.operations if one.what == "up_tile")
        for what in ("up_tile", "down_tile")
        if (chosen := micro.chosen(what, shape=shape, memory="cold"))
    ]
    if not panels:
        return None
    figure, grid = grid_of(pyplot, len(panels), 2, 4.2, 3.0)
    for axes, (what, shape, chosen) in zip(grid, panels, strict=True):
        for isa in dict.fromkeys(one.parameters["isa"] for one in chosen):
            for dtype in _DTYPES:
                mine = _by(chosen, "rows", isa=isa, dtype=dtype)
                if mine:
                    middle, spread = _rates(mine, "flops")
                    axes.errorbar([one.parameters["rows"] for one in mine], middle, yerr=spread, lw=1.2, ms=4,
                                  ls=_DASHES[isa], **look(dtype, _DTYPES), label=f"{dtype}, {isa}")  # fmt: skip
        axes.set_title(f"{shape}: {what.replace('_', ' ')}s")
        axes.set_ylabel("GFLOP/s of one core")
        scale_counts(axes, {one.parameters["rows"] for one in chosen}, "rows of an expert")
        scale_log(axes, "y")
        axes.grid()
    same_limits(grid)
    legend_below(figure, 4)
    return figure


def parts(micro: MicroRecord, pyplot: Any) -> Any:
    """Time of one of everything else."""
    others = [one for one in micro.operations if one.what not in _ELSEWHERE]
    if not others:
        return None
    figure, axes = pyplot.subplots(figsize=(8, 0.9 + 0.17 * len(others)))
    middle = [1e6 * one.median for one in others]
    axes.errorbar(middle, range(len(others)), xerr=around(middle, [[1e6 * s for s in one.quartiles] for one in others]),
                  ls="", marker="o", ms=3.5, lw=1, color=OURS)  # fmt: skip
    scale_log(axes, "x")
    axes.set_yticks(range(len(others)), [one.name for one in others], fontsize=7)
    axes.set_ylim(len(others) - 0.5, -0.5)
    for place, (one, before) in enumerate(zip(others[1:], others, strict=False), 1):
        if one.group != before.group:
            axes.axhline(place - 0.5, color=BOUND, lw=0.5)
    axes.set_xlabel("µs of one operation")
    axes.grid(axis="x")
    return figure


FIGURES: tuple[Figure, ...] = (
    ("micro-transports", transports, "One rank puts rows into another's memory, and signals go there and back. The "
     "rehearsal of RDMA delays and reorders on purpose. Bars are quartiles."),
    ("micro-tiles", tiles, "Tile products of one core on weights that no cache holds. Bars are quartiles."),
    ("micro-parts", parts, "What else a call is made of: medians and quartiles of one operation."),
)  # fmt: skip


def _by(operations: list[Operation], parameter: str, **chosen: Any) -> list[Operation]:
    """Those with these parameters, ascending in another."""
    mine = [one for one in operations if chosen.items() <= one.parameters.items()]
    return sorted(mine, key=lambda one: one.parameters[parameter])


def _rates(operations: list[Operation], amount: str) -> tuple[list[float], list[list[float]]]:
    """Billions a second by the median, and error bars by the quartiles."""
    middle = [one.rates[amount] / 1e9 for one in operations]
    quartiles = [[one.amounts[amount] / s / 1e9 for s in reversed(one.quartiles)] for one in operations]
    return middle, around(middle, quartiles)


def _short(count: int) -> str:
    return size(count).replace(".0 ", " ").replace("iB", "").replace(" ", "") if count >= 1024 else str(count)
