"""What is asked for the committed record: every model on 8 to 1,024 GPUs, skew, stragglers, senders."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from ..models import SHAPES
from .machine import H100
from .memory import DoesNotFit
from .scenario import Scenario, simulate
from .workload import Skew

GPU_COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)
_SOME_COUNTS = (8, 64, 1024)
_PREFILL, _DECODE = 8192, 128


def answer(scenarios: Iterable[Scenario], report: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]]:
    """Each with its answer, or with why its memory cannot be had. Equal groups of ranks are simulated once."""
    known: dict[str, dict[str, Any]] = {}
    answers = []
    for scenario in scenarios:
        group = replace(scenario, num_gpus=scenario.ep_size)
        name = repr(group)
        if name not in known:
            report(
                f"{scenario.shape.name}, {scenario.ep_size} ranks of {scenario.num_gpus} GPUs, {scenario.tokens} tokens"
            )
            try:
                known[name] = simulate(group)
            except DoesNotFit as why:
                known[name] = {"model": scenario.shape.name, "tokens": scenario.tokens, "ep_size": scenario.ep_size,
                               "rejected": str(why)}  # fmt: skip
        found = known[name] | {"gpus": scenario.num_gpus}
        if "seconds" in found:
            found["tokens_per_s"] = scenario.tokens * scenario.num_gpus / found["seconds"]
        answers.append(found)
    return answers


def all_models() -> list[Scenario]:
    """The published layers, prefill and decode; and the paper's with four experts a GPU, which no group divides."""
    scenarios = [
        Scenario(shape, H100, gpus, tokens)
        for shape in SHAPES.values() for tokens in (_PREFILL, _DECODE) for gpus in GPU_COUNTS
    ]  # fmt: skip
    grown = [replace(SHAPES["flashmoe-paper"], name="4 experts a GPU", num_experts=4 * gpus) for gpus in GPU_COUNTS]
    scenarios += [
        Scenario(shape, H100, gpus, tokens)
        for tokens in (_PREFILL, 1024)
        for shape, gpus in zip(grown, GPU_COUNTS, strict=True)
    ]
    # What cannot be had: all its layers on one node, inboxes for many tokens of many ranks.
    deepseek = Scenario(SHAPES["deepseek-v3"], H100, 8, _PREFILL, layers=58)
    return scenarios + [
        deepseek,
        replace(deepseek, num_gpus=256, layers=1, tokens=4 * _PREFILL),
        Scenario(grown[-1], H100, GPU_COUNTS[-1], 2 * _PREFILL),
    ]


def some_of_all_models() -> list[Scenario]:
    return [scenario for scenario in all_models() if scenario.num_gpus in _SOME_COUNTS and scenario.tokens <= _PREFILL]


def uneven() -> list[Scenario]:
    """What one rank's slowness or experts' popularity does to all."""
    scenarios = []
    for gpus in (8, 16):
        even = Scenario(SHAPES["qwen3-30b-a3b"], H100, gpus, 1024, follow=gpus)
        scenarios += [even, *(replace(even, skew=Skew.parse(text)) for text in ("zipf:0.4", "zipf:0.8", "hot:4"))]
        scenarios += [replace(even, slow=slow) for slow in (1.2, 2.0)] + [
            replace(even, late_s=late) for late in (1e-4, 1e-3)
        ]
    return scenarios


def fewer_senders() -> list[Scenario]:
    """What if not all workers sent before any of them computed?"""
    return [
        Scenario(SHAPES[name], replace(H100, senders=senders), gpus, _PREFILL)
        for name, gpus in (("qwen3-30b-a3b", 8), ("deepseek-v2-lite", 8), ("flashmoe-paper", 8), ("qwen3-30b-a3b", 32))
        for senders in (None, 8, 16)
    ]


def following_fewer(report: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]]:
    """By how much a world whose routing repeats differs from one in which all ranks are followed."""
    differences = []
    for name, gpus, tokens in (
        ("qwen3-30b-a3b", 8, 2048), ("qwen3-30b-a3b", 16, 2048), ("qwen3-30b-a3b", 32, 1024),
        ("flashmoe-paper", 32, 2048), ("deepseek-v2-lite", 32, 128), ("deepseek-v3", 32, 1024),
    ):  # fmt: skip
        report(f"following fewer: {name}, {gpus} GPUs, {tokens} tokens")
        scenario = Scenario(SHAPES[name], H100, gpus, tokens, follow=gpus)
        all_ranks = simulate(scenario)["seconds"]
        for follow in sorted({1, min(8, gpus // 2)}):
            fewer = simulate(replace(scenario, follow=follow))["seconds"]
            differences.append({"model": name, "gpus": gpus, "tokens": tokens, "follow": follow, "seconds": fewer,
                                "seconds_of_all": all_ranks, "error": fewer / all_ranks - 1})  # fmt: skip
    return differences
