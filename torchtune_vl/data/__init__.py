"""Samples, one conversation each, to rows, which one forward takes, and their batches, tensors."""

from torchtune_vl.data._collate import (
    Batch,
    packed_collate_vision,
    padded_collate_vision,
    padded_collate_vision_supervised,
    padded_collate_vision_targets,
)
from torchtune_vl.data._packing import PackedRows, PaddedRows, Planner, Size
from torchtune_vl.data._plan import Draws, Plan
from torchtune_vl.data._row_shares import RowSharing
from torchtune_vl.data._streamed_rows import Stream, StreamedRows
from torchtune_vl.data._training_rows import Row, TrainingRows

__all__ = [
    "Batch",
    "Draws",
    "PackedRows",
    "PaddedRows",
    "Plan",
    "Planner",
    "Row",
    "RowSharing",
    "Size",
    "Stream",
    "StreamedRows",
    "TrainingRows",
    "packed_collate_vision",
    "padded_collate_vision",
    "padded_collate_vision_supervised",
    "padded_collate_vision_targets",
]
