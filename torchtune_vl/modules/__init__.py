"""Pieces of networks that no model family owns."""

from torchtune_vl.modules.attention import (
    attend_within_segments,
    concatenate_window_indices,
    permute_rows,
    segment_index,
    window_encoder_index,
)
from torchtune_vl.modules.loss import SupervisedCrossEntropyLoss
from torchtune_vl.modules.patches import concatenate_patches

__all__ = [
    "SupervisedCrossEntropyLoss",
    "attend_within_segments",
    "concatenate_patches",
    "concatenate_window_indices",
    "permute_rows",
    "segment_index",
    "window_encoder_index",
]
