"""Samples to batches."""

from torchtune_vl.data._batch import Batch
from torchtune_vl.data._collate import padded_collate_vision, padded_collate_vision_supervised

__all__ = ["Batch", "padded_collate_vision", "padded_collate_vision_supervised"]
