"""Pieces of networks that no model family owns."""

from torchtune_vl.modules.attention import Segments, attend_within_segments, permute_rows
from torchtune_vl.modules.loss import (
    IGNORE_INDEX,
    SupervisedCrossEntropyLoss,
    chunked_cross_entropy,
)
from torchtune_vl.modules.patches import concatenate_patches
from torchtune_vl.modules.positions import (
    encoder_index,
    join_vision_indices,
    mrope_positions,
    vision_index,
)

__all__ = [
    "IGNORE_INDEX",
    "Segments",
    "SupervisedCrossEntropyLoss",
    "attend_within_segments",
    "chunked_cross_entropy",
    "concatenate_patches",
    "encoder_index",
    "join_vision_indices",
    "mrope_positions",
    "permute_rows",
    "vision_index",
]
