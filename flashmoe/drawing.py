"""How figures look, and files made of them: one colour for one thing in all of them. Needs matplotlib."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from . import baselines
from .models import SHAPES

OURS, RIVAL, BOUND = "#1f6fb2", "#d1603d", "#5b6770"  # this library, what one would use instead, what nothing passes
PRODUCT, DENSE = "#4f9d69", "#b08e2f"  # a BLAS's products: one square, and as many as the layer's
_COLORS = ("#1f6fb2", "#d1603d", "#4f9d69", "#8a63b3", "#b08e2f", "#3aa6a0", "#c2577f", "#7a5c3e")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_STYLE = {
    "font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8, "legend.frameon": False, "axes.spines.top": False,
    "axes.spines.right": False, "axes.axisbelow": True, "grid.alpha": 0.3, "figure.constrained_layout.use": True,
    "svg.hashsalt": "flashmoe",
}  # fmt: skip

# A figure of some records, or None where they have nothing for it; and what its caption says.
Figure = tuple[str, Callable[[Any, Any], Any], str]


def draw_all(records: Any, folder: Path, figures: Iterable[Figure], png: bool = False) -> list[tuple[Path, str]]:
    """Write every figure that these records allow as SVG, and if asked as PNG beside; returns SVGs and captions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = []
    for name, draw, caption in figures:
        with pyplot.rc_context(_STYLE):
            figure = draw(records, pyplot)
            if figure is None:
                continue
            path = folder / f"{name}.svg"
            figure.savefig(path, metadata={"Date": None})
            if png:
                figure.savefig(path.with_suffix(".png"), dpi=130)
            pyplot.close(figure)
        drawn.append((path, caption))
    return drawn


def look(name: str, names: Sequence[str], colors: Sequence[str] = _COLORS) -> dict[str, str]:
    """Colour and marker of one of ``names``, always the same and no two alike; one that is not there comes last."""
    place = names.index(name) if name in names else len(names)
    return {"color": colors[place % len(colors)], "marker": _MARKERS[place // len(colors) % len(_MARKERS)]}


def look_of_model(name: str) -> dict[str, str]:
    return look(name, tuple(SHAPES))


def look_of_baseline(name: str) -> dict[str, str]:
    return look(name, baselines.NAMES, [color for color in _COLORS if color != OURS])


def scale_log(axes: Any, which: str) -> None:
    """The x or y axis where ratios count: plain numbers, fewer of them where there are many decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    steps = (1, 2, 5) if decades < 2 else (1, 3) if decades < 3 else (1,)
    ends = [step * 10.0**power for power in range(-12, 13) for step in (1, 2, 5)]
    low, high = max(end for end in ends if end <= low), min(end for end in ends if end >= high)
    getattr(axes, f"set_{which}lim")(low, high)
    axis.set_major_locator(LogLocator(subs=steps, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def same_limits(panels: Sequence[Any]) -> None:
    """Of the y axes, so that heights can be compared."""
    lows, highs = zip(*(axes.get_ylim() for axes in panels), strict=True)
    for axes in panels:
        axes.set_ylim(min(lows), max(highs))


def scale_counts(axes: Any, counts: Iterable[int], label: str, names: Sequence[str] | None = None) -> None:
    """An x axis of powers: a tick at each of ``counts`` and nowhere else."""
    counts = sorted(set(counts))
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts] if names is None else names)
    axes.minorticks_off()
    axes.set_xlabel(label)


def grid_of(pyplot: Any, panels: int, columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure of so many panels, row by row; the last row may be shorter."""
    columns = min(columns, panels)
    rows = -(-panels // columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(width * columns, height * rows + 0.4), squeeze=False)
    for axes in grid.flat[panels:]:
        axes.remove()
    return figure, list(grid.flat[:panels])


def legend_below(figure: Any, columns: int) -> None:
    """One legend for all panels, outside of them; a name that several of them use stands there once."""
    found = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns)


def around(middle: Sequence[float], quartiles: Sequence[Sequence[float]]) -> list[list[float]]:
    """Error bars from quartiles: how far below and above."""
    return [
        [max(0.0, m - low) for m, (low, _) in zip(middle, quartiles, strict=True)],
        [max(0.0, high - m) for m, (_, high) in zip(middle, quartiles, strict=True)],
    ]
