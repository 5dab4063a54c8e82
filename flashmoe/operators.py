"""How this package's operators are made known to torch.

With ``Library.define`` rather than ``custom_op``, which costs more at every call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_library = torch.library.Library("flashmoe", "DEF")


def define(name: str, schema: str, implementation: Callable, fake: Callable, autograd: Callable | None = None):
    """The operator ``flashmoe::name`` for tensors of every device.

    ``fake`` gives tensors of the result's shapes; ``autograd(op, *args)`` is what a call does that may need a gradient.
    """
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.flashmoe, name).default
    # Not under "CPU": tensors of another device get our message instead of the dispatcher's.
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flashmoe::{name}", fake, lib=_library)
    if autograd is not None:
        _library.impl(name, lambda *args: autograd(op, *args), "Autograd")
    return op


def register_effectful(op) -> None:
    """Calls of ``op`` stay, in order: AOTAutograd threads tokens through them, and dead code elimination spares them.

    torch has no public name for the former yet; this one works from 2.9 to 2.13 at least. For the latter, 2.9
    must be told that the end of the chain of tokens is no dead code either, later versions know.
    """
    from torch._higher_order_ops.effects import _EffectType, _register_effectful_op, with_effects

    _register_effectful_op(op, _EffectType.ORDERED)
    for kept in (op, with_effects, torch.ops.prims._sink_tokens.default):
        torch.fx.node.has_side_effect(kept)
