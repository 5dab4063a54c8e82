"""The numbers of a GPU as a record holds them, beside where each comes from, which no record holds."""

from typing import Any

from ..markdown import markdown
from .tables import microseconds


def numbers(record: dict[str, Any]) -> str:
    h100, h200 = (record["machines"][name] for name in ("h100", "h200"))
    near, far, tera, giga = h100["near"], h100["far"], 1e12, 1e9
    rows = [
        ("multiprocessors, 16-bit dense",
         f"{h100['workers']}, {h100['workers'] * h100['math_flops'] / tera:.0f} TFLOP/s", "NVIDIA's data sheets"),
        ("memory", f"{h100['memory_bytes'] / giga:.0f} GB (H200: {h200['memory_bytes'] / giga:.0f})",
         "NVIDIA's data sheets"),
        ("memory's rate", f"{h100['memory_read'] / tera:.2f} TB/s (H200: {h200['memory_read'] / tera:.2f})",
         "0.9 of the data sheets' 3.35 and 4.8, as copies on H200 reached"),
        ("L2", f"{h100['cache_read'] / tera:.1f} TB/s together, {h100['worker_cache_read'] / giga:.0f} GB/s for one; "
         f"{h100['cache_bytes'] / 1e6:.0f} MB for weights",
         "between the 5.5 and 7 of [performance.md](performance.md); 64 bytes a cycle; 50 MB in all"),
        ("NVLink", f"{near['bytes_per_s'] / giga:.0f} GB/s a direction, {microseconds(near['latency_s'])}",
         "0.8 of the data sheet's 450; share and latency assumed"),
        ("InfiniBand", f"{far['bytes_per_s'] / giga:.0f} GB/s a GPU, {microseconds(far['latency_s'])}, a put every "
         f"{far['put_s'] * 1e6:.1f} us", "0.9 of 400 Gb/s; share and times assumed"),
        ("a worker copies or adds up", f"{h100['copy'] / giga:.0f} and {h100['add'] / giga:.0f} GB/s",
         "assumed: some 30 KB in flight at 1 us"),
        ("a tile beside its products", microseconds(h100["tile_s"]), "assumed"),
        ("plan", f"{microseconds(h100['plan_s'])}, {h100['plan_pair_s'] * 1e9:.1f} ns a pair, "
         f"{microseconds(h100['plan_peer_s'])} a peer",
         "0.15 ms for 65536 pairs, 8 ranks, as predicted there; per peer assumed"),
        ("a header, and an agent's look",
         f"{microseconds(h100['header_s'])}, {microseconds(h100['notice_s'])} for each 32 ranks",
         "assumed: two or three walks to memory, and one"),
        ("tf32", "0.3 of the 16-bit rate", "in no record: half, times 0.6 for mma.sync on Hopper; assumed"),
    ]  # fmt: skip
    return markdown(("what", "H100 SXM", "from"), [list(row) for row in rows])
