"""The experiments of the FlashMoE paper (arXiv 2506.04667, section 4) on 8 H100, and what is predicted here.

There: fp32 as tf32, top-2, two matrices an expert, both widths 2048, tokens above a capacity factor of 1 dropped; its
baselines in fp16. Here each point is simulated in the same way, and as one would run it: bf16, nothing dropped.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..models import SHAPES
from .machine import H100
from .scenario import Scenario, simulate


@dataclass(frozen=True)
class Published:
    """One point. ``milliseconds`` of FlashMoE and of what it was compared with; ``read_off``: from a bar's height."""

    experiment: str
    gpus: int
    tokens: int
    experts: int
    milliseconds: float
    baselines: dict[str, float]
    read_off: bool = False


def _over_tokens(gpus: int, ours: tuple[float, ...], **baselines: tuple[float, ...]) -> Iterator[Published]:
    for i, tokens in enumerate((4096, 8192, 16384)):
        others = {name.replace("_", "-"): times[i] for name, times in baselines.items()}
        yield Published("latency over tokens (fig. 8)", gpus, tokens, 32, ours[i], others)


def _over_experts(gpus: int, ours: tuple[float, ...], baselines: dict[str, tuple[float, ...]]) -> Iterator[Published]:
    for i, experts in enumerate((8, 16, 32, 64, 128)):
        others = {name: times[i] for name, times in baselines.items()}
        yield Published("latency over experts (fig. 12)", gpus, 16384, experts, ours[i], others, read_off=True)


PUBLISHED: tuple[Published, ...] = (
    *_over_tokens(4, (2.1, 3.4, 6.2), Comet=(3.0, 5.4, 10.0), FasterMoE=(7.9, 12.6, 22.4),
                  Megatron_CUTLASS=(4.9, 16.6, 17.4), Megatron_TE=(5.1, 9.0, 17.2)),
    *_over_tokens(8, (2.1, 3.7, 7.0), FasterMoE=(10.3, 21.3, 45.3), Megatron_CUTLASS=(9.9, 18.9, 36.9),
                  Megatron_TE=(10.0, 18.9, 36.9)),
    *(Published("weak scaling (fig. 11)", gpus, 8192, 32, ours, {}) for gpus, ours in ((2, 3.3), (4, 3.4), (8, 3.7))),
    *_over_experts(4, (8.3, 6.8, 6.3, 6.7, 8.3), {"Comet": (17.6, 10.1, 10.0, 10.1, 10.3)}),
    *_over_experts(8, (8.2, 8.1, 7.0, 6.9, 8.4), {}),
)  # fmt: skip

QUICK = tuple(point for point in PUBLISHED if point.tokens <= 8192)

_KEPT = ("engine", "seconds", "seconds_with_free_wires", "exposed_seconds", "hidden_share", "utilisation",
         "flops_per_gpu", "tokens_per_s")  # fmt: skip


def reproduce(
    report: Callable[[str], None] = lambda text: None, chosen: Sequence[Published] = PUBLISHED
) -> list[dict[str, Any]]:
    """The published points with both predictions; of weak scaling also T(2) / T(N), the paper's overlap efficiency."""
    points = []
    for published in chosen:
        report(f"{published.experiment}: {published.gpus} GPUs, {published.tokens} tokens, {published.experts} experts")
        shape = replace(SHAPES["flashmoe-paper"], num_experts=published.experts)
        scenario = Scenario(shape, H100, published.gpus, published.tokens)
        as_published = simulate(replace(scenario, dtype="tf32", capacity_factor=1.0))
        as_used = simulate(scenario)
        points.append({
            "experiment": published.experiment, "gpus": published.gpus, "tokens": published.tokens,
            "experts": published.experts, "read_off": published.read_off,
            "published_s": published.milliseconds / 1e3,
            "baselines_s": {name: value / 1e3 for name, value in published.baselines.items()},
            "tf32_capacity_1": {key: as_published[key] for key in _KEPT},
            "bf16_dropless": {key: as_used[key] for key in _KEPT},
        })  # fmt: skip
    return [point | _efficiency(point, points) for point in points]


def _efficiency(point: dict[str, Any], points: list[dict[str, Any]]) -> dict[str, Any]:
    if not point["experiment"].startswith("weak"):
        return {}
    two = next(one for one in points if one["experiment"] == point["experiment"] and one["gpus"] == 2)
    return {
        "overlap_efficiency": {
            "published": two["published_s"] / point["published_s"],
            **{kind: two[kind]["seconds"] / point[kind]["seconds"] for kind in ("tf32_capacity_1", "bf16_dropless")},
        }
    }
