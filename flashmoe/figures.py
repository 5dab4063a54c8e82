"""Figures of the layer's runs: latency, throughput, speed-ups, scaling, memory. Needs matplotlib."""

from collections.abc import Callable
from typing import Any

from . import baselines
from .drawing import (
    BOUND, DENSE, OURS, PRODUCT, RIVAL, Figure, around, grid_of, legend_below, look_of_baseline, look_of_model, scale_counts,
    scale_log,
)  # fmt: skip
from .models import SHAPES
from .records import Record
from .settings import Settings

_MEMORY_TOKENS, _MEMORY_RANKS = 8192, (2, 4, 8, 16, 32, 64)


def latency(records: list[Record], pyplot: Any) -> Any:
    """Milliseconds over tokens."""

    def panel(axes: Any, chosen: list[Record]) -> None:
        tokens = [record.tokens for record in chosen]
        if ours := [(record.tokens, latency) for record in chosen if (latency := record.data.get("latency"))]:
            places, latencies = zip(*ours, strict=True)
            low, high = zip(*(one["quartiles"] for one in latencies), strict=True)
            axes.plot(places, [1e3 * one["p50"] for one in latencies], "o-", ms=4, color=OURS, label="flashmoe")
            axes.fill_between(places, [1e3 * s for s in low], [1e3 * s for s in high], color=OURS, alpha=0.2, lw=0)
        rivals = [(record.tokens, rival) for record in chosen if (rival := record.rival())]
        axes.plot([t for t, _ in rivals], [1e3 * one["p50"] for _, one in rivals], "s--", ms=4, color=RIVAL,
                  label="the fastest of what one would use instead")  # fmt: skip
        axes.plot(tokens, [1e3 * record.data["floor"]["seconds"] for record in chosen], ":", color=BOUND,
                  label="floor: FLOPs at the GEMM rate, or reading the weights")  # fmt: skip

    return _over_tokens(records, pyplot, panel, "ms")


def throughput(records: list[Record], pyplot: Any) -> Any:
    """GFLOP/s over tokens, beside what the machine could do."""

    def panel(axes: Any, chosen: list[Record]) -> None:
        tokens = [record.tokens for record in chosen]
        ours = [(record.tokens, latency) for record in chosen if (latency := record.data.get("latency"))]
        axes.plot([t for t, _ in ours], [one["gflops"] for _, one in ours], "o-", ms=4, color=OURS, label="flashmoe")
        rivals = [(record.tokens, rival) for record in chosen if (rival := record.rival())]
        axes.plot([t for t, _ in rivals], [one["gflops"] for _, one in rivals], "s--", ms=4, color=RIVAL,
                  label="the fastest of what one would use instead")  # fmt: skip
        ceilings = [record.data["flops"] / record.data["floor"]["seconds"] / 1e9 for record in chosen]
        axes.plot(tokens, ceilings, ":", color=BOUND, label="ceiling: the GEMM rate, or reading the weights")
        gemm = [record.data["rates"]["gemm_gflops"] for record in chosen]
        axes.plot(tokens, gemm, "-.", lw=1, color=PRODUCT, label="pure GEMM, fp32")
        dense = [(record.tokens, one) for record in chosen if (one := record.compared(baselines.CEILING))]
        axes.plot([t for t, _ in dense], [one["gflops"] for _, one in dense], "--", lw=1, color=DENSE,
                  label="dense products of as many FLOPs, in the layer's dtype")  # fmt: skip

    return _over_tokens(records, pyplot, panel, "GFLOP/s")


def speedups(records: list[Record], pyplot: Any) -> Any:
    """How many times as fast as each baseline, with quartiles."""
    compared = [
        (_what(record), one)
        for record in records
        for one in record.data["baselines"]
        if "ratio" in one and one["name"] not in (baselines.ONE_PROCESS, baselines.CEILING)
    ]
    if not compared:
        return None
    used = {one["name"] for _, one in compared}
    names = [name for name in baselines.NAMES if name in used] + sorted(used - set(baselines.NAMES))
    labels = list(dict.fromkeys(label for label, _ in compared))
    figure, axes = pyplot.subplots(figsize=(8, 1.4 + 0.26 * len(labels)))
    for place, name in enumerate(names):
        mine = [(labels.index(label), one) for label, one in compared if one["name"] == name]
        ratios = [one["ratio"] for _, one in mine]
        beside = 0.5 * (place + 0.5) / len(names) - 0.25  # so that equal ratios do not hide each other
        how = look_of_baseline(name)
        spread = around(ratios, [one["ratio_quartiles"] for _, one in mine])
        axes.errorbar(ratios, [y + beside for y, _ in mine], xerr=spread, ls="", ms=4, lw=1, **how, label=name)
    axes.axvline(1, color="black", lw=0.8)
    scale_log(axes, "x")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(axis="x")
    axes.set_xlabel("times as fast as the baseline")
    legend_below(figure, 4)
    return figure


