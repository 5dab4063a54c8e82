"""One layer call over all ranks, drawn from one seed: data, placement, the call itself, and how far off it may be."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import flashmoe
from flashmoe import moe_reference

SKEWS = ("uniform", "zipf", "one_hot_expert", "one_rank", "few_experts", "repeated", "some_dropped", "all_dropped")
# Half a unit in the last place, relative: what one rounding to the dtype may cost.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# float32 sums over the widths used here, relative to the largest element of the row.
ACCUMULATION = 1e-5


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Many tiny products: on busy cores, the threads of one would wait for each other far longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclasses.dataclass
class LayerCase:
    hidden_size: int = 32
    intermediate_size: int = 24
    num_experts: int = 8
    top_k: int = 2
    tokens: tuple[int, ...] = (17,)  # of each rank
    dtype: torch.dtype = torch.float32
    activation: str = "silu"
    gated: bool = True
    bias: bool = False
    owners: tuple[int, ...] | None = None  # the rank of each expert
    skew: str = "uniform"
    ids_dtype: torch.dtype = torch.int64
    layer: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(self.dtype)

        h, i, e, k = self.hidden_size, self.intermediate_size, self.num_experts, self.top_k
        up = 2 * i if self.gated else i
        self.gate_up_proj, self.down_proj = normal(e, up, h, scale=h**-0.5), normal(e, h, i, scale=i**-0.5)
        self.gate_up_bias = normal(e, up, scale=0.3) if self.bias else None
        self.down_bias = normal(e, h, scale=0.3) if self.bias else None
        self.x = [normal(t, h) for t in self.tokens]
        self.topk_ids = [self._ids(t, generator).to(self.ids_dtype) for t in self.tokens]
        self.topk_weights = [torch.rand(t, k, generator=generator) for t in self.tokens]

    @property
    def ep_size(self) -> int:
        return len(self.tokens)

    def owner(self, expert: int) -> int:
        return self.owners[expert] if self.owners else expert * self.ep_size // self.num_experts

    def local_experts(self, rank: int) -> list[int]:
        return [e for e in range(self.num_experts) if self.owner(e) == rank]

    def _ids(self, num_tokens: int, generator: torch.Generator) -> Tensor:
        """[num_tokens, top_k]; distinct within a token except where the skew says otherwise."""
        e, k = self.num_experts, self.top_k
        likely = torch.ones(e)
        if self.skew == "zipf":
            likely = 1.0 / torch.arange(1, e + 1) ** 1.5
        elif self.skew == "one_rank":
            likely = torch.tensor([float(self.owner(expert) == self.owner(0)) for expert in range(e)])
        elif self.skew == "few_experts":
            likely = (torch.arange(e) < max(k, e // 4)).float()
        distinct = self.skew != "repeated" and int((likely > 0).sum()) >= k
        if num_tokens == 0:
            return torch.empty(0, k, dtype=torch.int64)
        ids = torch.multinomial(likely.expand(num_tokens, e), k, replacement=not distinct, generator=generator)
        if self.skew == "one_hot_expert":
            hot = e // 2
            ids = torch.where(ids == hot, ids[:, :1], ids)
            ids[:, 0] = hot
        elif self.skew == "some_dropped":
            fate = torch.rand(num_tokens, k, generator=generator)
            ids[fate < 0.2], ids[fate > 0.8] = e, -1
            ids[::5] = e
        elif self.skew == "all_dropped":
            ids[:] = e
        return ids

    def weights_of(self, rank: int) -> dict[str, Any]:
        """What one rank holds: its experts, ascending."""
        mine = self.local_experts(rank)
        kept = {"gate_up_proj": self.gate_up_proj[mine], "down_proj": self.down_proj[mine]}
        if self.bias:
            kept |= {"gate_up_bias": self.gate_up_bias[mine], "down_bias": self.down_bias[mine]}
        return kept

    def call(self, rank: int, group: Any) -> Tensor:
        owners = torch.tensor(self.owners, dtype=torch.int32) if self.owners else None
        return flashmoe.fused_moe(
            self.x[rank], self.topk_ids[rank], self.topk_weights[rank], **self.weights_of(rank),
            activation=self.activation, gated=self.gated, group=group, expert_map=owners, layer=self.layer,
        )  # fmt: skip

    def alone(self) -> Tensor:
        """The same call by one process that owns every expert, all ranks' tokens in a row."""
        whole = dataclasses.replace(self, owners=None, tokens=(sum(self.tokens),))
        for name in ("x", "topk_ids", "topk_weights"):
            setattr(whole, name, [torch.cat(getattr(self, name))])
        for name in ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias"):
            setattr(whole, name, getattr(self, name))
        return whole.call(0, None)

    def check(self, rank: int, y: Tensor) -> None:
        """Asserts that y is the layer's result for that rank, element by element.

        An expert's row is rounded once to the dtype, their sum once more; the rest is float32 accumulation.
        """
        x, weights = self.x[rank], self.topk_weights[rank].double()[..., None]
        assert y.shape == x.shape and y.dtype == x.dtype and y.is_contiguous()
        # Each (token, choice) by itself: [T, k, H].
        with one_torch_thread():
            rows = moe_reference(
                x.repeat_interleave(self.top_k, 0), self.topk_ids[rank].reshape(-1, 1), torch.ones(weights.numel(), 1),
                self.gate_up_proj, self.down_proj, activation=self.activation, gated=self.gated,
                gate_up_bias=self.gate_up_bias, down_bias=self.down_bias, compute_dtype=torch.float64,
            ).reshape(*weights.shape[:2], self.hidden_size)  # fmt: skip
        expected, magnitude = (weights * rows).sum(1), (weights * rows).abs().sum(1)
        allowed = ROUNDING[self.dtype] * (magnitude + expected.abs()) * 1.02
        allowed = allowed + ACCUMULATION * magnitude.amax(dim=-1, keepdim=True)
        if self.dtype == torch.float16:
            allowed = allowed + 2.0**-24  # float16 keeps fewer digits of small numbers
        excess = (y.double() - expected).abs() - allowed
        if excess.numel():
            worst = divmod(int(excess.argmax()), self.hidden_size)
            assert excess.max() <= 0, (
                f"rank {rank}, token {worst[0]}, column {worst[1]}: expected {expected[worst]:.9g} "
                f"within {allowed[worst]:.3g}, got {y[worst]:.9g}; {self}"
            )


def assert_same_bits(got: Tensor, expected: Tensor, about: str = "") -> None:
    """NaN in the same places, and every bit of the rest equal."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    integer = {4: torch.int32, 2: torch.int16}[got.element_size()]
    differ = (got.view(integer) != expected.view(integer)) & ~(got.isnan() & expected.isnan())
    if differ.any():
        first = tuple(differ.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(differ.sum())} of {differ.numel()} elements differ {about}, first at {first}: "
            f"{got[first]:.9g} and {expected[first]:.9g}"
        )
