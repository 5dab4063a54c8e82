"""Answers of the simulation as text: aligned columns, units beside the numbers."""

from collections.abc import Callable
from statistics import median
from typing import Any

from ..report import percent, table


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def scaling(answers: list[dict[str, Any]]) -> str:
    rows = [["layer", "GPUs", "ranks a group", "tokens", "uneven", "latency", "wires free", "exposed", "hidden",
             "tiles", "TFLOP/s a GPU", "M tokens/s", "GB a GPU"]]  # fmt: skip
    rejected = []
    for one in answers:
        if "rejected" in one:
            rejected.append(f"{one['model']}, {one['gpus']} GPUs, {one['tokens']} tokens: {one['rejected']}")
            continue
        rows.append([
            one["model"], str(one["gpus"]), str(one["ep_size"]), str(one["tokens"]), unevenness(one),
            microseconds(one["seconds"]), microseconds(one["seconds_with_free_wires"]),
            microseconds(one["exposed_seconds"]), percent(one["hidden_share"]), percent(one["utilisation"]),
            f"{one['flops_per_gpu'] / 1e12:.0f}", f"{one['tokens_per_s'] / 1e6:.1f}",
            f"{one['memory_bytes']['total'] / 1e9:.1f}",
        ])  # fmt: skip
    return "\n".join(["predicted; no GPU has run this", table(rows), *rejected])


def unevenness(one: dict[str, Any]) -> str:
    parts = [one["skew"]] if one["skew"] != "uniform" else []
    parts += [f"rank 0 x {one['slow']:g}"] if one["slow"] != 1 else []
    parts += [f"rank 0 + {microseconds(one['late_s'])}"] if one["late_s"] else []
    parts += [f"{one['senders']} senders"] if one["senders"] else []
    return ", ".join(parts)


def published(points: list[dict[str, Any]]) -> str:
    rows = [["experiment", "GPUs", "tokens", "experts", "FlashMoE, published", "tf32, capacity 1", "bf16, dropless",
             "published over tf32", "others, published"]]  # fmt: skip
    for point in points:
        ours = point["tf32_capacity_1"]["seconds"]
        others = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in point["baselines_s"].items())
        rows.append([
            point["experiment"], str(point["gpus"]), str(point["tokens"]), str(point["experts"]),
            f"{'~' if point['read_off'] else ''}{point['published_s'] * 1e3:.1f} ms", microseconds(ours),
            microseconds(point["bf16_dropless"]["seconds"]), f"{point['published_s'] / ours:.1f}", others,
        ])  # fmt: skip
    lines = [
        f"T(2) / T({point['gpus']}): " + ", ".join(
            f"{kind.replace('_', ' ')} {percent(share)}" for kind, share in point["overlap_efficiency"].items()
        )
        for point in points if "overlap_efficiency" in point
    ]  # fmt: skip
    return "\n".join(["FlashMoE's measurements on H100 beside predictions of this library there", table(rows), *lines])


def validated(found: dict[str, Any]) -> str:
    rows = [["run", "ranks", "tokens", "dtype", "measured", "quartiles", "simulated", "error", ""]]
    skipped = []
    for one in found["runs"]:
        if "skipped" in one:
            skipped.append(f"{one['name']}: skipped, {one['skipped']}")
            continue
        low, high = one["quartiles_s"]
        rows.append([
            one["name"], str(one["ranks"]), str(one["tokens"]), one["dtype"], microseconds(one["measured_s"]),
            f"{low * 1e3:.1f} to {high * 1e3:.1f}", microseconds(one["simulated_s"]), f"{one['error']:+.1%}",
            "fitted" if one["fitted"] else "",
        ])  # fmt: skip
    errors = sorted(abs(one["error"]) for one in found["runs"] if not one["fitted"] and "error" in one)
    summary = f"{len(errors)} runs that nothing was fitted to"
    if errors:
        summary += f": median error {median(errors):.1%}, largest {errors[-1]:.1%}"
    return "\n".join([table(rows), *skipped, summary])


def followed(differences: list[dict[str, Any]]) -> str:
    rows = [["following fewer ranks", "GPUs", "tokens", "followed", "latency", "of all", "error"]]
    rows += [
        [one["model"], str(one["gpus"]), str(one["tokens"]), str(one["follow"]), microseconds(one["seconds"]),
         microseconds(one["seconds_of_all"]), f"{one['error']:+.1%}"]
        for one in differences
    ]  # fmt: skip
    return table(rows)


def described(machines: dict[str, dict[str, Any]]) -> str:
    return "\n".join(f"{name}: {one['source']}" for name, one in machines.items())


TABLES: dict[str, Callable[[Any], str]] = {
    "gpus": scaling, "uneven": scaling, "fewer_senders": scaling, "paper": published, "validation": validated,
    "following_fewer": followed, "machines": described,
}  # fmt: skip
