"""Figures of what ``flashmoe bench scale --study all`` wrote. Needs matplotlib."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..figures import draw_all
from .command import SCHEMA

_COLORS = ("#2a78b5", "#d1603d", "#4f9d69", "#8a63b3", "#b08e2f", "#5b6770", "#222222")


def draw_scale(results: Path, folder: Path) -> list[tuple[Path, str]]:
    """Write the figures of ``results``/scale.json as SVG, if there is one; returns files and captions."""
    path = results / "scale.json"
    if not path.exists():
        return []
    record = json.loads(path.read_text())
    return draw_all(record, folder, FIGURES) if record.get("schema") == SCHEMA else []


def growth(record: dict[str, Any], pyplot: Any) -> Any:
    """Latency and tokens a second over GPUs, prefill and decode."""
    answers = [one for one in record.get("gpus", []) if "seconds" in one]
    counts = sorted({one["tokens"] for one in answers}, reverse=True)
    if not answers:
        return None
    figure, grid = pyplot.subplots(
        2, len(counts), figsize=(3.4 * len(counts), 5.6), squeeze=False, layout="constrained"
    )
    models = list(dict.fromkeys(one["model"] for one in answers))
    for column, tokens in enumerate(counts):
        for color, model in zip(_COLORS, models, strict=False):
            mine = [one for one in answers if (one["model"], one["tokens"]) == (model, tokens)]
            gpus = [one["gpus"] for one in mine]
            grid[0][column].plot(gpus, [1e3 * one["seconds"] for one in mine], "o-", ms=3, color=color, label=model)
            grid[1][column].plot(gpus, [one["tokens_per_s"] / 1e6 for one in mine], "o-", ms=3, color=color)
        grid[0][column].set_title(f"{tokens} tokens a GPU")
        for axes in (grid[0][column], grid[1][column]):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(gpus := sorted({one["gpus"] for one in answers}), [str(count) for count in gpus])
            axes.grid(alpha=0.3)
        grid[1][column].set_xlabel("H100")
    grid[0][0].set_ylabel("ms, predicted")
    grid[1][0].set_ylabel("million tokens a second, predicted")
    handles = {label: line for axes in grid[0] for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4, fontsize=8)
    return figure


def against_paper(record: dict[str, Any], pyplot: Any) -> Any:
    """The paper's experiments: FlashMoE's measurements beside what is predicted here."""
    points = record.get("paper", [])
    if not points:
        return None
    names = list(
        dict.fromkeys((point["experiment"], point["gpus"]) for point in points if "weak" not in point["experiment"])
    )
    panels = [[point for point in points if (point["experiment"], point["gpus"]) == name] for name in names]
    panels.append([point for point in points if "weak" in point["experiment"]])
    figure, grid = pyplot.subplots(1, len(panels), figsize=(2.7 * len(panels), 3), squeeze=False, layout="constrained")
    for axes, chosen in zip(grid[0], panels, strict=True):
        what = (
            "gpus"
            if "weak" in chosen[0]["experiment"]
            else "tokens"
            if "tokens" in chosen[0]["experiment"]
            else "experts"
        )
        labels = [str(point[what]) for point in chosen]
        series = (
            ("FlashMoE, tf32, measured", [point["published_s"] for point in chosen]),
            ("here, tf32, capacity 1, predicted", [point["tf32_capacity_1"]["seconds"] for point in chosen]),
            ("here, bf16, dropless, predicted", [point["bf16_dropless"]["seconds"] for point in chosen]),
        )
        for place, (color, (label, seconds)) in enumerate(zip((_COLORS[5], *_COLORS), series, strict=False)):
            axes.bar(
                [i + 0.27 * place for i in range(len(labels))],
                [1e3 * s for s in seconds],
                0.25,
                color=color,
                label=label,
            )
        axes.set_xticks([i + 0.27 for i in range(len(labels))], labels)
        axes.set_xlabel({"gpus": "GPUs", "tokens": "tokens a GPU", "experts": "experts"}[what])
        gpus = "" if what == "gpus" else f", {chosen[0]['gpus']} GPUs"
        axes.set_title(chosen[0]["experiment"].split(" (")[0] + gpus, fontsize=8)
    grid[0][0].set_ylabel("ms")
    figure.legend(
        *grid[0][0].get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3, fontsize=8
    )
    return figure


def trust(record: dict[str, Any], pyplot: Any) -> Any:
    """Simulated over measured time of every run of the host."""
    runs = [one for one in record.get("validation", {}).get("runs", []) if "error" in one]
    if not runs:
        return None
    figure, axes = pyplot.subplots(figsize=(6, 3.2))
    axes.axhspan(-15, 15, color="#eeeeee")
    axes.axhline(0, color="black", lw=0.8)
    for color, ranks in zip(_COLORS, (1, 2, 4), strict=False):
        for fitted, marker in ((False, "o"), (True, "x")):
            mine = [one for one in runs if (one["ranks"], one["fitted"]) == (ranks, fitted)]
            if mine:
                label = f"W = {ranks}" + (", fitted" if fitted else "")
                axes.plot([1e3 * one["measured_s"] for one in mine], [100 * one["error"] for one in mine], marker, ms=5,
                          color=color, label=label)  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("measured, ms")
    axes.set_ylabel("simulated is more by, %")
    axes.legend(fontsize=8)
    return figure


_TRUST = "The simulation of this host against measured runs. Only crosses were fitted to; the band is 15 %."
_PAPER = (
    "The FlashMoE paper's experiments on H100: its measurements, and predictions for this library by simulation. "
    "No GPU has run it."
)
_GROWTH = (
    "Layers on 8 to 1,024 H100, predicted by simulation. With more GPUs than experts there are groups of ranks with "
    "tokens of their own. Points whose memory cannot be had are missing."
)
FIGURES: tuple[tuple[str, Callable[[Any, Any], Any], str], ...] = (
    ("scale-validation", trust, _TRUST),
    ("scale-paper", against_paper, _PAPER),
    ("scale-gpus", growth, _GROWTH),
)
