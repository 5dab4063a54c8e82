"""Figures of measurements, drawn from records. Needs matplotlib."""

from collections.abc import Callable, Iterable
from itertools import cycle
from pathlib import Path
from typing import Any

from .models import SHAPES
from .records import Record
from .settings import Settings

_COLORS = ("#2a78b5", "#d1603d", "#4f9d69", "#8a63b3", "#b08e2f", "#5b6770")
_MEMORY_TOKENS, _MEMORY_RANKS = 8192, (2, 4, 8, 16, 32, 64)


def draw_all(
    records: Any, folder: Path, figures: "tuple[tuple[str, Callable[[Any, Any], Any], str], ...] | None" = None
) -> list[tuple[Path, str]]:
    """Write every figure that these records allow as SVG; returns files and captions. Default: those of this file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
             "svg.hashsalt": "flashmoe", "svg.fonttype": "none"}  # fmt: skip
    drawn = []
    for name, draw, caption in FIGURES if figures is None else figures:
        with pyplot.rc_context(style):
            figure = draw(records, pyplot)
            if figure is None:
                continue
            path = folder / f"{name}.svg"
            figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
            pyplot.close(figure)
        drawn.append((path, caption))
    return drawn


def latency(records: list[Record], pyplot: Any) -> Any:
    """Milliseconds over tokens, one panel a layer."""

    def panel(axes: Any, chosen: list[Record]) -> None:
        tokens = [record.tokens for record in chosen]
        low, high = zip(*(record.data["latency"]["quartiles"] for record in chosen), strict=True)
        ours = [record.data["latency"]["p50"] for record in chosen]
        axes.plot(tokens, [1e3 * s for s in ours], "o-", color=_COLORS[0], label="flashmoe")
        axes.fill_between(tokens, [1e3 * s for s in low], [1e3 * s for s in high], color=_COLORS[0], alpha=0.2)
        rivals = [(record.tokens, record.rival()) for record in chosen if record.rival()]
        axes.plot([t for t, _ in rivals], [1e3 * one["p50"] for _, one in rivals], "s--", color=_COLORS[1],
                  label="fastest of Hugging Face")  # fmt: skip
        axes.plot(tokens, [1e3 * record.data["floor"]["seconds"] for record in chosen], ":", color=_COLORS[5],
                  label="floor")  # fmt: skip
        axes.set_yscale("log")
        axes.set_ylabel("ms")

    return _over_tokens(records, pyplot, panel)


def throughput(records: list[Record], pyplot: Any) -> Any:
    """GFLOP/s over tokens, beside what the machine could do, one panel a layer."""

    def panel(axes: Any, chosen: list[Record]) -> None:
        tokens = [record.tokens for record in chosen]
        axes.plot(tokens, [record.data["latency"]["gflops"] for record in chosen], "o-", color=_COLORS[0],
                  label="flashmoe")  # fmt: skip
        ceilings = [record.data["flops"] / record.data["floor"]["seconds"] / 1e9 for record in chosen]
        axes.plot(tokens, ceilings, ":", color=_COLORS[5], label="floor: GEMM rate or reading the weights")
        gemm = [record.data["rates"]["gemm_gflops"] for record in chosen]
        axes.plot(tokens, gemm, "-.", color=_COLORS[2], label="pure GEMM")
        axes.set_ylabel("GFLOP/s")
        axes.set_ylim(bottom=0)

    return _over_tokens(records, pyplot, panel)


def speedups(records: list[Record], pyplot: Any) -> Any:
    """How many times as fast as each baseline, with quartiles."""
    compared = [
        (f"{record.layer} {record.dtype} T={record.tokens} W={record.ranks}", one)
        for record in records
        for one in record.data["baselines"]
        if "ratio" in one
    ]
    if not compared:
        return None
    names = sorted({one["name"] for _, one in compared})
    labels = list(dict.fromkeys(label for label, _ in compared))
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.24 * len(labels)))
    for color, name in zip(cycle(_COLORS), names, strict=False):
        mine = [(labels.index(label), one) for label, one in compared if one["name"] == name]
        ratios = [one["ratio"] for _, one in mine]
        low = [max(0.0, one["ratio"] - one["ratio_quartiles"][0]) for _, one in mine]
        high = [max(0.0, one["ratio_quartiles"][1] - one["ratio"]) for _, one in mine]
        axes.errorbar(ratios, [y for y, _ in mine], xerr=[low, high], fmt="o", ms=4, lw=1, color=color, label=name)
    axes.axvline(1, color="black", lw=0.8)
    axes.set_xscale("log")
    ticks = [0.5, 1, 2, 5, 10, 20, 50]
    axes.set_xticks(ticks, [f"{tick:g} ×" for tick in ticks])
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("times as fast as the baseline")
    axes.legend(loc="lower right", fontsize=8)
    return figure


def scaling(records: list[Record], pyplot: Any) -> Any:
    """Throughput of W processes over that of one with the same tokens and threads."""
    several = [(record, one) for record in records if (one := record.one_process())]
    if not several:
        return None
    figure, axes = pyplot.subplots(figsize=(5, 1 + 0.45 * len(several)))
    ratios = [one["ratio"] for _, one in several]
    low = [max(0.0, one["ratio"] - one["ratio_quartiles"][0]) for _, one in several]
    high = [max(0.0, one["ratio_quartiles"][1] - one["ratio"]) for _, one in several]
    axes.barh(range(len(several)), ratios, xerr=[low, high], color=_COLORS[0], height=0.6)
    axes.axvline(1, color="black", lw=0.8)
    axes.set_yticks(
        range(len(several)), [f"{record.layer} {record.dtype}, W = {record.ranks}" for record, _ in several]
    )
    axes.invert_yaxis()
    axes.set_xlabel("throughput over that of one process with the same threads")
    return figure


def memory(records: list[Record], pyplot: Any) -> Any:
    """Symmetric memory that init() allocates, for the published widths in bf16."""
    figure, axes = pyplot.subplots(figsize=(6, 3.4))
    for color, shape in zip(_COLORS, SHAPES.values(), strict=False):
        settings = Settings(
            max_tokens=_MEMORY_TOKENS, max_wire_bytes=2 * shape.hidden_size, max_top_k=shape.top_k,
            max_experts=shape.num_experts, max_groups=1,
        )  # fmt: skip
        gib = [settings.arena_bytes(ranks) / 2**30 for ranks in _MEMORY_RANKS]
        axes.plot(_MEMORY_RANKS, gib, "o-", ms=4, color=color, label=f"{shape.name} (k = {shape.top_k})")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(_MEMORY_RANKS, [str(ranks) for ranks in _MEMORY_RANKS])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("ranks")
    axes.set_ylabel("GiB a rank")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


FIGURES: tuple[tuple[str, Callable[[list[Record], Any], Any], str], ...] = (
    ("latency", latency, "Latency of one call over tokens: fp32, one process. Bands are quartiles."),
    ("throughput", throughput, "Throughput over tokens beside the machine's own ceilings: fp32, one process."),
    ("speedups", speedups, "Speed against every baseline: medians and quartiles of ratios round by round."),
    ("scaling", scaling, "Several processes against one with the same tokens and threads."),
    ("memory", memory, f"Symmetric memory of one group, {_MEMORY_TOKENS} tokens a rank in bf16, nothing dropped."),
)


def _over_tokens(records: list[Record], pyplot: Any, panel: Callable[[Any, list[Record]], None]) -> Any:
    """A panel for each layer that was run with several token counts, in fp32 and one process."""
    layers = _layers(record for record in records if (record.ranks, record.dtype) == (1, "fp32"))
    if not layers:
        return None
    figure, grid = pyplot.subplots(1, len(layers), figsize=(3.6 * len(layers), 3), squeeze=False, layout="constrained")
    for axes, (layer, chosen) in zip(grid[0], layers.items(), strict=True):
        panel(axes, chosen)
        axes.set_title(layer)
        axes.set_xscale("log", base=2)
        axes.set_xticks([record.tokens for record in chosen], [str(record.tokens) for record in chosen])
        axes.set_xlabel("tokens")
        axes.grid(alpha=0.3)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3)
    return figure


def _layers(records: Iterable[Record]) -> dict[str, list[Record]]:
    layers: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: record.tokens):
        layers.setdefault(record.layer, []).append(record)
    return {layer: chosen for layer, chosen in layers.items() if len(chosen) > 1}
