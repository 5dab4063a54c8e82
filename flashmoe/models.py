"""Shapes of published Mixture-of-Experts layers, by name, and what one call of them computes and reads."""

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class LayerShape:
    """The routed part of one MoE layer; shared experts and attention are not in it.

    Attributes:
        name: as on the command line.
        hidden_size, intermediate_size, num_experts, top_k: widths in elements, counts.
        router: name of a router of ``flashmoe.routing``; ``router_options`` are its keyword arguments.
        activation, gated: of the expert FFN; gated has three matrices an expert, ungated two.
        source: where the numbers come from.
        note: in what the published layer differs from what runs here.
        scale: what the published widths have been divided by.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    router: str
    source: str
    router_options: dict[str, Any] = field(default_factory=dict)
    activation: str = "silu"
    gated: bool = True
    note: str = ""
    scale: int = 1

    def scaled(self, scale: int) -> "LayerShape":
        """The same layer with both widths divided by ``scale``; counts stay as they are.

        Raises:
            ValueError: ``scale`` does not divide both widths.
        """
        if scale < 1 or self.hidden_size % scale or self.intermediate_size % scale:
            raise ValueError(
                f"scale must divide hidden_size {self.hidden_size} and intermediate_size {self.intermediate_size} "
                f"of {self.name}, got {scale}"
            )
        return replace(
            self,
            hidden_size=self.hidden_size // scale,
            intermediate_size=self.intermediate_size // scale,
            scale=self.scale * scale,
        )

    def with_experts(self, num_experts: int) -> "LayerShape":
        """The same layer with another number of experts, which its name tells.

        Raises:
            ValueError: fewer than a token goes to.
        """
        if num_experts < self.top_k:
            raise ValueError(f"experts must be at least {self.top_k}, a token's of {self.name}, got {num_experts}")
        return replace(self, num_experts=num_experts, name=f"{self.name}-e{num_experts}")

    @property
    def up_rows(self) -> int:
        """Rows of one expert's ``gate_up_proj``."""
        return self.intermediate_size * (2 if self.gated else 1)

    @property
    def expert_elements(self) -> int:
        """Weights of one expert."""
        return self.hidden_size * (self.up_rows + self.intermediate_size)

    def flops(self, rows: int) -> int:
        """Multiplications and additions of the matrix products of ``rows`` (token, expert) pairs."""
        return 2 * rows * self.expert_elements


SHAPES: dict[str, LayerShape] = {
    shape.name: shape
    for shape in (
        LayerShape(
            name="mixtral-8x7b",
            hidden_size=4096,
            intermediate_size=14336,
            num_experts=8,
            top_k=2,
            router="softmax_topk",
            source="config.json of mistralai/Mixtral-8x7B-v0.1; arXiv 2401.04088, table 1",
        ),
        LayerShape(
            name="qwen3-30b-a3b",
            hidden_size=2048,
            intermediate_size=768,
            num_experts=128,
            top_k=8,
            router="softmax_topk",
            source="config.json of Qwen/Qwen3-30B-A3B (norm_topk_prob true); arXiv 2505.09388",
        ),
        LayerShape(
            name="deepseek-v3",
            hidden_size=7168,
            intermediate_size=2048,
            num_experts=256,
            top_k=8,
            router="group_limited",
            router_options={"num_groups": 8, "topk_groups": 4, "routed_scaling_factor": 2.5},
            source="config.json of deepseek-ai/DeepSeek-V3; arXiv 2412.19437, section 4.2",
            note="without its shared expert",
        ),
        LayerShape(
            name="deepseek-v2-lite",
            hidden_size=2048,
            intermediate_size=1408,
            num_experts=64,
            top_k=6,
            router="softmax_topk",
            router_options={"renormalize": False},
            source="config.json of deepseek-ai/DeepSeek-V2-Lite (norm_topk_prob false); arXiv 2405.04434, appendix B",
            note="without its two shared experts",
        ),
        LayerShape(
            name="llama4-scout",
            hidden_size=5120,
            intermediate_size=8192,
            num_experts=16,
            top_k=1,
            router="sigmoid_bias",
            router_options={"renormalize": False},
            source="text_config of config.json of meta-llama/Llama-4-Scout-17B-16E",
            note="without its shared expert; the router's weight scales the expert's output here, its input there",
        ),
        LayerShape(
            name="flashmoe-paper",
            hidden_size=2048,
            intermediate_size=2048,
            num_experts=32,
            top_k=2,
            router="softmax_topk",
            activation="relu",
            gated=False,
            source="arXiv 2506.04667, section 4 (E = 32, top-2, both widths 2048, two matrices an expert)",
            note="the paper drops tokens above a capacity factor of 1; nothing is dropped here",
        ),
    )
}
