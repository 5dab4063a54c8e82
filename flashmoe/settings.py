"""What a world is asked to hold and how long it waits: arguments, environment variables, defaults."""

import dataclasses
import math
import os
from typing import Any

from ._C import Limits
from .arena import round_up

TIMEOUT_VARIABLE = "FLASHMOE_TIMEOUT_S"
ENTRY_TIMEOUT_VARIABLE = "FLASHMOE_ENTRY_TIMEOUT_S"
REMOTE_ONLY_VARIABLE = "FLASHMOE_REMOTE_ONLY"
TRANSPORT_VARIABLE = "FLASHMOE_TRANSPORT"
NUM_WORKERS_VARIABLE = "FLASHMOE_NUM_WORKERS"

_TRANSPORTS = ("shm", "ucx")

_ADDRESSABLE_BYTES = 2**47  # beyond it the core's arithmetic would go wrong, too

_SIZES = ("max_tokens", "max_wire_bytes", "max_top_k", "max_experts", "max_groups")
_LONGEST_S = 1e9  # thirty years: what clocks and sockets still take
_SECONDS = {"timeout_s": TIMEOUT_VARIABLE, "entry_timeout_s": ENTRY_TIMEOUT_VARIABLE}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Equal on all ranks of a world. ``flashmoe.distributed.init`` says what each one means."""

    max_tokens: int = 1024
    max_wire_bytes: int = 8192
    max_top_k: int = 8
    max_experts: int = 256
    max_groups: int = 2
    timeout_s: float = 60.0
    entry_timeout_s: float = 600.0
    remote_only: int | None = None
    transport: str | None = None
    backward: bool = True
    device: str = "cpu"  # what ranks are: "cpu" or "cuda"

    def limits(self, ep_size: int) -> Limits:
        return Limits(ep_size, self.max_tokens, self.max_wire_bytes, self.max_top_k, self.max_experts, self.backward)

    def arena_bytes(self, world_size: int) -> int:
        """Of one rank's segment.

        Raises:
            RuntimeError: more than a process can address.
        """
        rows = self.max_tokens * ((1 + self.backward) * (world_size - 1) + self.max_top_k)
        if self.max_groups * rows * self.max_wire_bytes >= _ADDRESSABLE_BYTES:
            gib = self.max_groups * rows * self.max_wire_bytes / 2**30
            raise RuntimeError(f"symmetric heap: {gib:.1f} GiB per rank asked, more than a process can address")
        return self.max_groups * round_up(self.limits(world_size).heap_bytes)

    def remote_only_seed(self, rank: int) -> int | None:
        """A seed of its own for each rank, so that their networks do not err alike."""
        return None if self.remote_only is None else (self.remote_only * 1_000_003 + rank) % 2**63

    def changed(self, changes: dict[str, Any]) -> "Settings":
        """With ``changes`` applied, all in range.

        Raises:
            ValueError: names the field, its range and what came.
        """
        settings = dataclasses.replace(self, **changes)
        for name in _SIZES:
            value = getattr(settings, name)
            if type(value) is not int or not 1 <= value < 2**31:
                raise ValueError(f"{name} must be an integer from 1 to 2^31 - 1, got {value!r}")
        if type(settings.backward) is not bool:
            raise ValueError(f"backward must be True or False, got {settings.backward!r}")
        for name in _SECONDS:
            value = getattr(settings, name)
            if type(value) not in (int, float) or not 0 < value <= _LONGEST_S:
                raise ValueError(f"{name} must be a number of seconds above 0, at most {_LONGEST_S:g}, got {value!r}")
        seed = settings.remote_only
        if seed is not None and (type(seed) is not int or not 0 <= seed < 2**63):
            raise ValueError(f"remote_only must be None or a seed from 0 to 2^63 - 1, got {seed!r}")
        if settings.transport not in (None, *_TRANSPORTS):
            raise ValueError(f"transport must be None, 'shm' or 'ucx', got {settings.transport!r}")
        if seed is not None and settings.transport == "ucx":
            raise ValueError("remote_only rehearses a network, so transport must not be 'ucx' with it")
        if settings.device == "cuda" and seed is not None:
            raise ValueError("remote_only rehearses a network between ranks on CPUs, got it with device='cuda'")
        return settings

    def grown(self, asked: dict[str, int]) -> "Settings":
        """Large enough for ``asked``; nothing gets smaller."""
        self.changed(asked)
        return dataclasses.replace(self, **{name: max(value, getattr(self, name)) for name, value in asked.items()})


def settings_of_environment() -> Settings:
    """Defaults, as far as the environment does not say otherwise.

    Raises:
        ValueError: names the variable.
    """
    changes: dict[str, Any] = {}
    for name, variable in _SECONDS.items():
        text = os.environ.get(variable, "")
        if not text:
            continue
        try:
            changes[name] = float(text)
        except ValueError:
            changes[name] = math.nan
        if not 0 < changes[name] <= _LONGEST_S:
            raise ValueError(f"{variable} must be a number of seconds above 0, at most {_LONGEST_S:g}, got {text!r}")
    seed = os.environ.get(REMOTE_ONLY_VARIABLE, "")
    if seed:
        if not seed.isdecimal() or int(seed) >= 2**63:
            raise ValueError(f"{REMOTE_ONLY_VARIABLE} must be a seed, an integer from 0 to 2^63 - 1, got {seed!r}")
        changes["remote_only"] = int(seed)
    transport = os.environ.get(TRANSPORT_VARIABLE, "")
    if transport:
        if transport not in _TRANSPORTS:
            raise ValueError(f"{TRANSPORT_VARIABLE} must be shm or ucx, got {transport!r}")
        changes["transport"] = transport
    return Settings(**changes)


def num_workers_asked(argument: int | None) -> int | None:
    """The number of worker threads somebody asked for: the argument, else the environment, else None.

    Raises:
        ValueError: names which.
    """
    if argument is not None:
        if type(argument) is not int or argument < 1:
            raise ValueError(f"num_workers must be an integer of at least 1, got {argument!r}")
        return argument
    text = os.environ.get(NUM_WORKERS_VARIABLE, "")
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{NUM_WORKERS_VARIABLE} must be an integer of at least 1, got {text!r}")
    return int(text)
