"""How much of the processors other programs took while something was timed: a busy machine makes no fair comparison."""

import os
import time
from pathlib import Path


class ProcessorTime:
    """Processor seconds since this object was made."""

    def __init__(self) -> None:
        self._wall, self._mine, self._machine = time.monotonic(), time.process_time(), _machine_seconds()

    def mine(self) -> float:
        """Of this process, all threads."""
        return time.process_time() - self._mine

    def shares(self, ours: float) -> dict[str, float] | None:
        """Mean numbers of cores that were ours, others', and idle; None where the system does not tell.

        Args:
            ours: processor seconds of all processes that belong to this run.
        """
        now = _machine_seconds()
        if now is None or self._machine is None:
            return None
        wall = max(time.monotonic() - self._wall, 1e-3)
        busy, idle = ((after - before) / wall for after, before in zip(now, self._machine, strict=True))
        return {"ours": ours / wall, "others": max(0.0, busy - ours / wall), "idle": idle}


def is_contended(shares: dict[str, float] | None) -> bool:
    """Whether others took a tenth of the machine while hardly a tenth of it was idle."""
    return shares is not None and shares["others"] > 0.1 * sum(shares.values()) > shares["idle"]


def _machine_seconds() -> tuple[float, float] | None:
    """(busy, idle) seconds of all processors since the machine started; time that a hypervisor stole is busy."""
    try:
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    user, nice, system, idle, iowait, irq, softirq, steal = fields
    ticks = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq + steal) / ticks, (idle + iowait) / ticks
