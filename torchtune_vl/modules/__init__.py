"""Pieces of networks that no model family owns; those that stand on torchtune are not here."""

from torchtune_vl.modules.layout import (
    Segments,
    concatenate_patches,
    encoder_index,
    join_vision_indices,
    mrope_positions,
    vision_index,
)
from torchtune_vl.modules.loss import IGNORE_INDEX, SupervisedCrossEntropyLoss

__all__ = [
    "IGNORE_INDEX",
    "Segments",
    "SupervisedCrossEntropyLoss",
    "concatenate_patches",
    "encoder_index",
    "join_vision_indices",
    "mrope_positions",
    "vision_index",
]
