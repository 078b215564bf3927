"""Datasets that a config names: records of files to samples, which a model's transform takes."""

from torchtune_vl.datasets._conversations import (
    StreamedVisionChat,
    VisionChatDataset,
    vision_chat_dataset,
)
from torchtune_vl.datasets._mixture import Mixture
from torchtune_vl.datasets._open import open_dataset
from torchtune_vl.datasets._preferences import PreferencePairs, preference_pairs
from torchtune_vl.datasets._prepared import PreparedDataset, prepared_dataset
from torchtune_vl.datasets._sample_sizes import (
    Measurements,
    SamplesError,
    measure,
    measure_all,
)

__all__ = [
    "Measurements",
    "Mixture",
    "PreferencePairs",
    "PreparedDataset",
    "SamplesError",
    "StreamedVisionChat",
    "VisionChatDataset",
    "measure",
    "measure_all",
    "open_dataset",
    "preference_pairs",
    "prepared_dataset",
    "vision_chat_dataset",
]
