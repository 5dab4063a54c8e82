"""What docs/simulation.md says in numbers, drawn from the record of ``flashmoe bench scale --study all``."""

from collections.abc import Callable
from statistics import median
from typing import Any

from ..markdown import markdown
from ..models import SHAPES
from . import machine_numbers
from .tables import microseconds, unevenness

_GPUS_SHOWN = (8, 32, 128, 256, 1024)


def _held_out(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for one in record["validation"]["runs"] if not one["fitted"] and "error" in one]


def fit(record: dict[str, Any]) -> str:
    found, held = record["validation"]["fit"], _held_out(record)
    errors = [abs(one["error"]) for one in held]
    several = [abs(one["error"]) for one in held if one["ranks"] > 1]
    return (
        "Three numbers are fitted, each to one run of one process: what tile products reach of a BLAS "
        f"({found['math_share']:.2f}), what a call\ncosts beside its work ({found['call_s'] * 1e3:.2f} ms), and "
        f"widening a 16-bit weight ({found['widen_s'] * 1e12:.0f} ps). All other runs, of other layers, tokens,\ndtypes, and "
        f"**all with 2 and 4 ranks, were not fitted to**: {len(held)} runs, median error {median(errors):.1%}, largest "
        f"{max(errors):.1%};\nof the {len(several)} with 2 or 4 ranks the largest is {max(several):.1%}."
    )


def validation(record: dict[str, Any]) -> str:
    rows = []
    for one in record["validation"]["runs"]:
        if "skipped" in one:
            rows.append([one["name"], *[""] * 5, f"skipped: {one['skipped']}", ""])
            continue
        low, high = (1e3 * s for s in one["quartiles_s"])
        rows.append([
            one["name"], str(one["ranks"]), str(one["tokens"]), one["dtype"],
            f"{1e3 * one['measured_s']:.1f} ({low:.1f} – {high:.1f})", f"{1e3 * one['simulated_s']:.1f}",
            f"{one['error']:+.1%}", "fitted to" if one["fitted"] else "",
        ])  # fmt: skip
    return markdown(("run", "W", "T", "dtype", "measured (quartiles), ms", "simulated, ms", "error", ""), rows)


def following(record: dict[str, Any]) -> str:
    def largest(single: bool) -> float:
        return max(abs(one["error"]) for one in record["following_fewer"] if (one["follow"] == 1) == single)

    gpus = sorted({one["gpus"] for one in record["following_fewer"]})
    return (
        f"Against following all ranks it errs by {largest(False):.1%} at most at {gpus[0]} to {gpus[-1]} GPUs; "
        f"following a single one, by up to {largest(True):.0%}."
    )


def paper(record: dict[str, Any]) -> str:
    rows = []
    for one in record["paper"]:
        best = min(one["baselines_s"].items(), key=lambda other: other[1], default=None)
        rows.append([
            one["experiment"], str(one["gpus"]), str(one["tokens"]), str(one["experts"]),
            f"{'~' if one['read_off'] else ''}{1e3 * one['published_s']:.1f}",
            *(f"{1e3 * one[kind]['seconds']:.2f}" for kind in ("tf32_capacity_1", "bf16_dropless")),
            f"{1e3 * best[1]:.1f} ({best[0]})" if best else "",
        ])  # fmt: skip
    head = ("experiment", "GPUs", "T", "E", "published, ms", "tf32, capacity 1", "bf16, dropless",
            "best other published, ms")  # fmt: skip
    return markdown(head, rows)


def overlap(record: dict[str, Any]) -> str:
    points = [one for one in record["paper"] if "overlap_efficiency" in one and one["gpus"] > 2]
    told = (
        "{gpus} GPUs: published {published:.0%}, predicted {tf32_capacity_1:.0%} (tf32) and {bf16_dropless:.0%} "
        "(bf16)".format(gpus=one["gpus"], **one["overlap_efficiency"]) for one in points
    )  # fmt: skip
    return f"T(2) / T(N), which the paper calls overlap efficiency: {'; '.join(told)}."


