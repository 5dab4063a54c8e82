"""The record of a run as text: aligned columns, units beside the numbers."""

from collections.abc import Sequence
from typing import Any

from .baselines import is_rival
from .contention import is_contended


def milliseconds(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} µs"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def seconds_of(seconds: float) -> str:
    """Three digits, in the unit that fits: of what may take nanoseconds or minutes."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


def size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the head; the first column is left-aligned, the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def head(record: dict[str, Any]) -> str:
    """What runs, and where: known before anything is measured."""
    shape, run, versions, host = (record[key] for key in ("shape", "run", "versions", "machine"))
    scale = f" with widths / {shape['scale']}" if shape["scale"] > 1 else ""
    rank = f"{run['ranks']} ranks" if run["ranks"] > 1 else "1 rank"
    gpu = f"{host['gpu']}; " if "gpu" in host else ""
    lines = [
        ("flashmoe", f"{versions['flashmoe']} ({versions['commit'] or 'installed'}), torch {versions['torch']}"),
        ("machine", f"{gpu}{host['processor']}, {host['usable_cores']} cores, {host['isa']}"),
        ("layer", f"{shape['name']}{scale}: hidden {shape['hidden_size']}, intermediate {shape['intermediate_size']}, "
                  f"{shape['num_experts']} experts, top {shape['top_k']}, "
                  f"{'gated ' if shape['gated'] else ''}{shape['activation']}, router {shape['router']}"),
        ("", shape["source"] + (f"; {shape['note']}" if shape["note"] else "")),
        ("run", f"{rank} x {run['tokens']} tokens ({run['input']}), {run['dtype']}, threads a rank: {run['threads']}, "
                f"{run['transport']}, seed {run['seed']}"),
    ]  # fmt: skip
    return "\n".join(f"{name:<10}{text}" for name, text in lines)


def body(record: dict[str, Any]) -> str:
    """What was measured."""
    load, error, rates, floor = (record[key] for key in ("routing", "error", "rates", "floor"))
    latency, routed = record["latency"], record.get("latency_with_router")
    reading = floor["read_seconds"] > floor["compute_seconds"]
    cached = reading and floor["share_of_speed"] > 1
    experts = record["shape"]["num_experts"]
    on_gpu = record["run"].get("device") == "cuda"
    product = record["run"]["dtype"] if on_gpu else f"fp32 with as many threads, {rates['threads']}"
    lines = [
        ("routing", f"busiest expert {load['busiest_expert']:.2f} x the mean, busiest rank "
                    f"{load['busiest_rank']:.2f} x; {load['experts_used']} of {experts} experts used"),
        ("error", f"max {error['max']:.2e}, relative {error['relative']:.2e} (bound {error['bound']:.2e}); "
                  f"{error['checked_tokens']} of {error['tokens']} tokens against float64; "
                  f"a repeat is bitwise {'equal' if error['bitwise_repeat'] else 'DIFFERENT'}"),
        ("latency", f"p50 {milliseconds(latency['p50'])}, p95 {milliseconds(latency['p95'])} of {latency['samples']} "
                    f"samples{'; with the router p50 ' + milliseconds(routed['p50']) if routed else ''}"),
        ("speed", f"{latency['gflops']:.1f} GFLOP/s = {percent(record['gemm_share'])} of the pure GEMM rate "
                  f"({rates['gemm_gflops']:.1f} in {product})"),
        ("floor", f"{milliseconds(floor['seconds'])} for the {'weights' if reading else 'FLOPs'}; "
                  f"{percent(floor['share_of_speed'])} of its speed reached "
                  f"({' to '.join(percent(share) for share in floor['share_of_speed_quartiles'])}; FLOPs "
                  f"{milliseconds(floor['compute_seconds'])}, reading {size(floor['weight_bytes_touched'])} of weights "
                  f"{milliseconds(floor['read_seconds'])} at {rates['read_gb_s']:.1f} GB/s)"
                  + ("; above 100%: the weights were still in a cache" if cached else "")),
    ]  # fmt: skip
    parts = ["\n".join(f"{name:<10}{text}" for name, text in lines)]
    if "timeline" in record:
        parts.append(timeline(record["timeline"]))
    if record["run"]["ranks"] > 1:
        parts.append(traffic(record["bytes_per_peer"]))
    if record["baselines"]:
        parts.append(comparison(record))
    if is_contended(record["cores_while_timing"]):
        cores = record["cores_while_timing"]
        parts.append(
            f"note: while this was timed, other programs took {cores['others']:.1f} of "
            f"{sum(cores.values()):.1f} cores; the times say little"
        )
    return "\n\n".join(parts)


def traffic(bytes_per_peer: list[dict[str, list[int]]]) -> str:
    """Bytes of one call as the transport counted them, one line for each pair of ranks that are different."""
    kinds = list(bytes_per_peer[0])
    rows = [["sent in a call", *kinds, "total"]]
    world_size = len(bytes_per_peer)
    for source in range(world_size):
        for peer in range(world_size):
            counts = [bytes_per_peer[source][kind][peer] for kind in kinds]
            if source != peer:
                rows.append([f"rank {source} to rank {peer}", *map(size, counts), size(sum(counts))])
    return table(rows)


def timeline(one: dict[str, Any]) -> str:
    lost = f"; {one['lost_events']} events lost" if one["lost_events"] else ""
    clocks = _clocks(one["clock_error"])
    hidden = f"; {percent(one['overlap'])} busy while rows are under way" if one["overlap"] is not None else ""
    low, high = one["cost_quartiles"]
    return (
        f"timeline  {milliseconds(one['seconds'])} of {one['workers']} workers: {percent(one['utilization'])} busy "
        f"({percent(one['tiles'])} in tiles), {percent(one['exposed'])} waiting in between, {percent(one['tail'])} at "
        f"the end{hidden}{lost}{clocks}; a call that is traced takes {one['cost']:.3f} x as long "
        f"({low:.3f} to {high:.3f})"
    )


def _clocks(error: float | None) -> str:
    if error is None:
        return "; ranks' clocks could not be compared"
    return f"; ranks' times right to {seconds_of(error)}" if error else ""


def comparison(record: dict[str, Any]) -> str:
    """The baselines beside the floor, and how much faster the layer is where it was timed."""
    rows = [["baseline", "p50", "p95", "samples", "GFLOP/s", "floor", "rel. error", "flashmoe is faster by"]]
    skipped = []
    for one in record["baselines"]:
        if "skipped" in one:
            skipped.append(f"{one['name']}: skipped, {one['skipped']}")
            continue
        errors = [one[name] for name in ("relative_error",) if name in one] + [*one.get("gradient_errors", {}).values()]
        ratio = "{:.2f} x ({:.2f} to {:.2f})".format(one["ratio"], *one["ratio_quartiles"]) if "ratio" in one else "–"
        rows.append([
            one["name"], milliseconds(one["p50"]), milliseconds(one["p95"]), str(one["samples"]),
            f"{one['gflops']:.1f}", percent(record["floor"]["seconds"] / one["p50"]),
            f"{max(errors):.1e}" if errors else "–", ratio,
        ])  # fmt: skip
    return "\n".join(([table(rows)] if len(rows) > 1 else []) + skipped)


def verdict(record: dict[str, Any]) -> str:
    """The last line of a run that went well."""
    shape, run, error = record["shape"], record["run"], record["error"]
    name = shape["name"] + (f"/{shape['scale']}" if shape["scale"] > 1 else "")
    timed = [one for one in record["baselines"] if "ratio" in one and is_rival(one["name"])]
    fastest = min(timed, key=lambda one: one["p50"], default=None)
    against = f", {fastest['ratio']:.2f} x the speed of {fastest['name']}" if fastest else ""
    return (
        f"OK {name} {run['dtype']}, {run['ranks']} x {run['tokens']} tokens: relative error {error['relative']:.1e}, "
        f"{milliseconds(record['latency']['p50'])}, {record['latency']['gflops']:.1f} GFLOP/s, "
        f"{percent(record['floor']['share_of_speed'])} of the floor's speed{against}"
    )
