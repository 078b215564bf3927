"""Pieces of networks that no model family owns."""

from torchtune_vl.modules.attention import (
    Documents,
    Segments,
    attend_within_documents,
    attend_within_segments,
    concatenate_window_indices,
    permute_rows,
    segment_index,
    window_encoder_index,
)
from torchtune_vl.modules.loss import SupervisedCrossEntropyLoss, chunked_cross_entropy
from torchtune_vl.modules.patches import concatenate_patches

__all__ = [
    "Documents",
    "Segments",
    "SupervisedCrossEntropyLoss",
    "attend_within_documents",
    "attend_within_segments",
    "chunked_cross_entropy",
    "concatenate_patches",
    "concatenate_window_indices",
    "permute_rows",
    "segment_index",
    "window_encoder_index",
]
