"""Rotary position embeddings (RoFormer, arXiv 2104.09864) of the decoder and the vision encoder.

A table holds the cosines and sines of all angles and is made once per forward, in float32; the
layers only rotate by it.
"""

import torch
from torch import nn


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotate each pair (x[i], x[i + d/2]) of a head by its angle, in float32.

    The pairing of transformers' ``rotate_half``.

    Args:
        x: queries or keys [..., heads, d].
        table: cosines and sines, float32 [..., 2, d/2].

    Returns:
        Tensor of the shape and dtype of ``x``.
    """
    cos, sin = table.unsqueeze(-3).unbind(-2)
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.to(x.dtype)


def _inverse_frequencies(dim: int, base: float, device: torch.device) -> torch.Tensor:
    # Computed in each forward: a buffer would lose its precision in `model.to(torch.bfloat16)`
    return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim))


def _table(angles: torch.Tensor) -> torch.Tensor:
    return torch.stack([angles.cos(), angles.sin()], dim=-2)


class MultimodalRotaryTable(nn.Module):
    """Table of M-RoPE: each section of the frequencies turns with one of three positions.

    After transformers' ``Qwen2VLRotaryEmbedding``.

    Args:
        head_dim: dimension of a head.
        base: base of the frequencies.
        sections: number of frequencies that follow the temporal, height and width position.

    Raises:
        ValueError: if the sections do not add up to half of the head.
    """

    def __init__(self, head_dim: int, base: float, sections: tuple[int, int, int]) -> None:
        super().__init__()
        if 2 * sum(sections) != head_dim:
            raise ValueError(
                f"M-RoPE sections {list(sections)} cover {sum(sections)} frequencies, but a head "
                f"of dimension {head_dim} has {head_dim // 2}"
            )
        self.head_dim = head_dim
        self.base = base
        self.sections = sections

    def forward(self, input_pos: torch.Tensor) -> torch.Tensor:
        """Make the table.

        Args:
            input_pos: positions of each token, int64 [b, s, 3].

        Returns:
            Cosines and sines, float32 [b, s, 2, head_dim/2].
        """
        frequencies = _inverse_frequencies(self.head_dim, self.base, input_pos.device)
        angles = [
            position[..., None].float() * section
            for position, section in zip(
                input_pos.unbind(-1), frequencies.split(self.sections), strict=True
            )
        ]
        return _table(torch.cat(angles, dim=-1))


class VisionRotaryTable(nn.Module):
    """Table of the encoder: half of the frequencies turn with a patch's row, half with its column.

    After transformers' ``VisionRotaryEmbedding``.

    Args:
        head_dim: dimension of a head.
        merge_size: patches along a side of a unit.

    Raises:
        ValueError: if a head cannot be halved for two axes.
    """

    BASE = 10000.0

    def __init__(self, head_dim: int, merge_size: int) -> None:
        super().__init__()
        if head_dim % 4:
            raise ValueError(f"the encoder's heads need a dimension divisible by 4, got {head_dim}")
        self.head_dim = head_dim
        self.merge_size = merge_size

    def forward(self, unit_positions: torch.Tensor) -> torch.Tensor:
        """Make the table.

        Args:
            unit_positions: row and column of each unit of patches, int32 [units, 2].

        Returns:
            Cosines and sines, float32 [patches, 2, head_dim/2].
        """
        steps = torch.arange(self.merge_size, device=unit_positions.device)
        within_unit = torch.cartesian_prod(steps, steps)
        positions = unit_positions[:, None] * self.merge_size + within_unit
        frequencies = _inverse_frequencies(self.head_dim // 2, self.BASE, unit_positions.device)
        return _table((positions[..., None].float() * frequencies).flatten(2).flatten(0, 1))
