"""flashmoe: a Mixture-of-Experts layer whose experts live on many processors, as one operator."""

from . import distributed, routing
from ._C import PeerError, build_info
from ._version import __version__
from .groups import check
from .launch import launch
from .module import MoE, expert_parameters
from .ops import fused_moe
from .reference import moe_reference
from .routing_record import Routing
from .timeline import trace

__all__ = [
    "MoE", "PeerError", "Routing", "__version__", "build_info", "check", "distributed", "expert_parameters",
    "fused_moe", "launch", "moe_reference", "routing", "trace",
]  # fmt: skip
