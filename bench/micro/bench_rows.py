"""What the CPU engine does to rows beside its products: the activation, and the weighted sum of a token's rows."""

import pytest
import torch
from bench_tiles import DTYPES, close

from flashmoe.arguments import ACTIVATION_CODES, DTYPE_CODES
from flashmoe.reference import ACTIVATIONS


@pytest.mark.parametrize("activation", list(ACTIVATION_CODES))
def test_activation(micro, measure, isa, activation):
    """Of as many numbers as an up tile's sums, in the first-level cache."""
    x = 3 * torch.randn(4096)
    out = torch.full_like(x, torch.nan)

    def stretch(n: int) -> float:
        return micro.activate(isa, ACTIVATION_CODES[activation], x.data_ptr(), len(x), out.data_ptr(), n)

    stretch(1)
    assert torch.allclose(out, ACTIVATIONS[activation](x), rtol=1e-5, atol=1e-6)
    measure(stretch, items=len(x))


@pytest.mark.sizes("tokens", [16, 4096], [512])
@pytest.mark.sizes("top_k", [8], [1, 2])
@pytest.mark.sizes("dtype", ["fp32", "bf16"], ["fp16"])
def test_combine(micro, measure, dtype, top_k, tokens):
    """One token's y: rows scattered over all that came back, which a cache holds for few tokens and not for many."""
    hidden = 2048
    rows = torch.randn(tokens * top_k, hidden).to(DTYPES[dtype])
    index = torch.randperm(tokens * top_k).int().view(tokens, top_k)
    weights = torch.rand(tokens, top_k)
    y = torch.full((tokens, hidden), torch.nan, dtype=rows.dtype)
    tiles = micro.Tiles(micro.isas()[-1], DTYPE_CODES[y.dtype], ACTIVATION_CODES["silu"], True, hidden, 16)

    def stretch(n: int) -> float:
        return tiles.combine(rows.data_ptr(), index.data_ptr(), weights.data_ptr(), tokens, top_k, y.data_ptr(), n)

    stretch(tokens)
    few = slice(0, 64)
    assert close(y[few], (rows[index[few]].double() * weights[few, :, None].double()).sum(1), y.dtype)
    assert y.isfinite().all()
    measure(stretch, bytes=(top_k + 1) * hidden * y.itemsize)
