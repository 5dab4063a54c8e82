"""Agreements among some ranks through a key-value store: every one has a deadline and every failure is everybody's."""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from ._C import PeerError

_POLL_FIRST_S = 0.0002
_POLL_LAST_S = 0.02
_ERRORS = {kind.__name__: kind for kind in (ValueError, TypeError, RuntimeError, PeerError)}


class Rendezvous:
    """One agreement of the ranks ``members``, in named steps that all of them take in the same order.

    Each rank publishes one value a step and reads everybody's. The store only needs ``set``, ``get`` and ``check``;
    it is polled, so that a wait can notice a dead peer, a peer that gave up, and Ctrl-C.

    Args:
        store: a ``torch.distributed.Store``, with a prefix that no other agreement has ever used.
        rank: this rank, one of ``members``.
        members: global ranks.
        purpose: ends the sentence "rank 0 waited 60 s for rank 1 to …".
        is_alive: says of a rank whether its process still runs; None while that is not known.
        look_around: called between polls with the ranks still missing; may raise.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        members: Sequence[int],
        purpose: str,
        is_alive: Callable[[int], bool] | None = None,
        look_around: Callable[[list[int]], None] | None = None,
    ):
        self.store = store
        self.rank = rank
        self.members = list(members)
        self.purpose = purpose
        self.is_alive = is_alive
        self.look_around = look_around
        self._steps = 0

    def exchange(self, step: str, produce: Callable[[], Any], timeout_s: float) -> list[Any]:
        """Publish what ``produce`` returns (JSON); return everybody's value, in the order of ``members``.

        Raises:
            Whatever ``produce`` raised, here; on the other ranks an exception of the same kind that names this rank.
            PeerError: a member did not come within ``timeout_s`` seconds, has ended, or gave up.
        """
        self._steps += 1
        try:
            try:
                mine = {"value": produce()}
            except Exception as error:
                self._set(f"{step}/{self.rank}", {"error": [type(error).__name__, str(error)]})
                raise
            self._set(f"{step}/{self.rank}", mine)
            others = [member for member in self.members if member != self.rank]
            replies = self._collect(step, list(others), timeout_s)
            self._hear_who_gave_up(others)  # one that came, but not in time for somebody else
        except BaseException as error:
            self.give_up(error)
            raise
        replies[self.rank] = mine
        return [replies[member]["value"] for member in self.members]

    def await_one(self, step: str, member: int, timeout_s: float) -> Any:
        """The value that ``member`` publishes in ``step``; for use within a ``produce`` of that step."""
        return self._collect(step, [member], timeout_s)[member]["value"]

    def check_on(self, missing: Sequence[int]) -> None:
        """Raise if one of the ranks ``missing`` will never come."""
        self._hear_who_gave_up(missing)
        for member in missing:
            if self.is_alive is not None and not self.is_alive(member):
                raise PeerError(
                    f"rank {member} has ended while rank {self.rank} waited for it to {self.purpose}"
                )
        if self.look_around is not None:
            self.look_around(list(missing))

    def timed_out(self, missing: Sequence[int], timeout_s: float) -> PeerError:
        names = ", ".join(str(member) for member in missing)
        plural = "s" if len(missing) > 1 else ""
        return PeerError(
            f"rank {self.rank} waited {timeout_s:g} s for rank{plural} {names} to {self.purpose}"
        )

    def _collect(self, step: str, missing: list[int], timeout_s: float) -> dict[int, Any]:
        replies: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        pause = _POLL_FIRST_S

        def take_arrived() -> None:
            for member in list(missing):
                if not self._has(f"{step}/{member}"):
                    continue
                replies[member] = self._get(f"{step}/{member}")
                missing.remove(member)
                if "error" in replies[member]:
                    kind, text = replies[member]["error"]
                    text = text if text.startswith("rank ") else f"rank {member}: {text}"
                    raise _ERRORS.get(kind, RuntimeError)(text)

        while True:
            take_arrived()
            if not missing:
                return replies
            try:
                self.check_on(missing)
            except PeerError:
                take_arrived()  # it may have published just before it ended
                if missing:
                    raise
                return replies
            if time.monotonic() > deadline:
                raise self.timed_out(missing, timeout_s)
            time.sleep(pause)
            pause = min(pause * 1.5, _POLL_LAST_S)

    def give_up(self, error: BaseException) -> None:
        """Tell all members that this rank will not come (again): they must not wait, nor believe what it published."""
        try:
            self._set(f"gave_up/{self.rank}", [self._steps, str(error) or type(error).__name__])
        except PeerError:
            pass  # the store is gone too; `error` is what the caller gets to see

    def _hear_who_gave_up(self, members: Sequence[int]) -> None:
        for member in members:
            if self._has(f"gave_up/{member}"):
                steps, text = self._get(f"gave_up/{member}")
                if steps <= self._steps:  # a later step's failure is told by that step
                    raise PeerError(f"rank {member} gave up: {text}")

    def _has(self, key: str) -> bool:
        return self._ask(lambda: self.store.check([key]))

    def _get(self, key: str) -> Any:
        return json.loads(self._ask(lambda: self.store.get(key)))

    def _set(self, key: str, value: Any) -> None:
        self._ask(lambda: self.store.set(key, json.dumps(value)))

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except RuntimeError as error:  # torch's store errors derive from it
            raise PeerError(
                f"rank {self.rank} lost the store of torch.distributed (the process that serves it may have ended) "
                f"while it waited for its peers to {self.purpose}: {error}"
            ) from error
