"""Figures of what ``flashmoe bench scale --study all`` wrote. Needs matplotlib."""

from typing import Any

from ..drawing import (
    BOUND, OURS, Figure, around, grid_of, legend_below, look, look_of_model, same_limits, scale_counts, scale_log,
)  # fmt: skip

_AIM = 15  # %, of the error
_RANKS = ("1", "2", "4")
_PUBLISHED, _LIKE_IT, _AS_USED = BOUND, "#9ec5e3", OURS


def trust(record: dict[str, Any], pyplot: Any) -> Any:
    """Simulated over measured time of every run of the host."""
    runs = [one for one in record.get("validation", {}).get("runs", []) if "error" in one]
    if not runs:
        return None
    figure, axes = pyplot.subplots(figsize=(6.6, 3.4))
    axes.axhspan(-_AIM, _AIM, color="#eeeeee")
    axes.axhline(0, color="black", lw=0.8)
    for ranks in sorted({one["ranks"] for one in runs}):
        for fitted in (False, True):
            mine = [one for one in runs if (one["ranks"], one["fitted"]) == (ranks, fitted)]
            if not mine:
                continue
            how = look(str(ranks), _RANKS)
            # What the measurement's own quartiles leave open.
            errors = [100 * one["error"] for one in mine]
            open_ = [[100 * (one["simulated_s"] / s - 1) for s in reversed(one["quartiles_s"])] for one in mine]
            axes.errorbar([1e3 * one["measured_s"] for one in mine], errors, yerr=around(errors, open_), ls="",
                          lw=0.6, ms=5, color=how["color"], marker="x" if fitted else "o",
                          label=f"W = {ranks}" + (", fitted to" if fitted else ""))  # fmt: skip
    scale_log(axes, "x")
    axes.set_xlabel("measured, ms")
    axes.set_ylabel("simulated minus measured, %")
    figure.legend(loc="outside right center")
    return figure


def against_paper(record: dict[str, Any], pyplot: Any) -> Any:
    """The paper's experiments: FlashMoE's measurements beside what is predicted here."""
    panels: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for point in record.get("paper", []):
        weak = point["experiment"].startswith("weak")
        panels.setdefault((point["experiment"], 0 if weak else point["gpus"]), []).append(point)
    if not panels:
        return None
    figure, grid = grid_of(pyplot, len(panels), 3, 3.0, 2.6)
    for axes, ((experiment, gpus), chosen) in zip(grid, panels.items(), strict=True):
        what = next(name for name in ("tokens", "experts", "gpus") if name == "gpus" or name in experiment)
        series = (
            ("FlashMoE, tf32: published measurement", _PUBLISHED, [point["published_s"] for point in chosen]),
            ("this library, tf32, capacity 1: predicted", _LIKE_IT,
             [point["tf32_capacity_1"]["seconds"] for point in chosen]),
            ("this library, bf16, dropless: predicted", _AS_USED,
             [point["bf16_dropless"]["seconds"] for point in chosen]),
        )  # fmt: skip
        for place, (label, color, seconds) in enumerate(series):
            middles = [i + 0.27 * (place - 1) for i in range(len(chosen))]
            axes.bar(middles, [1e3 * s for s in seconds], 0.25, color=color, label=label)
        axes.set_xticks(range(len(chosen)), [str(point[what]) for point in chosen])
        axes.set_xlabel({"gpus": "GPUs", "tokens": "tokens a GPU", "experts": "experts"}[what])
        axes.set_title(experiment + (f", {gpus} GPUs" if gpus else ""))
        axes.set_ylabel("ms")
        axes.grid(axis="y")
    same_limits(grid)
    legend_below(figure, 2)
    return figure


def growth(record: dict[str, Any], pyplot: Any) -> Any:
    """Latency and tokens a second over GPUs, prefill and decode."""
    answers = [one for one in record.get("gpus", []) if "seconds" in one]
    counts = sorted({one["gpus"] for one in answers})
    lengths = [
        tokens for tokens in sorted({one["tokens"] for one in answers}, reverse=True)
        if len({one["gpus"] for one in answers if one["tokens"] == tokens}) > 1
    ]  # fmt: skip
    if not lengths:
        return None
    figure, grid = pyplot.subplots(2, len(lengths), figsize=(3.6 * len(lengths), 5.8), squeeze=False)
    for column, tokens in zip(grid.T, lengths, strict=True):
        alike = [one for one in answers if one["tokens"] == tokens]
        for model in dict.fromkeys(one["model"] for one in alike):
            mine = [one for one in alike if one["model"] == model]
            gpus, how = [one["gpus"] for one in mine], look_of_model(model)
            column[0].plot(gpus, [1e3 * one["seconds"] for one in mine], ms=3.5, lw=1.2, **how, label=model)
            column[1].plot(gpus, [one["tokens_per_s"] / 1e6 for one in mine], ms=3.5, lw=1.2, **how)
        column[0].set_title(f"{tokens} tokens a GPU")
        for axes, unit in zip(column, ("ms, predicted", "million tokens/s, predicted"), strict=True):
            scale_counts(axes, counts, "H100")
            scale_log(axes, "y")
            axes.tick_params(axis="x", labelsize=8)
            axes.set_ylabel(unit)
            axes.grid()
    legend_below(figure, 4)
    return figure


_TRUST = (
    f"The simulation of this host against measured runs. Only crosses were fitted to; the band is {_AIM} %, bars are "
    "what the measured quartiles leave open."
)
_PAPER = (
    "The FlashMoE paper's experiments on H100: its measurements, and predictions for this library by simulation. "
    "No GPU has run it. What figure 12 published is read off its bars."
)
_GROWTH = (
    "Layers on 8 to 1,024 H100, predicted by simulation. With more GPUs than experts there are groups of ranks with "
    "tokens of their own. Points whose memory cannot be had are missing."
)
FIGURES: tuple[Figure, ...] = (
    ("scale-validation", trust, _TRUST),
    ("scale-paper", against_paper, _PAPER),
    ("scale-gpus", growth, _GROWTH),
)
