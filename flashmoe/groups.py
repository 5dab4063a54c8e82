"""The groups as the operators see them: found by name, the local one, and the statistics of each layer's last call."""

from __future__ import annotations

import functools
import itertools
import os
import threading
import weakref
from collections.abc import Callable

import torch

from . import _C, cuda_teams, distributed
from .cuda_groups import CudaGroup
from .keeping import kept_here

# Groups given as objects, by the name they got here; groups looked up by name, for check().
_given_groups: weakref.WeakValueDictionary[str, _C.Group] = weakref.WeakValueDictionary()
_given_names: weakref.WeakKeyDictionary[_C.Group, str] = weakref.WeakKeyDictionary()
_named_groups: weakref.WeakValueDictionary[str, _C.Group | CudaGroup] = weakref.WeakValueDictionary()
_given_count = itertools.count()


def name_of(group) -> str:
    """The name by which an operator finds the group: of a ProcessGroup, a flashmoe._C.Group, or the name itself.

    A _C.Group is held weakly: whoever made it keeps it alive.
    """
    if isinstance(group, str):
        return group
    if isinstance(group, _C.Group):
        name = _given_names.get(group)
        if name is None:
            name = _given_names.setdefault(group, f"{group.name}#{next(_given_count)}")
            _given_groups[name] = group
        return name
    return distributed.group_name(group)


def find(name: str) -> _C.Group | CudaGroup:
    group = _given_groups.get(name)
    if group is None:
        group = _named_groups[name] = distributed.group_of(name)
    return group


def check() -> None:
    """Raises what an earlier call of this process left behind; else does nothing.

    flashmoe.PeerError for a group that has failed, or a GPU's call that passed its deadline; ValueError for an id
    in topk_ids that a GPU found to be no expert's. It waits for nothing: of a GPU it knows what has run so far, so
    call torch.cuda.synchronize() first to be sure.
    """
    for group in [*_given_groups.values(), *_named_groups.values()]:
        if group.failed:
            raise _C.PeerError(group.failed)
    cuda_teams.check()


class LocalGroup:
    """The one process-wide group of group=None: made at first use, one call at a time, made anew after a fork."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.group: _C.Group | None = None
        self.num_workers: int | None = None  # None: as many as torch has threads

    def acquire(self) -> _C.Group:
        """The group, with as many workers as torch has threads now. The caller holds the lock."""
        num_workers = self.num_workers or torch.get_num_threads()
        if self.group is None:
            setting = os.environ.get("FLASHMOE_NUM_WORKERS")
            if setting is not None:
                if not (setting.isdigit() and int(setting) > 0):
                    raise ValueError(f"FLASHMOE_NUM_WORKERS must be a positive integer, got {setting!r}")
                num_workers = self.num_workers = int(setting)
            self.group = _C.local_group(num_workers)
        elif self.group.num_workers != num_workers:
            self.group.num_workers = num_workers
        return self.group

    def forget(self) -> None:
        """In a forked child, whose copy of the group has no worker threads and perhaps a lock that nobody holds."""
        self.lock, self.group = threading.Lock(), None
        _last_layer.pop(None, None)


local = LocalGroup()
os.register_at_fork(after_in_child=local.forget)

# Statistics belong to a group's last call. They are kept per layer by taking them down before another layer's call.
_last_layer: dict[str | None, int] = {}
_kept_stats: dict[tuple[str | None, int], dict] = {}


def call(kind: str, name: str | None, group: _C.Group, layer: int, *arguments) -> None:
    """One call of that kind, "forward" or "backward", as _C.Group's method takes it after what is kept. None: the local group."""
    last = _last_layer.get(name, layer)
    if last != layer and last != 0:
        _kept_stats[name, last] = group.stats()
    getattr(group, kind)(kept_here(), *arguments)
    _last_layer[name] = layer
    cuda_teams.device_of_layer.pop((name, layer), None)


def call_on(name: str, group: _C.Group | CudaGroup, x: torch.Tensor, kind: str = "forward") -> Callable[..., None]:
    """What makes a call of the group where x lies: takes the layer, then the arguments of ``_C.Group``'s method.

    Raises:
        ValueError: the group's ranks are not there.
    """
    if isinstance(group, CudaGroup):
        if x.device != group.device:
            raise ValueError(f"x must be on {group.device}, where this rank of group {group.name!r} is, got {x.device}")
        return functools.partial(group.call, kind, x.dtype)
    if not x.is_cuda:
        return functools.partial(call, kind, name, group)
    if group.ep_size > 1:
        raise ValueError(
            f"x must be on the CPU, as the ranks of group {group.name!r} are (flashmoe.distributed.init(device='cuda') "
            f"makes ranks of GPUs), got {x.device}"
        )
    return functools.partial(cuda_teams.call, kind, name, x.device.index, x.dtype)


def stats_of_call(name: str | None, layer: int) -> dict | None:
    """Statistics of that layer's last call in this process on that group (None: the local one, of whatever device)."""
    if (name, layer) in cuda_teams.device_of_layer:
        return cuda_teams.stats(name, layer)
    group = _named_groups.get(name)
    if isinstance(group, CudaGroup):
        return group.stats(layer)
    if _last_layer.get(name) != layer:
        return _kept_stats.get((name, layer))
    return (local.group if name is None else find(name)).stats()
