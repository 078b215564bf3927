"""Samples to rows and batches."""

from torchtune_vl.data._batch import Batch
from torchtune_vl.data._collate import (
    packed_collate_vision,
    padded_collate_vision,
    padded_collate_vision_supervised,
    padded_collate_vision_targets,
)
from torchtune_vl.data._packing import PackedRows, PaddedRows, Planner, Size
from torchtune_vl.data._rows import Row, TrainingRows

__all__ = [
    "Batch",
    "PackedRows",
    "PaddedRows",
    "Planner",
    "Row",
    "Size",
    "TrainingRows",
    "packed_collate_vision",
    "padded_collate_vision",
    "padded_collate_vision_supervised",
    "padded_collate_vision_targets",
]
