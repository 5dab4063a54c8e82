"""What a forward call on the CPU keeps for its backward call, handed on beside torch's operators, which know tensors alone.

A tensor of one byte stands for it among those that autograd saves: it is let go with them, also by checkpoints and hooks
that save other tensors in their place. What they bring back stands for nothing, and the backward call makes again what
was kept.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import Parameter

from . import _C

_kept: weakref.WeakValueDictionary[int, _C.Kept] = weakref.WeakValueDictionary()  # by the address of its tensor
_here = threading.local()


def new_kept(x: Tensor) -> Tensor | None:
    """For the call with these tokens; None where nothing is kept: on a GPU, and while a compiler looks on."""
    if type(x) not in (Tensor, Parameter) or not x.is_cpu:
        return None
    kept = _C.Kept()
    tensor = torch.frombuffer(kept, dtype=torch.uint8)
    _kept[tensor.data_ptr()] = kept
    return tensor


@contextlib.contextmanager
def handed_on(tensor: Tensor | None) -> Iterator[None]:
    """To the call of the core that is made meanwhile by this thread."""
    _here.kept = None if tensor is None else _kept.get(tensor.data_ptr())
    try:
        yield
    finally:
        _here.kept = None


def kept_here() -> _C.Kept | None:
    return getattr(_here, "kept", None)
