"""Hidden states of real text, so that routing is skewed as in life: the states of frequent tokens prefer few experts.

The text is Python's own standard library, which every installation carries. A token is a word, a number, a sign or a
line's indentation, hashed into a fixed vocabulary. Its embedding passes four layers of causal attention with random
weights, each added to the residual stream, so that a token's state depends on what stands before it; the last step is
the RMS norm that a model has in front of its MoE layer.
"""

import re
import sysconfig
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F

VOCABULARY = 32768
_EMBEDDING_RANK = 256  # a factorised embedding: VOCABULARY x 256 x hidden_size, small at every width
_HEADS, _HEAD_DIM = 4, 64
_LAYERS = 4
_SHARPNESS = 4.0  # of attention: a token looks at a few others, not at the mean of all
_CONTEXT = 2048  # tokens that attend to each other
_TOKEN = re.compile(r"[A-Za-z_]+|[0-9]+|\n *|[^\sA-Za-z_0-9]")


def standard_library_files() -> list[Path]:
    """The ``.py`` sources of this Python's top-level modules, in the order of their names.

    Raises:
        RuntimeError: this installation has none.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.glob("*.py"))
    if not files:
        raise RuntimeError(f"no .py sources of the standard library in {folder}; use random input instead")
    return files


def text_token_ids(num_tokens: int, skip: int = 0) -> torch.Tensor:
    """Tokens ``skip`` to ``skip + num_tokens`` of the standard library, from its start again after its end.

    Returns:
        int64 [num_tokens], each below ``VOCABULARY``.
    """
    wanted, ids = skip + num_tokens, []
    for path in standard_library_files():
        text = path.read_text(encoding="utf-8", errors="replace")
        # crc32, not hash(): the same in every process and on every machine
        ids.extend(zlib.crc32(token.encode()) % VOCABULARY for token in _TOKEN.findall(text))
        if len(ids) >= wanted:
            break
    stretch = torch.tensor(ids, dtype=torch.int64)
    return stretch[torch.arange(skip, wanted) % len(ids)]


def text_activations(num_tokens: int, hidden_size: int, *, rank: int = 0, seed: int = 0) -> torch.Tensor:
    """Hidden states of the ``rank``-th stretch of ``num_tokens`` tokens.

    Returns:
        float32 [num_tokens, hidden_size] with a root mean square of 1 in each row; the same for the same arguments
        and the same Python version.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    embedding = torch.randn(VOCABULARY, _EMBEDDING_RANK, generator=generator)
    widen = random(hidden_size, _EMBEDDING_RANK)
    residual = F.linear(embedding[text_token_ids(num_tokens, skip=rank * num_tokens)], widen)
    width = _HEADS * _HEAD_DIM
    for _ in range(_LAYERS):
        query_key_value, output = random(3 * width, hidden_size), random(hidden_size, width)
        mixed = [_attend(F.linear(_rms_norm(part), query_key_value)) for part in residual.split(_CONTEXT)]
        residual = residual + F.linear(torch.cat(mixed), output)
    return _rms_norm(residual)


def random_activations(num_tokens: int, hidden_size: int, *, rank: int = 0, seed: int = 0) -> torch.Tensor:
    """Independent normal numbers, float32 [num_tokens, hidden_size]: routing as even as chance makes it."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + rank)
    return torch.randn(num_tokens, hidden_size, generator=generator)


def _attend(query_key_value: torch.Tensor) -> torch.Tensor:
    """Causal attention of [T, 3 * heads * head_dim] -> [T, heads * head_dim]."""
    num_tokens = query_key_value.shape[0]
    query, key, value = query_key_value.view(num_tokens, 3, _HEADS, _HEAD_DIM).permute(1, 2, 0, 3).unsqueeze(1)
    mixed = F.scaled_dot_product_attention(query * _SHARPNESS, key, value, is_causal=True)
    return mixed[0].transpose(0, 1).reshape(num_tokens, _HEADS * _HEAD_DIM)


def _rms_norm(rows: torch.Tensor) -> torch.Tensor:
    return rows * torch.rsqrt(rows.square().mean(dim=-1, keepdim=True) + 1e-6)
