"""Checkpoints."""

from torchtune_vl.training._checkpointer import Qwen2_5_VLCheckpointer

__all__ = ["Qwen2_5_VLCheckpointer"]
