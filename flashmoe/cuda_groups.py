"""A group whose ranks are GPUs, as the operators see it."""

from __future__ import annotations

import torch

from . import _C, cuda_teams
from .arena import PeerProcesses

__all__ = ["CudaGroup"]


class CudaGroup:
    """This rank's membership: what ``flashmoe._C.Group`` is where ranks are processes on CPUs.

    Attributes:
        device: where the tensors of a call lie.
        members: global ranks.
    """

    def __init__(
        self, team: _C.CudaTeam, name: str, ep_rank: int, limits: _C.Limits, device: torch.device, members: list[int],
        peers: PeerProcesses,
    ) -> None:  # fmt: skip
        self.team, self.name, self.ep_rank, self.limits, self.device = team, name, ep_rank, limits, device
        self.members, self._peers = members, peers
        self._failed: str | None = None

    @property
    def ep_size(self) -> int:
        return self.limits.ep_size

    @property
    def failed(self) -> str | None:
        """Why the group can be used no more, as far as the GPU has told; None: nothing is known."""
        if self._failed is None:
            try:
                self.team.check()
            except _C.PeerError as error:
                self._failed = self._with_the_ended(str(error))
        return self._failed

    def call(self, kind: str, dtype: torch.dtype, layer: int, *arguments) -> None:
        """One call of that kind, queued on the current stream; arguments as of ``_C.Group``'s method of that name."""
        try:
            cuda_teams.queue(kind, self.team, self.device.index, dtype, arguments)
        except _C.PeerError as error:
            self._failed = self._failed or self._with_the_ended(str(error))
            raise _C.PeerError(self._failed) from None

    def stats(self, layer: int) -> dict | None:
        """Of the layer's last call, for which this waits; as of ``_C.Group``."""
        return self.team.stats(layer)

    def _with_the_ended(self, text: str) -> str:
        # A GPU sees deadlines alone; the host may know why.
        ended = [str(member) for member in self.members if not self._peers.is_alive(member)]
        return f"{text} The process of rank {', '.join(ended)} has ended." if ended else text
