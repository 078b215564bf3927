"""Rotary position embeddings (RoFormer, arXiv 2104.09864) of the decoder and the vision encoder.

A table of all cosines and sines is made once per forward, in float32; the layers rotate by it.
"""

from collections.abc import Sequence

import torch


def inverse_frequencies(dim: int, base: float, device: torch.device) -> torch.Tensor:
    """Return the frequencies of a dimension, float32 [dim/2].

    Computed in each forward: a buffer would lose its precision in ``model.to(torch.bfloat16)``.
    """
    return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim))


def rotary_table(positions: torch.Tensor, frequencies: Sequence[torch.Tensor]) -> torch.Tensor:
    """Make the cosines and sines, float32 [..., 2, d/2], of positions [..., axes].

    The first of ``frequencies``, which are d/2 together, turn with the position on the first axis,
    and so on: transformers' ``Qwen2VLRotaryEmbedding`` and ``VisionRotaryEmbedding``.
    """
    angles = [
        position[..., None].float() * section
        for position, section in zip(positions.unbind(-1), frequencies, strict=True)
    ]
    joined = torch.cat(angles, dim=-1)
    return torch.stack([joined.cos(), joined.sin()], dim=-2)


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotate each pair (x[i], x[i + d/2]) of heads [..., heads, d] by its angle, in float32.

    The pairing of transformers' ``rotate_half``. Returns the dtype of ``x``.
    """
    cos, sin = table.unsqueeze(-3).unbind(-2)
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.to(x.dtype)
