"""Pieces of networks that no model family owns.

Decoder, encoder and attention are imported from their files: they take seconds, which data workers
and transforms need not spend.
"""

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
from torchtune_vl.modules.segments import Segments

__all__ = [
    "IGNORE_INDEX",
    "Segments",
    "SupervisedCrossEntropyLoss",
    "chunked_cross_entropy",
    "concatenate_patches",
    "encoder_index",
    "join_vision_indices",
    "mrope_positions",
    "vision_index",
]
