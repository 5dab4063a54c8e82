"""Tables of the layer's runs: the README's, and the aims beside what was reached."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .baselines import OURS
from .markdown import markdown
from .records import Record

_SHOWN = (("fp32", 1), ("fp32", 512), ("bf16", 512))  # dtypes and tokens in the README
_LAYERS = {"mixtral-8x7b / 4": "Mixtral/4", "qwen3-30b-a3b": "Qwen3-30B", "flashmoe-paper": "paper"}


def runs(records: Sequence[Record]) -> str:
    """One line a record, shares and ratios with their quartiles."""
    rows = []
    for record in records:
        if (record.dtype, record.tokens) not in _SHOWN or record.passes != "forward":
            continue
        floor, rival = record.data["floor"], record.rival()
        low, high = (f"{100 * share:.0f}" for share in floor["share_of_speed_quartiles"])
        rows.append([
            f"{record.layer}, {record.dtype}", f"{record.tokens} · {record.ranks}",
            f"{100 * floor['share_of_speed']:.0f} % ({low} – {high})", rival["name"] if rival else "",
            "{:.2f} × ({:.2f} – {:.2f})".format(rival["ratio"], *rival["ratio_quartiles"]) if rival else "",
        ])  # fmt: skip
    return markdown(("layer", "T · W", "share of the floor's speed", "against", "faster by"), rows)


def training(records: Sequence[Record]) -> str:
    """Forward and backward: one line a contender, the layer among them where it has a time."""
    rows = []
    for record in records:
        if record.passes == "forward":
            continue
        floor, ours = record.data["floor"]["seconds"], record.data.get("latency")
        for one in ([{"name": OURS, **ours}] if ours else []) + record.data["baselines"]:
            row = [f"{record.layer}, {record.dtype}", f"{record.tokens} · {record.ranks}", one["name"]]
            if "skipped" in one:
                rows.append([*row, one["skipped"].partition(":")[0], "", ""])
                continue
            low, high = (1e3 * seconds for seconds in one["quartiles"])
            share, rate = f"{100 * floor / one['p50']:.0f} %", f"{one['gflops']:.0f}"
            rows.append([*row, f"{1e3 * one['p50']:.0f} ({low:.0f} – {high:.0f})", rate, share])
    return markdown(("layer", "T · W", "of", "ms (quartiles)", "GFLOP/s", "share of the floor's speed"), rows)


def _share(record: Record) -> float:
    return record.data["floor"]["share_of_speed"]


def _over_hugging_face(record: Record) -> float | None:
    timed = [one for one in record.data["baselines"] if "ratio" in one and one["name"].startswith("hf-")]
    return min(timed, key=lambda one: one["p50"])["ratio"] if timed else None


def _over(name: str) -> Callable[[Record], float | None]:
    return lambda record: (record.compared(name) or {}).get("ratio")


@dataclass(frozen=True)
class Aim:
    """What runs are to reach, at least; ``least`` in the order of the layers."""

    what: str
    value: Callable[[Record], float | None]
    least: tuple[float, float, float]
    tokens: int
    dtypes: tuple[str, ...] = ("fp32",)
    ranks: int = 1

    def unit(self) -> Callable[[float], str]:
        return (lambda v: f"{100 * v:.0f} %") if self.value is _share else (lambda v: f"{v:.2f} ×")

    def cell(self, records: Sequence[Record], layer: str, least: float) -> str:
        """Of each dtype; bold where it falls short."""
        told, write = [], self.unit()
        for dtype in self.dtypes:
            for record in records:
                if record.passes != "forward":
                    continue
                what = record.layer, record.dtype, record.tokens, record.ranks
                if what == (layer, dtype, self.tokens, self.ranks) and (value := self.value(record)) is not None:
                    told.append(write(value) if value >= least else f"**{write(value)}**")
        return ", ".join(told)


def _same(least: float) -> tuple[float, float, float]:
    return least, least, least


_HALF = ("bf16", "fp16")
AIMS = (
    Aim("fp32, T = 512: 80 % of the floor", _share, _same(0.8), 512),
    Aim("fp32, T = 2048: 80 %", _share, _same(0.8), 2048),
    Aim("fp32, T = 1: 75 %", _share, _same(0.75), 1),
    Aim("fp32, T = 16: 75 %", _share, _same(0.75), 16),
    Aim("bf16, fp16, T = 512: 65 %", _share, _same(0.65), 512, _HALF),
    Aim("bf16, fp16, T = 16: 65 %", _share, _same(0.65), 16, _HALF),
    Aim("T = 512 fp32 against the fastest of Hugging Face: 1.15, 1.7, 1.7 ×", _over_hugging_face,
        (1.15, 1.7, 1.7), 512),
    Aim("T = 512 bf16 against it: 1.6 ×", _over_hugging_face, _same(1.6), 512, ("bf16",)),
    Aim("W = 2 against a gloo pipeline with grouped_mm: 1.5 ×", _over("pipeline-grouped_mm"), _same(1.5), 512, ranks=2),
    Aim("W = 2 against W = 1: 0.9 ×", _over("one-process"), _same(0.9), 512, ranks=2),
)  # fmt: skip


def aims(records: Sequence[Record]) -> str:
    rows = [
        [aim.what, *(aim.cell(records, layer, least) for layer, least in zip(_LAYERS, aim.least, strict=True))]
        for aim in AIMS
    ]  # fmt: skip
    return markdown(("aim", *_LAYERS.values()), rows)


TABLES: dict[str, Callable[[Any], str]] = {"runs": runs, "aims": aims, "training": training}
