"""The GPUs as a process alone sees them: for group=None, and each group of one rank, a team of one rank for each device,
made at first use, that grows with its calls."""

from __future__ import annotations

import os
import threading
import weakref

import torch

from . import _C
from .settings import settings_of_environment

SM_MARGIN_VARIABLE = "FLASHMOE_SM_MARGIN"
BACKWARD_VARIABLE = "FLASHMOE_BACKWARD_MIB"
# Addresses of _C.Gradients.
NUM_GRADIENTS = 6

# The device of each layer's last call, if that was on a GPU; layers are named by their group and number.
device_of_layer: dict[tuple[str | None, int], int] = {}

_lock = threading.Lock()
_local: dict[tuple[str | None, int], _C.CudaTeam] = {}  # by group (None: group=None) and device
_watched: weakref.WeakSet[_C.CudaTeam] = weakref.WeakSet()


class _Tracing:
    """Of a group's local teams: the events that a block keeps, and the teams that note them, the last to call last."""

    def __init__(self, max_events: int) -> None:
        self.max_events = max_events
        self.teams: list[tuple[_C.CudaTeam, int]] = []  # with their devices


_traced: dict[str | None, _Tracing] = {}  # by group


def has_cuda() -> bool:
    """This build has the CUDA half, and a GPU is here."""
    return hasattr(_C, "CudaTeam") and _C.num_cuda_devices() > 0


def missing() -> str | None:
    """Why no layer can be called on a GPU here; None: it can."""
    if not hasattr(_C, "CudaTeam"):
        lack = "this build of flashmoe has no CUDA half"
    elif not _C.num_cuda_devices():
        lack = "no GPU is here, or no driver for it"
    elif not torch.cuda.is_available():
        lack = f"a GPU is here, but torch {torch.__version__} cannot use it"
    else:
        return None
    return f"{lack}; `flashmoe info` tells what this installation has"


def watched(team: _C.CudaTeam) -> _C.CudaTeam:
    """From now on check() tells of it."""
    _watched.add(team)
    return team


def may_round_to_tf32(dtype: torch.dtype) -> bool:
    """Whether torch's own products of that dtype may be made in tf32, by whichever of its settings."""
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def queue(kind: str, team: _C.CudaTeam, device: int, dtype: torch.dtype, arguments: tuple) -> None:
    """One call of the team's rank in this process, queued on the current stream.

    The arguments are those of ``_C.Group``'s method named by ``kind``, "forward" or "backward".
    """
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        if kind == "forward":
            team.forward([_C.ForwardArgs(*arguments)], stream, may_round_to_tf32(dtype))
        else:
            gradients, arguments = arguments[:NUM_GRADIENTS], arguments[NUM_GRADIENTS:]
            team.backward([_C.ForwardArgs(*arguments)], [_C.Gradients(*gradients)], stream)


def call(kind: str, name: str | None, device: int, dtype: torch.dtype, layer: int, *arguments) -> None:
    """One call of that group's local team on the device, as of :func:`queue`."""
    with torch.cuda.device(device):
        team = _team_of(name, device)
        if name in _traced:
            _trace(name, team, device)
    try:
        queue(kind, team, device, dtype, arguments)
    except _C.PeerError:
        _forget(team)  # the next call makes a new one
        raise
    device_of_layer[name, layer] = device


def check() -> None:
    """Raises what the GPU has reported so far of an earlier call."""
    for team in list(_watched):
        try:
            team.check()
        except _C.PeerError:
            _forget(team)
            raise


def stats(name: str | None, layer: int) -> dict | None:
    """Of the layer's last call on its GPU, for which this waits; of one that failed they mean nothing."""
    team = _local.get((name, device_of_layer[name, layer]))
    return None if team is None else team.stats(layer)


def start_trace(name: str | None, max_events: int) -> None:
    """The group's local teams note their calls from now on: each from its next one, so that no idle GPU gives memory."""
    with _lock:
        _traced[name] = _Tracing(max_events)


def traced_last(name: str | None) -> tuple[_C.CudaTeam, int] | None:
    """The team, and its device, that made the last call since."""
    teams = _traced[name].teams
    return teams[-1] if teams else None


def stop_trace(name: str | None) -> None:
    with _lock:
        teams = _traced.pop(name).teams
    for team, _ in teams:
        team.set_trace(0)


def sm_margin_asked() -> int:
    """Multiprocessors that the local teams leave to others.

    Raises:
        ValueError: names the variable.
    """
    return _number_asked(SM_MARGIN_VARIABLE, "multiprocessors")


def backward_bytes_asked() -> int:
    """What a rank of several may keep of its rows in a backward call; 0: a quarter of the GPU's memory.

    Raises:
        ValueError: names the variable.
    """
    return _number_asked(BACKWARD_VARIABLE, "MiB") * 2**20


def _number_asked(variable: str, what: str) -> int:
    text = os.environ.get(variable, "") or "0"
    if not text.isdecimal():
        raise ValueError(f"{variable} must be a number of {what}, 0 or more, got {text!r}")
    return int(text)


def _team_of(name: str | None, device: int) -> _C.CudaTeam:
    with _lock:
        team = _local.get((name, device))
        if team is None:
            settings = settings_of_environment()
            team = _local[name, device] = watched(
                _C.CudaTeam(
                    device, timeout_s=settings.timeout_s, entry_timeout_s=settings.entry_timeout_s,
                    sm_margin=sm_margin_asked(),
                )
            )  # fmt: skip
        return team


def _trace(name: str | None, team: _C.CudaTeam, device: int) -> None:
    with _lock:
        tracing = _traced.get(name)
        if tracing is None or tracing.teams[-1:] == [(team, device)]:
            return
        if (team, device) not in tracing.teams:
            team.set_trace(tracing.max_events)
            tracing.teams.append((team, device))
        tracing.teams.sort(key=lambda one: one[0] is team)


def _forget(team: _C.CudaTeam) -> None:
    with _lock:
        for key in [key for key, other in _local.items() if other is team]:
            del _local[key]
