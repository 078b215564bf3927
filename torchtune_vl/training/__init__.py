"""Checkpoints."""

from torchtune_vl.training._checkpointer import Qwen2_5_VLCheckpointer
from torchtune_vl.training._export import export, merge

__all__ = ["Qwen2_5_VLCheckpointer", "export", "merge"]