def training(records: list[Record], pyplot: Any) -> Any:
    """Which share of the floor's speed each contender reaches forward and backward."""
    records = [record for record in records if record.passes == "backward"]
    timed = [
        (place, one["name"], record.data["floor"]["seconds"] / one["p50"])
        for place, record in enumerate(records)
        for one in [{"name": baselines.OURS, **record.data.get("latency", {})}, *record.data["baselines"]]
        if "p50" in one
    ]
    if not timed:
        return None
    figure, axes = pyplot.subplots(figsize=(8, 1.4 + 0.26 * len(records)))
    used = {name for _, name, _ in timed}
    for name in [name for name in (baselines.OURS, *baselines.NAMES) if name in used]:
        look = {"color": OURS, "marker": "o"} if name == baselines.OURS else look_of_baseline(name)
        places, shares = zip(*((place, share) for place, one, share in timed if one == name), strict=True)
        axes.plot([100 * share for share in shares], places, ls="", ms=5, **look, label=name)
    axes.set_yticks(range(len(records)), [_what(record) for record in records])
    axes.set_ylim(len(records) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.grid(axis="x")
    axes.set_xlabel("% of the floor's speed")
    legend_below(figure, 4)
    return figure


def scaling(records: list[Record], pyplot: Any) -> Any:
    """Throughput of W processes over that of one with the same tokens and threads."""
    several = [(record, one) for record in records if (one := record.one_process()) and "ratio" in one]
    if not several:
        return None
    figure, axes = pyplot.subplots(figsize=(6.4, 0.9 + 0.3 * len(several)))
    ratios = [one["ratio"] for _, one in several]
    spread = around(ratios, [one["ratio_quartiles"] for _, one in several])
    axes.barh(range(len(several)), ratios, xerr=spread, color=OURS, height=0.6, error_kw={"lw": 1})
    axes.axvline(1, color="black", lw=0.8)
    axes.set_yticks(range(len(several)), [_what(one) for one, _ in several])
    axes.set_ylim(len(several) - 0.5, -0.5)
    axes.grid(axis="x")
    axes.set_xlabel("throughput over that of one process")
    return figure


def memory(records: list[Record], pyplot: Any) -> Any:
    """Symmetric memory that init(backward=False) allocates on GPUs, for the published widths in bf16."""
    figure, axes = pyplot.subplots(figsize=(6, 3.4))
    for shape in SHAPES.values():
        settings = Settings(
            max_tokens=_MEMORY_TOKENS, max_wire_bytes=2 * shape.hidden_size, max_top_k=shape.top_k,
            max_experts=shape.num_experts, max_groups=1, backward=False, device="cuda",
        )  # fmt: skip
        gib = [settings.arena_bytes(ranks) / 2**30 for ranks in _MEMORY_RANKS]
        axes.plot(_MEMORY_RANKS, gib, "-", ms=4, **look_of_model(shape.name), label=f"{shape.name} (k = {shape.top_k})")
    scale_log(axes, "y")
    scale_counts(axes, _MEMORY_RANKS, "ranks")
    axes.set_ylabel("GiB a rank")
    axes.grid()
    figure.legend(loc="outside right center")
    return figure


FIGURES: tuple[Figure, ...] = (
    ("latency", latency, "Latency of one call over the tokens of a rank: forward, or forward and backward where a "
     "title says so. Bands are quartiles."),
    ("throughput", throughput, "Throughput over the tokens of a rank, beside the machine's own ceilings."),
    ("speedups", speedups, "Speed against every baseline: medians and quartiles of ratios round by round."),
    ("training", training, "Forward and backward: speed as a share of the floor's, of those who have a backward pass."),
    ("scaling", scaling, "Several processes against one with the same tokens and threads."),
    ("memory", memory, f"Symmetric memory of one group, {_MEMORY_TOKENS} tokens a rank in bf16, nothing dropped, without backward calls."),
)


def _what(record: Record) -> str:
    suffix = " backward" if record.passes == "backward" else ""
    return f"{record.layer} {record.dtype} T={record.tokens} W={record.ranks}{suffix}"


def _over_tokens(records: list[Record], pyplot: Any, panel: Callable[[Any, list[Record]], None], unit: str) -> Any:
    """A panel for each pass, layer, number of ranks and dtype that was run with several token counts."""
    alike: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: (*record.order[:3], record.layer, record.tokens)):
        ranks = f", W = {record.ranks}" if record.ranks > 1 else ""
        both = "\nforward + backward" if record.passes == "backward" else ""
        alike.setdefault(f"{record.layer}, {record.dtype}{ranks}{both}", []).append(record)
    alike = {what: chosen for what, chosen in alike.items() if len({record.tokens for record in chosen}) > 1}
    if not alike:
        return None
    figure, panels = grid_of(pyplot, len(alike), 4 if len(alike) % 4 == 0 else 3, 3.0, 2.5)
    for axes, (what, chosen) in zip(panels, alike.items(), strict=True):
        panel(axes, chosen)
        scale_log(axes, "y")
        axes.set_title(what)
        axes.set_ylabel(unit)
        scale_counts(axes, [record.tokens for record in chosen], "tokens")
        axes.grid()
    legend_below(figure, 2 if len(alike) > 2 else 1)
    return figure
