"""The network between the ranks of a world that cannot map each other's memory."""

import base64
from typing import Any

from . import _C
from .hosts import ucx_library
from .rendezvous import Rendezvous


def open_fabric(rendezvous: Rendezvous, segment: Any, hosts: list[dict], mapped: list[int], timeout_s: float) -> Any:
    """This rank's end of the network, connected to every rank that is not in ``mapped``; a collective.

    Peers may write to ``segment`` from then on.

    Raises:
        RuntimeError: UCX refuses.
        PeerError: a rank cannot be reached, or did not come in time.
    """
    rank, members = rendezvous.rank, rendezvous.members
    fabrics: list[Any] = []

    def open_mine() -> list[Any]:
        fabrics.append(_C.UcxFabric(ucx_library(), segment, rank, len(members)))
        address, key = fabrics[0].address
        return [base64.b64encode(address).decode(), key]

    def connect() -> None:
        far = [None if r in mapped else (base64.b64decode(address), key) for r, (address, key) in enumerate(addresses)]
        missing = fabrics[0].connect(far, timeout_s / 2)  # so that it is told before the others stop listening
        if missing is not None:
            raise _C.PeerError(
                f"rank {rank} on {hosts[rank]['name']} and rank {missing} on {hosts[missing]['name']} do not reach each "
                f"other through UCX: UCX_NET_DEVICES names the interfaces to use, and no firewall may stand between them"
            )

    try:
        addresses = rendezvous.exchange("network", open_mine, timeout_s)
        rendezvous.exchange("connected", connect, timeout_s)
    except BaseException:
        for fabric in fabrics:
            fabric.close()
        raise
    return fabrics[0]
