"""Datasets that a config names."""

from torchtune_vl.datasets._chat import (
    StreamedVisionChat,
    VisionChatDataset,
    vision_chat_dataset,
)
from torchtune_vl.datasets._measure import SamplesError, measure_all

__all__ = [
    "SamplesError",
    "StreamedVisionChat",
    "VisionChatDataset",
    "measure_all",
    "vision_chat_dataset",
]