def gpus(record: dict[str, Any]) -> str:
    """Some counts of GPUs, and of those that are more equal groups only the largest."""
    rows, last = [], None
    for one in record["gpus"]:
        group = (one["model"], one["tokens"], one["ep_size"])
        if "rejected" in one or one["gpus"] not in _GPUS_SHOWN or (group == last and one["gpus"] != _GPUS_SHOWN[-1]):
            continue
        last = group
        rows.append([
            one["model"], str(one["tokens"]), str(one["gpus"]), str(one["ep_size"]), microseconds(one["seconds"]),
            microseconds(one["seconds_with_free_wires"]), f"{one['hidden_share']:.0%}", f"{one['utilisation']:.0%}",
            f"{one['flops_per_gpu'] / 1e12:.0f}", f"{one['tokens_per_s'] / 1e6:.1f}",
        ])  # fmt: skip
    head = ("layer", "T", "GPUs", "ranks a group", "latency", "with free wires", "hidden share of wire time",
            "time in tiles", "TFLOP/s a GPU", "M tokens/s")  # fmt: skip
    return markdown(head, rows)


def rejected(record: dict[str, Any]) -> str:
    told = (
        f"- {one['model']}, {one['gpus']} GPUs, {one['tokens']} tokens: {one['rejected']}"
        for one in record["gpus"] if "rejected" in one
    )  # fmt: skip
    return "\n".join(["Rejected, as no GPU has the memory:", "", *told])


def uneven(record: dict[str, Any]) -> str:
    rows = [
        [str(one["gpus"]), unevenness(one) or "even", microseconds(one["seconds"]), f"{one['busiest_rank']:.2f} x",
         f"{one['hidden_share']:.0%}"]
        for one in record["uneven"]
    ]  # fmt: skip
    return markdown(("GPUs", "", "latency", "busiest rank", "hidden"), rows)


def senders(record: dict[str, Any]) -> str:
    rows = [
        [one["model"], str(one["gpus"]), str(one["senders"] or "all"), microseconds(one["seconds"]),
         f"{one['hidden_share']:.0%}"]
        for one in record["fewer_senders"]
    ]  # fmt: skip
    return markdown(("layer, 8192 tokens", "GPUs", "senders at a time", "latency", "hidden"), rows)


def wires(record: dict[str, Any]) -> str:
    largest = {}
    for one in record["gpus"]:
        if "rejected" not in one and one["tokens"] == 8192 and one["model"] in SHAPES:
            largest[one["model"]] = max(largest.get(one["model"], one), one, key=lambda each: each["ep_size"])
    told = (
        f"{name} {one['seconds'] / one['seconds_with_free_wires']:.1f} ({one['ep_size']} ranks)"
        for name, one in largest.items()
    )  # fmt: skip
    return f"   Latency over that with free wires, 8192 tokens, largest groups:\n   {', '.join(told)}."


def peers(record: dict[str, Any]) -> str:
    machine = record["machines"]["h100"]
    answers = [one for one in record["gpus"] if "rejected" not in one]
    one = max(answers, key=lambda one: (one["ep_size"], -one["tokens"]))
    return (
        f"   They take {microseconds(machine['plan_peer_s'])} and {microseconds(machine['header_s'])} a peer. For "
        f"{one['ep_size']} ranks with {one['tokens']} tokens each a call takes {microseconds(one['seconds'])},\n"
        f"   {microseconds(one['seconds_with_free_wires'])} with wires that cost nothing."
    )


def down_tiles(record: dict[str, Any]) -> str:
    (one,) = (
        one for one in record["gpus"] if (one["model"], one["gpus"], one["tokens"]) == ("mixtral-8x7b", 8, 128)
    )  # fmt: skip
    return (
        f"   With {one['tokens']} tokens on each of {one['gpus']} GPUs a call takes {microseconds(one['seconds'])}, of "
        f"which a multiprocessor spends {microseconds(one['busy_seconds']['down'])} in down\n"
        f"   tiles on the mean, {microseconds(one['busy_seconds']['up'])} in up tiles; {one['utilisation']:.0%} of the "
        "multiprocessors' time is in tiles."
    )


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "scale-fit": fit, "scale-validation": validation, "scale-following": following, "scale-paper": paper,
    "scale-overlap": overlap, "scale-gpus": gpus, "scale-rejected": rejected, "scale-uneven": uneven,
    "scale-senders": senders, "scale-machine": machine_numbers.numbers, "scale-wires": wires, "scale-peers": peers,
    "scale-down-tiles": down_tiles,
}  # fmt: skip
