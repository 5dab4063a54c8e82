"""Which tokens go to which experts: drawn by a popularity of the experts, and repeated over the ranks."""

from dataclasses import dataclass
from math import ceil

import numpy as np


@dataclass(frozen=True)
class Skew:
    """How popular experts are.

    Attributes:
        kind: "uniform"; "zipf": the n-th expert by 1 / n^amount, in a random order; "hot": one expert is ``amount``
            times as likely as the mean, the others are alike.
    """

    kind: str = "uniform"
    amount: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Skew":
        """Of ``uniform``, ``zipf:0.6`` or ``hot:4``.

        Raises:
            ValueError: says what is allowed.
        """
        kind, _, amount = text.partition(":")
        try:
            skew = cls(kind, float(amount) if amount else 0.0)
        except ValueError:
            skew = cls("")
        allowed = {"uniform": skew.amount == 0, "zipf": 0 < skew.amount <= 4, "hot": skew.amount > 1}
        if not allowed.get(skew.kind, False):
            raise ValueError(f"must be uniform, zipf:S with S up to 4, or hot:X with X above 1, got {text!r}")
        return skew

    def popularity(self, num_experts: int, seed: int) -> np.ndarray:
        """Of each expert, with a sum of 1."""
        weights = np.ones(num_experts)
        if self.kind == "zipf":
            weights = 1.0 / np.arange(1, num_experts + 1) ** self.amount
            np.random.default_rng(seed).shuffle(weights)
        elif self.kind == "hot":
            weights[0] = self.amount * (num_experts - 1) / max(num_experts - self.amount, 1e-9)
        return weights / weights.sum()

    def __str__(self) -> str:
        return self.kind if self.kind == "uniform" else f"{self.kind}:{self.amount:g}"


def draw(tokens: int, num_experts: int, top_k: int, skew: Skew, *, rank: int, seed: int) -> np.ndarray:
    """Experts of each token of a rank, one after the other by popularity, and all different.

    Returns:
        int32 [tokens, top_k].
    """
    bounds = np.cumsum(skew.popularity(num_experts, seed))
    bounds[-1] = 1.0
    random = np.random.default_rng((seed, rank))
    ids = np.empty((tokens, top_k), dtype=np.int32)
    for choice in range(top_k):
        missing = np.arange(tokens)
        while len(missing):
            drawn = np.searchsorted(bounds, random.random(len(missing)), side="right")
            ids[missing, choice] = drawn
            missing = missing[(ids[missing, :choice] == drawn[:, None]).any(axis=1)]
    return ids


def with_capacity(ids: np.ndarray, num_experts: int, factor: float) -> np.ndarray:
    """With the pairs above capacity dropped (-1): of each source and expert the first ceil(factor * T / E) * k stay."""
    tokens, top_k = ids.shape
    capacity = ceil(factor * tokens / num_experts) * top_k
    flat = ids.ravel()
    order = np.argsort(flat, kind="stable")
    counts = np.bincount(flat, minlength=num_experts)
    place = np.empty(flat.size, dtype=np.int64)
    place[order] = np.arange(flat.size) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.where(place < capacity, flat, -1).reshape(ids.shape).astype(np.int32)


@dataclass(frozen=True)
class Workload:
    """What all ranks call the layer with.

    With fewer drawn ranks than ranks, routing repeats: rank r + n·period sends its tokens n·period ranks further than
    rank r does. Then the ranks r, r + period, ... do the same at the same time, and one of each need be followed. So
    this is an exact simulation of a world with less chance in it, not a coarser one.

    Attributes:
        ids: of each followed rank, [tokens, top_k], -1 for dropped.
        num_ranks: of the world; a multiple of ``len(ids)``.
        late_s: how much later than the first each followed rank enters.
        slow: by which each followed rank computes longer, as with a lower clock.
    """

    ids: tuple[np.ndarray, ...]
    num_ranks: int
    num_experts: int
    late_s: tuple[float, ...] = ()
    slow: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        period = len(self.ids)
        if self.num_ranks % period:
            raise ValueError(f"{period} followed ranks do not divide a world of {self.num_ranks}")
        if period < self.num_ranks and self.num_experts % self.num_ranks:
            raise ValueError(
                f"{self.num_experts} experts are not equally many on {self.num_ranks} ranks: follow all of them"
            )

    @property
    def period(self) -> int:
        return len(self.ids)

    @property
    def top_k(self) -> int:
        return self.ids[0].shape[1]

    @property
    def rank_begin(self) -> np.ndarray:
        """First expert of each rank, and their number at the end."""
        return np.arange(self.num_ranks + 1) * self.num_experts // self.num_ranks
